"""A run that is stopped anywhere and resumed ends with the weights and averages of the unbroken run, bit for bit."""

import os
import signal
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
import torch

from experiments import recipes
from experiments.main import cli
from lightning_modules.weights import read_torch
from tests.signals import option

ROOT = Path(__file__).parents[1]
STEPS = 30  # 22 steps are an epoch of digits at this batch size
SMALL = [
    f"--trainer.max_steps={STEPS}",
    "--trainer.val_check_interval=8",
    "--trainer.log_every_n_steps=5",
    "--trainer.enable_progress_bar=false",
    "--model.init_args.net={width: 32, depth: 2, num_heads: 2, bottleneck_dim: 8, proj_dropout: 0.1}",
    "--model.init_args.sampling.num_steps=2",
    "--samples.every_n_steps=10",
    "--samples.num_images=4",
    "--checkpoint.every_n_train_steps=7",
    "--ema.decays=[0.9, 0.5]",
]


def run(*extra: str) -> None:
    cli(["fit", "--exp", "jit_digits", *SMALL, *extra])


def result() -> dict[str, torch.Tensor]:
    """Weights, averages and optimiser moments of the newest checkpoint in the working directory."""
    content = read_torch(recipes.find_checkpoint("jit_digits", "last"))
    assert content["global_step"] == STEPS
    found = {f"raw.{name}": tensor for name, tensor in content["state_dict"].items()}
    for i, shadow in enumerate(content["callbacks"]["EMA"]["shadows"]):
        found |= {f"ema{i}.{name}": tensor for name, tensor in shadow.items()}
    for i, state in content["optimizer_states"][0]["state"].items():
        found |= {f"optimizer{i}.{name}": tensor for name, tensor in state.items()}
    return found


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    torch.set_num_threads(1)
    with chdir(tmp_path_factory.mktemp("unbroken")):
        run()
        return result()


@pytest.mark.parametrize(
    ("signum", "step", "where"),
    [
        pytest.param(signal.SIGTERM, 3, "forward", marks=pytest.mark.slow),
        (signal.SIGTERM, 21, "forward"),  # the last step of the epoch
        pytest.param(signal.SIGINT, 22, "forward", marks=pytest.mark.slow),  # the first of the next
        pytest.param(signal.SIGINT, 10, "batch_end", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 16, "validation", marks=pytest.mark.slow),
    ],
)
def test_interrupted_run_saves_and_resumes_bit_for_bit(signum, step, where, unbroken, tmp_path, capsys):
    with chdir(tmp_path):
        with pytest.raises(SystemExit) as stopped:
            run(option(step, signum, where))
        assert stopped.value.code == 128 + signum
        saved = read_torch(recipes.find_checkpoint("jit_digits", "last"))["global_step"]
        assert step <= saved <= step + 1, "the interrupt saved the step in progress"
        assert f"{signum.name} at step {saved}: saved runs/jit_digits/version_0/checkpoints" in capsys.readouterr().out
        run("--ckpt", "last")
        assert_same(result(), unbroken)


@pytest.mark.slow
def test_run_bounded_by_epochs_resumes_bit_for_bit(tmp_path):
    """Its length and a warm-up in epochs come from the loader: asking must not set the loader up too early."""
    epochs = ["--trainer.max_steps=-1", "--trainer.max_epochs=2", "--model.init_args.optim.warmup_epochs=1.5"]
    epochs += ["--model.init_args.optim.warmup_steps=null", "--trainer.limit_train_batches=15"]
    for folder in ("whole", "broken"):
        Path(tmp_path / folder).mkdir()
    with chdir(tmp_path / "whole"):
        run(*epochs)
        expected = result()
    with chdir(tmp_path / "broken"):
        with pytest.raises(SystemExit):
            run(*epochs, option(18))
        run(*epochs, "--ckpt", "last")
        assert_same(result(), expected)


@pytest.mark.slow
def test_two_interrupts_in_one_run(unbroken, tmp_path):
    with chdir(tmp_path):
        for step in (5, 25):
            with pytest.raises(SystemExit):
                run(*(["--ckpt=last"] if step == 25 else []), option(step))
        run("--ckpt", "last")
        assert_same(result(), unbroken)


@pytest.mark.slow
def test_interrupts_at_the_ends_of_epochs(tmp_path):
    """From the second on Lightning takes the epoch that follows for the one before; the noise depends on its number."""
    for folder in ("whole", "broken"):
        Path(tmp_path / folder).mkdir()
    epochs = "--trainer.limit_train_batches=6"
    with chdir(tmp_path / "whole"):
        run(epochs)
        expected = result()
    with chdir(tmp_path / "broken"):
        for step in (5, 11, 17):
            with pytest.raises(SystemExit):
                run(epochs, option(step), *(["--ckpt=last"] if step > 5 else []))
            assert read_torch(recipes.find_checkpoint("jit_digits", "last"))["global_step"] == step + 1
        run(epochs, "--ckpt", "last")
        assert_same(result(), expected)


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(unbroken, tmp_path):
    line = [sys.executable, "-m", "experiments.main", "fit", "--exp", "jit_digits", *SMALL]
    line += ["--trust-config", option(17, signal.SIGKILL)]  # of the tests' own callback
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with chdir(tmp_path):
        assert read_torch(recipes.find_checkpoint("jit_digits", "last"))["global_step"] == 14
        run("--ckpt", "last")
        assert_same(result(), unbroken)


@pytest.mark.slow
def test_longer_run_of_a_finished_one_is_the_longer_run(unbroken, tmp_path):
    with chdir(tmp_path):
        # the cosine must know the whole length from the start, so the shorter run is cut by its schedule's own steps
        constant = "--model.init_args.optim.schedule=constant"
        run(constant)
        expected = result()
        for folder, steps in (("part", "--trainer.max_steps=19"), ("part", f"--trainer.max_steps={STEPS}")):
            Path(folder).mkdir(exist_ok=True)
            with chdir(folder):
                run(constant, steps, *(["--ckpt=last"] if str(STEPS) in steps else []))
        with chdir("part"):
            assert_same(result(), expected)


@pytest.mark.slow
def test_a_milestone_is_gone_on_from_bit_for_bit(unbroken, tmp_path):
    """Kept at the end of an epoch, between validations: its batches must not be counted anew."""
    with chdir(tmp_path):
        run("--milestones.every_n_epochs=1", "--trainer.max_steps=24")
        (milestone,) = Path("runs/jit_digits/version_0/checkpoints").glob("epoch=0000.ckpt")
        content = read_torch(milestone)
        assert (content["global_step"], content["epoch"]) == (22, 0)
        milestone.rename("kept.ckpt")
        run("--ckpt", "kept.ckpt")
        assert_same(result(), unbroken)


def test_missing_checkpoint_is_an_error_and_nothing_starts(tmp_path):
    with chdir(tmp_path):
        for wanted in ("last", "nowhere.ckpt"):
            with pytest.raises(FileNotFoundError, match="no checkpoint"):
                run("--ckpt", wanted)
        assert not Path("runs").exists()


def test_a_partial_write_never_replaces_a_checkpoint(tmp_path, monkeypatch):
    from lightning_modules.callbacks.checkpoint import AtomicCheckpointIO

    path, writer = tmp_path / "step=1.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint({"weights": torch.ones(3)}, path)

    def full_disk(content, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        writer.save_checkpoint({"weights": torch.zeros(3)}, path)
    monkeypatch.undo()
    assert torch.equal(writer.load_checkpoint(path)["weights"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["step=1.ckpt"]
