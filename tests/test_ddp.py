"""Two gloo processes train as one with the same global batch: the same loss curve, the same weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules.weights import read_torch

ROOT = Path(__file__).parents[1]
SMALL = [
    "--trainer.max_steps=26",  # past the end of an epoch
    "--trainer.log_every_n_steps=1",
    "--trainer.val_check_interval=13",
    "--trainer.enable_progress_bar=false",
    "--model.init_args.net={width: 32, depth: 2, num_heads: 2, bottleneck_dim: 8}",
    "--model.init_args.sampling.num_steps=2",
    "--samples.num_images=4",
    "--checkpoint.every_n_train_steps=13",
]


def train(folder: Path, *extra: str) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """Loss curves and final averages of a run in its own processes."""
    folder.mkdir(exist_ok=True)
    line = [sys.executable, "-m", "experiments.main", "fit", "--exp", "jit_digits", *SMALL, *extra]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (folder / "runs" / "jit_digits").iterdir()
    events = EventAccumulator(str(run)).Reload()
    curves = {tag: [event.value for event in events.Scalars(tag)] for tag in ("train/loss", "val/loss")}
    (checkpoint,) = run.glob("checkpoints/*.ckpt")
    return curves, read_torch(checkpoint)["callbacks"]["EMA"]["shadows"][0]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return train(tmp_path_factory.mktemp("one"))


def test_two_processes_train_as_one(one, tmp_path):
    curves, weights = train(tmp_path, "--trainer.devices=2", "--trainer.strategy=ddp")
    assert len(curves["train/loss"]) == 26
    for tag, values in one[0].items():
        assert curves[tag] == pytest.approx(values, rel=1e-4), tag
    for name, tensor in one[1].items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_two_processes_resume_a_checkpoint_of_theirs(one, tmp_path):
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    train(tmp_path, *two, "--trainer.max_steps=13", "--model.init_args.optim.schedule=constant")
    resumed, _ = train(tmp_path, *two, "--ckpt=last", "--model.init_args.optim.schedule=constant")
    straight, _ = train(tmp_path / "straight", "--model.init_args.optim.schedule=constant")
    assert resumed["train/loss"][-13:] == pytest.approx(straight["train/loss"][-13:], rel=1e-4)
