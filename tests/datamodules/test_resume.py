"""Real Trainer runs: a run that is saved, stopped and resumed sees exactly the batches of the unbroken run."""

import logging

import lightning as L
import pytest
import torch

from datamodules.base import BatchData, TensorRows
from datamodules.image_rows import ImageRows
from datamodules.sources import RawRow

EPOCH = 4  # optimiser steps
TOTAL = 3 * EPOCH


class NoFiles:
    """A store whose row i is a PPM image with a left half of i and a right half of 255 - i: flips show."""

    class_names = None

    def __len__(self):
        return 18

    def fetch(self, indices):
        return [RawRow(self.ppm(i), i, None, f"row {i}") for i in indices]

    @staticmethod
    def ppm(i):
        return b"P6 8 8 255\n" + (bytes([i] * 12) + bytes([255 - i] * 12)) * 8


class FlippedData(BatchData):
    def make_datasets(self):
        val = TensorRows(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), torch.arange(5))
        return ImageRows(NoFiles(), 8, flip=True, seed=self.seed), val


class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch["label"].tolist(), batch["image"][:, 0, 0, 0].tolist()))
        return self.weight.square().sum()

    def validation_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(L.Callback):
    """Saves when optimiser step `step` is done, in hook `hook`."""

    def __init__(self, step, hook, path):
        self.step, self.hook, self.path = step, hook, path

    def save(self, trainer, hook):
        if hook == self.hook and trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer, *_):
        self.save(trainer, "batch")

    def on_validation_end(self, trainer, *_):
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer, *_):
        self.save(trainer, "epoch")


def fit(*, ckpt_path=None, num_workers=0, callbacks=None, validate=True, **limits):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=1.0 if validate else 0,
        callbacks=callbacks,
        **limits,
    )
    model = Recorder()
    trainer.fit(model, FlippedData(8, 4, num_workers=num_workers, seed=7), ckpt_path=ckpt_path)
    return trainer, model.seen


@pytest.fixture(scope="module")
def unbroken():
    seen = fit(max_steps=TOTAL)[1]
    assert len(seen) == TOTAL and len({tuple(labels) for labels, _ in seen}) == TOTAL
    flips = [label != left for labels, lefts in seen for label, left in zip(labels, lefts, strict=True)]
    assert 0.25 < sum(flips) / len(flips) < 0.75
    return seen


@pytest.mark.parametrize("hook", ["batch", "after"])
@pytest.mark.parametrize("step", [2, EPOCH, 6])
def test_stopped_by_max_steps(unbroken, tmp_path, hook, step):
    path = tmp_path / "a.ckpt"
    trainer, seen = fit(max_steps=step, callbacks=[SaveAt(step, hook, path)])
    if hook == "after":
        trainer.save_checkpoint(path)
    assert seen == unbroken[:step]
    assert fit(max_steps=TOTAL, ckpt_path=path)[1] == unbroken[step:]


@pytest.mark.parametrize("limit", ["max_epochs", "max_steps"])
@pytest.mark.parametrize(
    ("hook", "step", "validate"),
    [
        ("batch", 6, True),
        ("batch", EPOCH, True),
        ("batch", EPOCH, False),
        ("validation", EPOCH, True),
        ("epoch", EPOCH, True),
        ("epoch", EPOCH, False),
    ],
)
def test_saved_by_a_callback_in_a_longer_run(unbroken, tmp_path, hook, step, limit, validate):
    path = tmp_path / "a.ckpt"
    end = {"max_epochs": 3} if limit == "max_epochs" else {"max_steps": TOTAL}
    assert fit(**end, validate=validate, callbacks=[SaveAt(step, hook, path)])[1] == unbroken
    assert fit(**end, validate=validate, ckpt_path=path)[1] == unbroken[step:]


@pytest.mark.parametrize("step", [EPOCH, 6])
def test_with_worker_processes(unbroken, tmp_path, step):
    path = tmp_path / "a.ckpt"
    fit(max_epochs=2, num_workers=1, callbacks=[SaveAt(step, "batch", path)])
    assert fit(max_epochs=3, num_workers=1, ckpt_path=path)[1] == unbroken[step:]


@pytest.mark.parametrize(("hook", "step"), [("epoch", 6), ("batch", 5)])
@pytest.mark.parametrize("amount", [3, 0.75])
def test_limited_and_accumulated_epochs(tmp_path, hook, step, amount):
    path = tmp_path / "a.ckpt"
    options = {"max_epochs": 3, "limit_train_batches": amount}
    whole = fit(**options, callbacks=[SaveAt(step, hook, path)])[1]
    assert len(whole) == 9
    assert fit(**options, ckpt_path=path)[1] == whole[step:]


def test_accumulation_splits_the_global_batch(unbroken, tmp_path):
    path = tmp_path / "a.ckpt"
    halves = fit(max_epochs=3, accumulate_grad_batches=2, callbacks=[SaveAt(6, "batch", path)])[1]
    joined = [[a[k] + b[k] for k in (0, 1)] for a, b in zip(halves[::2], halves[1::2], strict=True)]
    assert joined == [list(batch) for batch in unbroken]
    assert fit(max_epochs=3, accumulate_grad_batches=2, ckpt_path=path)[1] == halves[12:]


def test_overfit_batches_is_refused():
    with pytest.raises(ValueError, match="overfit_batches=2 is not supported: use limit_n"):
        fit(max_steps=1, overfit_batches=2)
