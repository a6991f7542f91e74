"""OFFICIAL=: a run starts from an official file, with its class table or a new one; its first average by default."""

from contextlib import chdir
from pathlib import Path

import pytest
import torch

from experiments.main import cli
from lightning_modules.weights import read_torch

FILE = Path(__file__).parent / "golden" / "jit" / "ckpt" / "checkpoint-last.pth"  # width 32, three blocks, five classes
SIZES = [
    "--model.init_args.tokenizer.init_args.patch_size=8",
    "--model.init_args.net={width: 32, depth: 3, num_heads: 2, bottleneck_dim: 8}",
    "--model.init_args.net={in_context_len: 2, in_context_start: 1}",
    "--model.init_args.sampling.num_steps=2",
    "--samples.num_images=2",
    "--trainer.max_steps=1",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--model.init_args.optim.warmup_steps=5",  # the first step has rate 0, so the weights are still the file's
]


def fit(*extra: str):
    return cli(["fit", "--exp", "jit_digits", "--official", str(FILE), *SIZES, *extra]).model


def test_new_class_table_keeps_the_rest_and_the_row_without_label(tmp_path):
    with chdir(tmp_path):
        module = fit("--model.init_args.init_classes=new")
        official, ours = read_torch(FILE)["model_ema1"], module.official_state_dict()
        table = "net.y_embedder.embedding_table.weight"
        assert ours[table].shape == (11, 32) and official[table].shape == (6, 32)
        assert torch.equal(ours[table][-1], official[table][-1])
        assert not torch.equal(ours[table][:5], official[table][:5])
        assert [name for name in official if name != table and not torch.equal(ours[name], official[name])] == []


def test_key_picks_the_weights(tmp_path):
    with chdir(tmp_path):
        module = fit("--model.init_args.init_classes=new", "--model.init_args.init_key=model")
        name = "net.blocks.0.attn.qkv.weight"
        content = read_torch(FILE)
        assert torch.equal(module.official_state_dict()[name], content["model"][name])
        assert not torch.equal(content["model"][name], content["model_ema1"][name])


def test_another_number_of_classes_names_the_cure_and_trains_nothing(tmp_path):
    with chdir(tmp_path):
        with pytest.raises(ValueError, match=r"embedding_table\.weight \(6, 32\) instead of \(11, 32\)") as error:
            fit()
        assert "--model.init_args.init_classes=new" in str(error.value)
        assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_a_new_run_starts_from_a_checkpoint_of_ours(tmp_path):
    with chdir(tmp_path):
        fit("--model.init_args.init_classes=new", "--model.init_args.optim.warmup_steps=0")
        (own,) = tmp_path.rglob("*.ckpt")
        average = read_torch(own)["callbacks"]["EMA"]["shadows"][0]
        module = cli(["fit", "--exp", "jit_digits", "--official", str(own), *SIZES]).model
        assert all(torch.equal(dict(module.named_parameters())[name], tensor) for name, tensor in average.items())
