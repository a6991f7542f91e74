"""Both stages together on scenes with known objects: training, scores, pictures, the way from stage 1 into stage 2."""

from contextlib import chdir

import lightning as L
import pytest
import torch

from datamodules.shapes_labels import STUFF, ShapesLabelMaps
from experiments import export, recipes
from layers.tokenizers.label_map import LabelMapTokenizer
from lightning_modules.base import to_uint8
from lightning_modules.label_map_autoencoder import LabelMapAutoencoderModule, LabelMapLoss
from lightning_modules.label_map_scores import panoptic_figures
from lightning_modules.optim import OptimConfig
from lightning_modules.uvim import UViMModule, UViMSearch
from tests.methods.test_uvim import TINY
from tests.smoke import call, train

ARCH = {"width": 32, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "mlp_hidden": 64, "patch_size": 4}
ARCH |= {"seq_len": 16, "token_dim": 8}
NET = {"width": 32, "depth": 1, "num_heads": 2, "mlp_hidden": 32}


def tokenizer(task: str, **changes) -> LabelMapTokenizer:
    classes = {"panoptic": {"instances": 4, "semantics": 13}, "depth": {"depth": 16}}[task]
    return LabelMapTokenizer(16, **{"classes": classes, "arch": ARCH, "frozen": False} | changes)


def autoencoder(task: str = "panoptic", **changes) -> LabelMapAutoencoderModule:
    optim = OptimConfig(lr=5e-3)
    return LabelMapAutoencoderModule(tokenizer(task), LabelMapLoss(kl_weight=1e-4), optim=optim, **changes)


def uvim(task: str = "panoptic", **changes) -> UViMModule:
    encoder, decoder = NET | {"patch_size": 4}, NET | {"dropout": 0.0}
    return UViMModule(tokenizer(task), encoder, decoder, search=UViMSearch(num_beams=1, num_fans=1), **changes)


def data(task: str = "panoptic", length: int = 16) -> ShapesLabelMaps:
    return ShapesLabelMaps(16, 8, task=task, max_objects=1, length=length, val_length=8)


def fit(module, datamodule, steps: int, folder) -> dict[str, float]:
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=datamodule)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("make", [autoencoder, uvim])
@pytest.mark.parametrize(
    ("task", "names"), [("panoptic", {"pq", "sq", "rq"}), ("depth", {"rmse", "abs_rel", "delta1"})]
)
def test_validation_logs_the_task_s_figures(tmp_path, make, task, names):
    metrics = fit(make(task), data(task), 1, tmp_path)
    assert {f"val/{name}" for name in names} <= set(metrics)
    assert all(0 <= metrics[f"val/{name}"] < 100 for name in names)


def test_no_figures_are_made_where_none_are_asked_for(tmp_path):
    assert "val/pq" not in fit(autoencoder(score_images=0), data(), 1, tmp_path)


def test_scores_are_those_of_the_predicted_maps(tmp_path):
    module, datamodule = autoencoder(), data()
    fit(module, datamodule, 1, tmp_path)
    batch = next(iter(datamodule.val_dataloader()))
    semantics, instances = torch.stack(batch["truth"]).long().unbind(1)
    module.predict_maps = lambda *_: {"instances": instances, "semantics": semantics}
    figures = panoptic_figures(module.scores(batch))
    assert figures == {"pq": 1.0, "sq": 1.0, "rq": 1.0}


@pytest.mark.slow
def test_stage_1_learns_the_maps_it_has_seen(tmp_path):
    torch.manual_seed(0)
    module, datamodule = autoencoder(), data(length=8)
    fit(module, datamodule, 250, tmp_path)
    batch = next(iter(datamodule.train_dataloader()))
    predicted = module.predicted(batch, torch.Generator().manual_seed(0))
    objects = batch["semantics"] < min(STUFF)  # a twentieth of the pixels
    assert (predicted["semantics"] == batch["semantics"])[objects].float().mean() > 0.8


@pytest.mark.parametrize("make", [autoencoder, uvim])
@pytest.mark.parametrize("task", ["panoptic", "depth"])
def test_pictures_show_images_beside_their_maps_and_predictions_repeat(make, task):
    module, datamodule = make(task), data(task)
    datamodule.setup()
    originals = module.originals(datamodule, 3)
    picture = module.picture(originals)
    rows = [datamodule.val_set[i] for i in (0, 2, 5)]
    assert picture.shape == (3, 3, 16, 32) and picture.dtype == torch.uint8
    assert torch.equal(picture[..., :16], torch.cat([row["image"] for row in rows]))
    stacked = torch.cat([module.tokenizer.stacked(row) for row in rows]).unbind(1)
    maps = dict(zip(module.tokenizer.classes, stacked, strict=True))
    assert torch.equal(picture[..., 16:], to_uint8(module.tokenizer.picture(maps)))
    first, again = (module.reconstruct(originals) for _ in range(2))
    assert first.shape == (3, 3, 16, 16) and torch.equal(first, again) and module.training


def test_an_image_tokenizer_is_refused():
    from layers.tokenizers.pixels import PixelTokenizer

    with pytest.raises(ValueError, match="PixelTokenizer makes no tokens of label maps: set"):
        LabelMapAutoencoderModule(PixelTokenizer(16, 4))


@pytest.mark.slow
def test_an_exported_stage_1_is_the_tokenizer_of_stage_2(tmp_path):
    """By the command line: train, export, train on what was exported; the checkpoint of stage 2 holds no copy."""
    arch = [f"--{key}={value}" for key, value in TINY.items() if ".tokenizer.init_args.arch." in key]
    with chdir(tmp_path):
        first = train("vae_uvim_shapes", *arch).model.tokenizer
        weights = tmp_path / "vae.safetensors"
        call(export.main, "--exp", "vae_uvim_shapes", "--ckpt", "last", "--ema", "raw", "--out", str(weights))
        second = train(
            "givt_uvim_shapes",
            f"--model.init_args.tokenizer.init_args.weights={weights}",
            "--model.init_args.tokenizer.init_args.frozen=true",
        )
        expected = first.vae.state_dict()
        found = second.model.tokenizer.vae.state_dict()
        assert all(torch.equal(tensor.cpu(), expected[name].cpu()) for name, tensor in found.items())
        saved = torch.load(recipes.find_checkpoint("givt_uvim_shapes", "last"), weights_only=True)
        assert not [name for name in saved["state_dict"] if name.startswith("tokenizer.")]
