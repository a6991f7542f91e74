"""`make plan`: counts against published sizes and against a real checkpoint, arithmetic, errors, the command line."""

import io
import json
import re
import sys
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from experiments import costs, plan, recipes
from experiments.load import instantiate, load_config
from layers.tokenizers.pixels import PixelTokenizer
from lightning_modules.callbacks.ema import EMA
from lightning_modules.callbacks.throughput import count_flops
from lightning_modules.optim import adamw, param_groups
from tests.smoke import SMOKE, tiny

# trained parameters in 1e6; GFLOP of a forward and of a training step; TFLOP of a sample; MB of the tensors of matmuls
SIZES = {
    "jit": (131.1, 50.4, 151, 9.4, 97),
    "jit_l16": (458.9, 175.9, 528, 32.9, 259),
    "jit_h16": (952.5, 363.9, 1092, 68.0, 433),
}
# the others take the planner through nothing new
METHODS = [
    pytest.param(name, marks=[] if name in ("dart", "rar", "vae") else pytest.mark.slow)
    for name in recipes.names()
    if "_" not in name
]
DIGITS = ("--model.init_args.sampling.num_steps=2",)


@cache
def on_meta(experiment, *overrides):
    return costs.build(load_config(experiment, overrides))


def planned(*overrides, experiment="jit_digits", gpu="h100", gpus=1, mfu=0.4):
    return plan.make_plan(plan.read_recipe(experiment, [*DIGITS, *overrides]), gpu=gpu, gpus=gpus, mfu=mfu)


@pytest.mark.parametrize("experiment", ["jit", *(pytest.param(n, marks=pytest.mark.slow) for n in SIZES if n != "jit")])
def test_parameters_and_flops_are_the_published_ones(experiment):
    module = on_meta(experiment)
    params, forward, train, sampling, _ = SIZES[experiment]
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6 == pytest.approx(params, abs=0.05)
    counted = costs.training_flops(module)
    assert counted[0] / 1e9 == pytest.approx(forward, abs=0.05) and counted[1] / 1e9 == pytest.approx(train, abs=0.5)
    assert costs.sampling_flops(module) / 1e12 == pytest.approx(sampling, abs=0.05)


@pytest.mark.slow
def test_sampling_without_the_interval_takes_198_forwards():
    module = on_meta("jit", "model.init_args.sampling.cfg_interval=[0.0, 1.0]")
    flops = costs.sampling_flops(module)
    assert flops == pytest.approx(198 * costs.training_flops(module)[0], rel=1e-3)  # one time embedding per batch
    assert flops / 1e12 == pytest.approx(10.0, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["givt_digits", "jetformer_digits"])
def test_a_causal_decode_is_counted_by_its_first_and_last_step(experiment):
    module = on_meta(experiment, "--model.init_args.net.depth=1", "--model.init_args.tokenizer.init_args.patch_size=4")
    plain = count_flops(lambda: module.sample([0]))
    assert costs.sampling_flops(module) == plain > 0


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("--model.init_args.sampling.method=euler",)])
def test_counting_repeated_forwards_once_changes_nothing(overrides):
    module = on_meta("jit_digits", "--model.init_args.sampling.num_steps=4", *overrides)
    plain = count_flops(lambda: module.sample([0]))
    assert costs.sampling_flops(module) == plain > 0
    assert count_flops(lambda: module.sample([0])) == plain, "the module is as it was"


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["jit", pytest.param("jit_l16", marks=pytest.mark.slow)])
def test_activations_are_near_the_formula(experiment):
    """17 bf16 tensors of tokens x width per block, as the estimate of the performance notes has it."""
    found = costs.count_activations(load_config(experiment))
    assert found.compiled / costs.COMPILED_KEEPS / 1e6 == pytest.approx(SIZES[experiment][4], rel=0.03)
    assert 1.5 < found.eager / found.compiled < 2.0
    trained = sum(p.numel() for p in on_meta(experiment).parameters() if p.requires_grad)
    assert found.weight_copies == pytest.approx(2 * trained, rel=0.02)


def test_activations_are_those_that_a_real_step_saves():
    config = load_config("jit_digits")
    module = instantiate(config["model"], "model").train()
    saved = []
    for size in (3, 5):
        storages = costs.Storages([*module.parameters(), *module.buffers()])
        with torch.autograd.graph.saved_tensors_hooks(storages.add, lambda t: t):
            module.training_loss(module.blank_batch(size, "cpu"))
        saved.append(storages.nbytes())
    found = costs.count_activations(config)
    assert found.eager == pytest.approx((saved[1] - saved[0]) / 2, rel=1e-3)
    assert found.compiled < found.eager and found.weight_copies < 1e4, "float32 casts no weights"


@pytest.mark.slow
def test_outputs_of_a_head_in_chunks_are_not_kept():
    """They would be of a few images, which are a single chunk; what an image costs is what it adds to many."""
    sizes = ("net.width=64", "net.depth=1", "net.mlp_hidden=64", "flow.depth=2", "flow.width=64", "flow.block_depth=1")
    changes = [f"--model.init_args.{size}" for size in ("tokenizer.init_args.image_size=64", *sizes)]
    config = load_config("jetformer", changes)
    module = costs.build(config)
    outputs = 4 * module.tokenizer.seq_len * module.head.linear.out_features  # bytes of one image's
    found = costs.count_activations(config)
    assert 0 < found.compiled <= found.eager < outputs / 5
    assert 0 <= found.weight_copies < sum(p.nbytes for p in module.parameters())


def test_views_of_one_tensor_count_once_and_known_ones_not():
    known, x = torch.zeros(7), torch.zeros(10)
    storages = costs.Storages([known])
    for tensor in (x, x[:5], x.view(2, 5), known, torch.zeros(3)):
        storages.add(tensor)
    assert storages.nbytes() == 4 * 13


def test_a_frozen_tokenizer_is_not_trained():
    class Encoder(PixelTokenizer):
        frozen = True

        def __init__(self):
            super().__init__(16, 4)
            self.map = nn.Linear(48, 48)

        def encode_raw(self, raw, generator=None):
            tokens = super().encode_raw(raw, generator)
            return tokens._replace(x=self.map(tokens.x))

    module = costs.build(load_config("jit_digits"))
    plain, _ = costs.training_flops(module)
    module.tokenizer = Encoder().to("meta")
    encoder = 2 * 16 * 48 * 48
    assert costs.training_flops(module) == (plain + encoder, 3 * plain + encoder)


def test_checkpoint_size_is_that_of_a_checkpoint():
    module = instantiate(load_config("jit_digits")["model"], "model")
    groups = param_groups(module.named_parameters(), 0.0, no_weight_decay=module.no_weight_decay)
    optimizer, ema = adamw(groups, module.optim, 1e-3), EMA([0.995])
    module.training_loss(module.blank_batch(2, "cpu"))["loss"].backward()
    optimizer.step()
    ema.start(module)
    file = io.BytesIO()
    torch.save([module.state_dict(), optimizer.state_dict(), ema.state_dict()], file)
    assert planned()["checkpoint_bytes"] == pytest.approx(file.tell(), rel=0.02)


def test_memory_adds_up_and_the_largest_batch_is_the_largest():
    one = planned()
    trained = 4 * one["parameters_trained"]
    assert one["state_bytes"]["optimiser (two moments)"] == 2 * trained and one["state_bytes"]["EMA 0.995"] == trained
    assert one["optimiser_traffic_bytes"] == (28 + 8) * one["parameters_trained"]
    state, per_image, most = sum(one["state_bytes"].values()), one["activation_bytes_per_image"], 80e9
    assert one["total_bytes"] == state + 64 * per_image and one["fits"]
    largest = one["largest_batch_per_device"]
    assert state + largest * per_image <= most < state + (largest + 1) * per_image
    two = planned("--ema.decays=[0.9,0.99,0.999]", gpus=2)
    assert (
        two["state_bytes"]["gradient buckets of DDP"] == trained and "gradient buckets of DDP" not in one["state_bytes"]
    )
    assert len([name for name in two["state_bytes"] if name.startswith("EMA")]) == 3 and two["batch_per_device"] == 32


@pytest.mark.slow
def test_a_batch_beyond_the_card_does_not_fit():
    most = planned(gpu="rtx3090")["largest_batch_per_device"]
    steps = "--trainer.max_steps=1"
    assert planned(f"--data.init_args.batch_size={most}", steps, gpu="rtx3090")["fits"]
    assert not planned(f"--data.init_args.batch_size={most + 1}", steps, gpu="rtx3090")["fits"]


def test_hours_follow_from_flops_steps_and_mfu():
    slow, fast = planned(mfu=0.2), planned(mfu=0.4, gpus=4)
    assert slow["steps"] == fast["steps"] == 2000
    assert slow["hours"] == pytest.approx(8 * fast["hours"]) and slow["gpu_hours"] == pytest.approx(
        2 * fast["gpu_hours"]
    )
    assert slow["hours"] == pytest.approx(2000 * 64 * slow["train_flops"] / (0.2 * 989.4e12) / 3600)
    assert fast["images_per_s"] == pytest.approx(2000 * 64 / fast["hours"] / 3600)


@pytest.mark.parametrize(
    ("trainer", "steps"),
    [
        ({"max_epochs": 3}, 66),
        ({"max_epochs": 3, "max_steps": 10}, 10),
        ({"max_epochs": 3, "max_steps": 100}, 66),
        ({"max_epochs": -1, "max_steps": 100}, 100),
    ],
)
def test_the_run_ends_at_whichever_comes_first(trainer, steps):
    assert plan.planned_steps(trainer, instantiate(load_config("jit_digits")["data"], "data")) == steps


def test_a_run_without_an_end_is_an_error():
    with pytest.raises(ValueError, match=r"no end: give --trainer.max_steps"):
        plan.planned_steps({"max_epochs": -1}, None)


def test_epochs_of_imagenet_and_of_unknown_sets():
    def steps(source, limit_n=None):
        return plan.steps_per_epoch(SimpleNamespace(source=source, batch_size=1024, limit_n=limit_n))

    assert steps("ILSVRC/imagenet-1k") == steps("/nowhere/imagenet") == 1251
    assert steps("ILSVRC/imagenet-1k", limit_n=2048) == 2
    with pytest.raises(ValueError, match=r"'some/set' has is not known before a download: give --trainer.max_steps"):
        steps("some/set")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--gpu", "h101"], "unknown GPU 'h101' .*there are h100, .*rtx3090"),
        (["--mfu", "40"], "--mfu 40.0 must be above 0 and at most 1"),
        (["--gpus", "0"], "--gpus 0 at least 1"),
        (["--gpus", "7"], "batch_size 64 is no multiple of 7 GPUs"),
        (["--model.init_args.net.dept=4"], "unknown key .*did you mean --model.init_args.net.depth"),
        (["--samples.num_images=3"], "'--samples.num_images=3' changes nothing here"),
        (["stray"], "'stray' changes nothing here"),
    ],
)
def test_mistakes_are_one_line(line, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan", "--exp", "jit_digits", *line])
    with pytest.raises(SystemExit) as stopped:
        plan.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert re.search(message, error)


def test_command_line_prints_a_table_and_writes_json(monkeypatch, capsys, tmp_path):
    file = tmp_path / "made" / "plan.json"
    line = ["plan", "--exp", "jit_digits", "--gpu", "A100", *DIGITS, "--json", str(file)]
    monkeypatch.setattr(sys, "argv", line)
    plan.main()
    printed = capsys.readouterr().out
    for text in ("568,512 trained", "64 = 1 GPUs x 64", "of 80 GB (estimate)", "33 to 46 %", "trains in 32-true"):
        assert text in printed
    written = json.loads(file.read_text())
    assert (written["gpus"], written["gpu"], written["mfu"]) == (1, "a100", 0.4)
    assert written["overrides"] == list(DIGITS) and written["steps"] == 2000


@pytest.mark.parametrize("experiment", METHODS)
def test_every_method_can_be_planned(experiment):
    """Shrunken: a method whose loss or sampler reads a tensor's value on the host fails here."""
    overrides = [f"--{key}={value}" for key, value in tiny(experiment).items()]
    figures = plan.make_plan(load_config(experiment, overrides, overlays=[SMOKE]), gpu="h100", gpus=1, mfu=0.4)
    for name in ("train_flops", "sampling_flops", "activation_bytes_per_image", "checkpoint_bytes", "hours"):
        assert figures[name] > 0, name


def test_recipes_for_any_number_of_devices_are_planned_for_eight():
    assert plan.device_count({"devices": "auto"}) == plan.device_count({"devices": -1}) == 8
    assert plan.device_count({"devices": 1}) == 1


def test_a_latent_recipe_is_planned_without_its_tokenizers_file_and_without_its_encoder():
    """The cache has paid for the encoder; without one it runs at every step, forward only."""
    config = load_config("mar", ["model.init_args.net.width=96", "model.init_args.net.depth=1"])
    module = costs.build(config)
    assert costs.is_cached(config) and not costs.is_cached(load_config("jit_digits"))
    forward, step = costs.training_flops(module, cached=True)
    online_forward, online_step = costs.training_flops(module)
    assert step == 3 * forward
    assert online_forward - forward == online_step - step > 0
