"""What ends a run from outside: SLURM, a full disk, damaged files. By the command line it goes on as if unbroken."""

import errno
import os
import signal
import subprocess
import sys
import warnings
from contextlib import chdir
from pathlib import Path

import pytest
import torch

from datamodules.base import BatchData
from experiments import main, recipes
from experiments.errors import describe
from experiments.main import expand
from lightning_modules.callbacks import slurm
from lightning_modules.callbacks.checkpoint import LOCK, _cannot_write
from lightning_modules.weights import read_torch
from tests.lightning_modules.test_checkpoint import files_up_to, flip
from tests.signals import option
from tests.smoke import call, shrunken, train

STEPS = ["--trainer.max_steps=4", "--samples.every_n_steps=100", "--trainer.enable_progress_bar=false"]
JOB = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


def weights(path) -> dict[str, torch.Tensor]:
    return read_torch(path)["state_dict"]


def same(one, other) -> bool:
    found = weights(one)
    return all(torch.equal(found[name], tensor) for name, tensor in weights(other).items())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The last checkpoint of a run of four steps."""
    folder = tmp_path_factory.mktemp("unbroken")
    with chdir(folder):
        train("jit_digits", *STEPS)
        return recipes.find_checkpoint("jit_digits", "last").resolve()


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Inside a job of SLURM, whose scontrol writes down what it is asked for; the file that it writes."""
    asked = tmp_path / "asked"
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    return asked


@pytest.mark.parametrize("signum", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_job_of_slurm_saves_is_requeued_and_goes_on(signum, job, unbroken, tmp_path, monkeypatch, capsys):
    """The same line both times, without CKPT=. At SIGTERM it is SLURM who requeues, or somebody who cancels."""
    line = [*STEPS, option(2, signum)]
    with chdir(tmp_path):
        with pytest.raises(SystemExit) as stopped:
            train("jit_digits", *line)
        assert stopped.value.code == 128 + signum
        requeues = signum == signal.SIGUSR1
        assert (job.read_text() if job.exists() else "") == ("requeue 77\n" if requeues else "")
        assert ("; job 77 is requeued" if requeues else "; go on with CKPT=last") in capsys.readouterr().out
        (folder,) = Path("runs/jit_digits").iterdir()
        assert folder.name.startswith("slurm_77_")
        assert not list(tmp_path.rglob("hpc_ckpt*")), "Lightning's handler saves in the midst of a step"
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        train("jit_digits", *line)
        assert list(Path("runs/jit_digits").iterdir()) == [folder]
        (last,) = folder.glob("checkpoints/*.ckpt")
        assert "steps 3 to 4" in capsys.readouterr().out and same(last, unbroken)


def send_when_data_is_made_ready(signum, monkeypatch):
    """A signal to this process before the first step."""
    prepare = BatchData.train_dataloader

    def signalled(self):
        os.kill(os.getpid(), signum)
        return prepare(self)

    monkeypatch.setattr(BatchData, "train_dataloader", signalled)


def resumed(argv) -> dict[str, str]:
    """What a line says of checkpoint and folder once it is expanded."""
    words = dict(word.partition("=")[::2] for word in expand(argv))
    return {name: words[name] for name in ("--ckpt_path", "--trainer.logger.init_args.version") if name in words}


def test_a_requeued_job_goes_on_with_its_own_run_whatever_the_line_says(job, unbroken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["fit", "--exp", "jit_digits", "--ckpt", str(unbroken)]
    first = resumed(line)
    folder = first["--trainer.logger.init_args.version"]
    assert first["--ckpt_path"] == str(unbroken) and folder.startswith("slurm_77_")
    own = Path("runs/jit_digits") / folder / "checkpoints" / "step=0000003.ckpt"
    own.parent.mkdir(parents=True)
    assert resumed(line) == {"--ckpt_path": str(unbroken)}, "the same line again in one job is another run"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert resumed(line) == first, "killed before it saved anything"
    own.write_bytes(unbroken.read_bytes())
    assert resumed(line) == first | {"--ckpt_path": str(own)}
    assert folder not in str(resumed([*line, "--trainer.max_steps=9"])), "another line of the job has another run"
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert resumed(line) == {"--ckpt_path": str(unbroken)}


def test_a_task_of_an_array_requeues_itself_alone(job, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    assert slurm.requeue() == "job 70_5 is requeued" and job.read_text() == "requeue 70_5\n"


def test_the_signal_before_the_time_limit_is_heard_before_the_first_step(job, tmp_path, monkeypatch):
    send_when_data_is_made_ready(signal.SIGUSR1, monkeypatch)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "")
    with chdir(tmp_path), pytest.raises(SystemExit) as stopped:
        train("jit_digits", *STEPS)
    assert stopped.value.code == 128 + signal.SIGUSR1 and job.read_text() == "requeue 77\n"


def test_a_requeue_that_is_refused_says_what_to_do(job, tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'not allowed' >&2\nexit 1\n")
    assert slurm.requeue() == "it is not requeued (scontrol requeue 77: not allowed), so submit it again"
    monkeypatch.setenv("PATH", "/nowhere")
    assert "No such file" in slurm.requeue() and "submit it again" in slurm.requeue()


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_one_line_and_the_checkpoint_of_before(unbroken, tmp_path, capsys):
    with chdir(tmp_path):
        train("jit_digits", *STEPS, "--trainer.max_steps=2")
        first = recipes.find_checkpoint("jit_digits", "last")
        line = ["fit", "--exp", "jit_digits", *shrunken("jit_digits"), *STEPS, "--ckpt=last"]
        with files_up_to(first.stat().st_size // 2), pytest.raises(SystemExit) as stopped:
            call(main.main, *line)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code == 2 and error.startswith("error: the checkpoint runs/jit_digits/version_0/")
        assert "File too large" in error and "make room" in error and "CKPT=last" in error and len(error) < 500
        assert recipes.find_checkpoint("jit_digits", "last") == first
        train("jit_digits", *STEPS, "--ckpt=last")
        assert same(recipes.find_checkpoint("jit_digits", "last"), unbroken)


def test_of_all_that_fails_on_a_full_disk_the_checkpoint_is_named_else_what_failed_first():
    full = OSError(errno.ENOSPC, "No space left on device", "curves")
    assert describe(full) == (
        "[Errno 28] No space left on device: 'curves': make room (checkpoints are untouched: training goes on with "
        "CKPT=last)"
    )
    ours = _cannot_write(Path("step=2.ckpt"), OSError(errno.ENOSPC, "No space left on device"))
    ours.__cause__, full.__context__ = OSError(errno.ENOSPC, "No space left on device"), ours
    assert describe(full) == str(ours) and describe(ours) == str(ours)
    assert "make room" not in describe(FileNotFoundError("no checkpoint"))


@pytest.fixture
def two(unbroken, tmp_path, monkeypatch):
    """Two checkpoints of a recipe, the older and the newer."""
    monkeypatch.chdir(tmp_path)
    paths = []
    for i in (1, 2):
        paths.append(recipes.RUNS / "jit_digits" / f"version_{i}" / "checkpoints" / f"step={i}.ckpt")
        paths[-1].parent.mkdir(parents=True)
        paths[-1].write_bytes(unbroken.read_bytes())
        os.utime(paths[-1], (i, i))
    return paths


@pytest.mark.parametrize("damage", ["cut", "empty", "flip"])
def test_the_last_checkpoint_is_the_newest_that_is_whole(damage, two):
    assert recipes.find_checkpoint("jit_digits", "last") == two[1]
    content = two[1].read_bytes()
    two[1].write_bytes({"cut": content[:-500], "empty": b"", "flip": content}[damage])
    if damage == "flip":
        flip(two[1], len(content) // 2)
    os.utime(two[1], (2, 2))
    with pytest.warns(UserWarning, match=r"version_2/checkpoints/step=2\.ckpt.*passed over for an older"):
        assert recipes.find_checkpoint("jit_digits", "last") == two[0]
    with pytest.raises(ValueError, match=r"step=2\.ckpt.*"):
        read_torch(recipes.find_checkpoint("jit_digits", str(two[1])))


def test_none_that_is_whole_is_none_at_all(two):
    for path in two:
        path.write_bytes(b"nothing")
    with warnings.catch_warnings(), pytest.raises(FileNotFoundError, match="no checkpoint in"):
        warnings.simplefilter("ignore")
        recipes.find_checkpoint("jit_digits", "last")


def test_what_a_killed_writer_left_is_swept_and_accumulation_resumes_between_steps(tmp_path, monkeypatch):
    """The first batch after a resume belongs to a step that is not taken yet: nothing may be saved after it."""
    accumulate = [*STEPS, "--trainer.accumulate_grad_batches=2", "--trainer.max_steps=3"]
    saved = []
    with chdir(tmp_path):
        with pytest.raises(SystemExit):
            train("jit_digits", *accumulate, option(1))
        folder = recipes.find_checkpoint("jit_digits", "last").parent
        (folder / ".step=0000009.ckpt.partial").write_bytes(b"half")
        write = main.LatestCheckpoint._save

        def noted(self, trainer, candidates):
            saved.append((trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.total.ready))
            write(self, trainer, candidates)

        monkeypatch.setattr(main.LatestCheckpoint, "_save", noted)
        train("jit_digits", *accumulate, "--ckpt=last")
        assert saved == [(3, 6)] and [path.name for path in folder.glob("[!.]*")] == ["step=0000003.ckpt"]
        assert not list(folder.glob(".*.partial"))
        resumed = recipes.find_checkpoint("jit_digits", "last").resolve()
    (tmp_path / "whole").mkdir()
    with chdir(tmp_path / "whole"):
        train("jit_digits", *accumulate)
        expected, actual = (read_torch(path)["callbacks"]["EMA"]["shadows"][0] for path in (newest(), resumed))
        assert [name for name, tensor in expected.items() if not torch.equal(tensor, actual[name])] == []


@pytest.mark.parametrize(("where", "equal"), [("batch_end", True), ("validation", False)])
def test_a_run_that_is_told_to_stop_saves_its_last_step(where, equal, unbroken, tmp_path, monkeypatch):
    """By trainer.max_time, or a callback. What is said in validation comes too late for a file within the epoch."""
    monkeypatch.chdir(tmp_path)
    train("jit_digits", *STEPS, "--checkpoint.every_n_train_steps=100", option(2, 0, where))
    assert read_torch(newest())["global_step"] == 2
    resumed = train("jit_digits", *STEPS, "--ckpt=last")
    assert resumed.trainer.global_step == 4 and (same(newest(), unbroken) or not equal)


def test_a_checkpoint_does_not_say_what_is_removed(unbroken, tmp_path, monkeypatch):
    """Lightning's remembers a path, and removes whatever lies there, recursively, at the next save."""
    monkeypatch.chdir(tmp_path)
    Path("victim").mkdir()
    (tmp_path / "victim/step=1.ckpt").touch()
    for victim in (f"local://{tmp_path}/victim", str(tmp_path / "victim/step=1.ckpt")):
        content = read_torch(unbroken)
        (name,) = (key for key in content["callbacks"] if key.startswith("LatestCheckpoint"))
        content["callbacks"][name]["best_model_path"] = victim
        torch.save(content, "other.ckpt")
        train("jit_digits", *STEPS, "--trainer.max_steps=5", "--ckpt=other.ckpt")
        assert Path("victim/step=1.ckpt").exists() and Path("other.ckpt").exists()


def test_runs_without_a_logger_go_on_and_a_trial_saves_nothing(unbroken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train("jit_digits", *STEPS, "--trainer.fast_dev_run=true")
    assert not [path for path in Path("runs").rglob("*") if path.suffix != ".png" and path.is_file()]
    train("jit_digits", *STEPS, "--trainer.logger=false", "--trainer.max_steps=2")
    Path("linked.ckpt").symlink_to(newest())
    train("jit_digits", *STEPS, "--trainer.logger=false", "--ckpt=linked.ckpt")
    (last,) = Path("runs/jit_digits/checkpoints").glob("*.ckpt")
    assert newest() == last and same(last, unbroken)


def test_only_a_run_that_trains_changes_its_configuration(unbroken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train("jit_digits", *STEPS, "--trainer.max_steps=2")
    (file,) = Path("runs/jit_digits").glob("*/config.yaml")
    written = file.read_text()
    assert "max_steps: 2" in written
    main.cli(["validate", "--exp", "jit_digits", *shrunken("jit_digits"), "--ckpt=last", "--trainer.max_steps=3"])
    content, path = read_torch(newest()), newest()
    content["state_dict"].popitem()
    path.unlink()  # what was read of it is mapped
    torch.save(content, path)
    with pytest.raises((ValueError, RuntimeError)):
        train("jit_digits", *STEPS, "--ckpt=last")
    assert file.read_text() == written


def newest() -> Path:
    return recipes.find_checkpoint("jit_digits", "last")


def test_a_job_whose_checkpoints_are_all_damaged_does_not_begin_anew(job, unbroken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["fit", "--exp", "jit_digits", "--ckpt", str(unbroken)]
    folder = Path("runs/jit_digits") / resumed(line)["--trainer.logger.init_args.version"]
    own = folder / "checkpoints/step=0000003.ckpt"
    own.parent.mkdir(parents=True)
    own.write_bytes(unbroken.read_bytes()[:1000])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"of the 1 checkpoints in .* none is whole"):
        warnings.simplefilter("ignore")
        expand(line)


def test_a_signal_while_the_data_is_made_ready_saves_and_says_so(tmp_path, monkeypatch, capsys):
    send_when_data_is_made_ready(signal.SIGTERM, monkeypatch)
    with chdir(tmp_path), pytest.raises(SystemExit) as ended:
        train("jit_digits", *STEPS)
    assert ended.value.code == 128 + signal.SIGTERM
    assert "SIGTERM at step 1: saved" in capsys.readouterr().out


def test_two_processes_do_not_train_in_one_folder(unbroken, tmp_path):
    version = tmp_path / "runs/jit_digits/version_0"
    (version / "checkpoints").mkdir(parents=True)
    file = version / "checkpoints" / unbroken.name
    file.write_bytes(unbroken.read_bytes())
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(file.parent / LOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with chdir(tmp_path), pytest.raises(ValueError, match="another process is training"):
            train("jit_digits", *STEPS, "--ckpt=last", "--trainer.max_steps=6")
        other.communicate(b"\n")
    assert file.exists()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda content: content.pop("pytorch-lightning_version"), "no pytorch-lightning_version"),
        (lambda content: content.update(optimizer_states=[]), "no optimizer_states"),
        (lambda content: content["loops"].update(fit_loop={}), "no loops"),
        (lambda content: content["loops"].update(fit_loop=None), "no loops"),
        (lambda content: content.update(epoch="x"), "no epoch"),
        (lambda content: content["callbacks"]["EMA"].update(shadows=["x"] * 2), "has no average of"),
        (lambda content: content["callbacks"]["EMA"]["shadows"][0].popitem(), "has no average of"),
    ],
)
def test_a_checkpoint_that_lacks_what_a_run_goes_on_with_is_named(spoil, named, unbroken, tmp_path):
    content = read_torch(unbroken)
    spoil(content)
    torch.save(content, tmp_path / "odd.ckpt")
    with chdir(tmp_path), pytest.raises(ValueError, match=named):
        train("jit_digits", *STEPS, "--ckpt=odd.ckpt")
