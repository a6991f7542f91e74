"""Trainer runs over a stream: resumed inside an epoch and between two, in one process and in two with workers."""

import json
import logging

import lightning as L
import pytest
import torch

from datamodules.base import BatchData
from tests.datamodules.streams import SEED, TOTAL, make_rows, make_sampler, open_tars, plain, write_tars


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return write_tars(tmp_path_factory.mktemp("tars"))


class StreamData(BatchData):
    """Tars as training and validation rows."""

    def __init__(self, folder, *, num_workers=0):
        super().__init__(8, 6, num_workers=num_workers, seed=SEED)
        self.folder = folder

    def make_datasets(self):
        return make_rows(open_tars(self.folder)), make_rows(open_tars(self.folder), flip=False)

    def _sampler(self, rows, *, shuffle, rank, world_size):
        return make_sampler(
            rows, shuffle=shuffle, batch=self.batch_size, rank=rank, world_size=world_size,
            num_workers=self.num_workers, accumulate=self.trainer.accumulate_grad_batches, buffer=8,
        )  # fmt: skip


class Recorder(L.LightningModule):
    """Keeps what it saw, and writes it to `folder` when training ends: processes share nothing else."""

    def __init__(self, folder):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.folder, self.seen, self.validated = folder, [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(plain(batch))
        return self.weight.square().sum()

    def validation_step(self, batch, batch_idx):
        self.validated += batch["label"].tolist()

    def on_train_end(self):
        path = self.folder / f"seen-{self.global_rank}.json"
        path.write_text(json.dumps({"train": self.seen, "val": self.validated}))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(L.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(tars, folder, *, devices=1, num_workers=0, save=None, ckpt_path=None, validate=0):
    """Trains for three epochs of seven batches; returns what each process saw."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    folder.mkdir()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        max_epochs=3,
        limit_val_batches=validate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[SaveAt(*save)] if save else None,
    )
    trainer.fit(Recorder(folder), StreamData(tars, num_workers=num_workers), ckpt_path=ckpt_path)
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(devices)]


@pytest.mark.parametrize("step", [7, 10])
def test_a_trainer_resumes_inside_and_between_epochs(tars, tmp_path, step):
    (whole,) = fit(tars, tmp_path / "whole", save=(step, tmp_path / "a.ckpt"))
    assert len(whole["train"]) == 21
    (rest,) = fit(tars, tmp_path / "rest", ckpt_path=tmp_path / "a.ckpt")
    assert rest["train"] == whole["train"][step:]


def test_two_processes_with_workers_resume_a_checkpoint_of_the_first(tars, tmp_path):
    whole = fit(tars, tmp_path / "whole", devices=2, num_workers=2, save=(10, tmp_path / "a.ckpt"), validate=1.0)
    for epoch in range(3):
        labels = [label for part in whole for batch in part["train"][7 * epoch : 7 * epoch + 7] for label in batch[0]]
        assert len(labels) == len(set(labels)) == 42
    validated = [label for part in whole for label in part["val"]]
    assert len(validated) >= 3 * TOTAL and set(validated) == set(range(TOTAL))
    rest = fit(tars, tmp_path / "rest", devices=2, num_workers=2, ckpt_path=tmp_path / "a.ckpt")
    assert [part["train"] for part in rest] == [part["train"][10:] for part in whole]
