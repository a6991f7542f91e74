"""The callback `fid`: what it logs is what `make eval` finds, and training does not notice it."""

from contextlib import chdir

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments import evaluate, main, stats
from lightning_modules.weights import read_torch
from tests.smoke import call
from tests.test_evaluate import SMALL, rows

FIT = ["fit", "--exp", "jit_digits", *SMALL]
FID = ["--fid.every_n_steps=4", "--fid.extractor=randconv", "--fid.num_images=24", "--fid.batch_size=10"]


def weights(folder):
    (path,) = (folder / "runs" / "jit_digits").glob("*/checkpoints/*.ckpt")
    return read_torch(path)["state_dict"]


def test_the_callback_and_make_eval_agree_and_training_is_left_alone(tmp_path):
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    with chdir(tmp_path / "without"):
        main.cli(FIT)
    with chdir(tmp_path / "with"):
        call(stats.main, "--exp", "jit_digits", "--extractor", "randconv", "--out", "real.npz")
        trained = main.cli([*FIT, *FID, "--fid.stats=real.npz"])
        line = ["--exp", "jit_digits", "--ckpt", "last", "--extractor", "randconv", "--stats", "real.npz"]
        call(evaluate.main, *line, "--num", "24", "--batch_size", "10", "--out", "out")
    events = EventAccumulator(str(next((tmp_path / "with" / "runs" / "jit_digits").iterdir()))).Reload()
    assert [event.step for event in events.Scalars("val/fd_randconv")] == [4, 8], "whatever the logging interval is"
    logged = {name: float(value) for name, value in trained.trainer.callback_metrics.items()}
    (row,) = rows(tmp_path / "with" / "out")
    for name in ("fd_randconv", "precision", "coverage", "n"):
        assert logged[f"val/{name}"] == pytest.approx(row[name], rel=1e-5), name
    one, other = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert all(torch.equal(one[name], other[name]) for name in other), "the same training with and without it"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (["--fid.extractor=null"], "cannot judge images by itself"),
        (["--fid.extractor=randconv"], "fid.stats is missing"),
        (["--fid.extractor=null", "--fid.stats=x.npz"], "fid.extractor is null"),
        (["--fid.weights=0.5"], "fid.weights is 0.5: there are raw, 0.995"),
    ],
)
def test_a_callback_that_could_measure_nothing_is_refused(line, text, tmp_path):
    with chdir(tmp_path), pytest.raises(ValueError, match=text):
        main.cli([*FIT, "--fid.every_n_steps=4", *line])


def test_missing_inception_weights_stop_a_run_before_its_first_step(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with chdir(tmp_path), pytest.raises(FileNotFoundError, match="no Inception weights"):
        main.cli([*FIT, "--fid.every_n_steps=4", "--fid.num_images=8", "--fid.stats=any.npz"])
    assert not list(tmp_path.glob("runs/**/*.ckpt"))


@pytest.mark.parametrize("value", ["every_n_steps=0", "num_images=0", "batch_size=0"])
def test_settings_that_make_no_sense(value, tmp_path):
    with chdir(tmp_path), pytest.raises(ValueError, match=rf"fid.{value.split('=')[0]} is 0"):
        main.cli([*FIT[1:], f"--fid.{value}"], run=False)
