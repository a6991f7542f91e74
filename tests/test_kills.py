"""The script that kills training: it sees what is corrupt, lost or unequal, and a few real kills leave nothing so."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import kills
from lightning_modules.callbacks.checkpoint import AtomicCheckpointIO

ROOT = Path(__file__).parents[1]


def content(step: int, weight: float = 1.0) -> dict:
    """A checkpoint as far as it is looked at."""
    return {
        "global_step": step,
        "state_dict": {"w": torch.tensor([weight, 2.0])},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "lr_schedulers": [{"last_epoch": step}],
        "callbacks": {"EMA": {"decays": [0.5], "shadows": [{"w": torch.zeros(2)}]}},
        "loops": {"fit_loop": {"state_dict": {"combined_loader": [{"epoch": 0, "done": step}]}}},
    }


def save(folder, step: int, weight: float = 1.0):
    path = folder / "runs" / "jit_digits" / "version_0" / "checkpoints" / f"step={step}.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(step, weight), path)
    return path


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe whose undisturbed run was not trained: steps 3 and 6 as `content` has them."""
    monkeypatch.setattr(kills.Recipe, "_undisturbed", lambda self: (1.0, 1.0))
    built = kills.Recipe("jit_digits", tmp_path / "recipe", 0)
    built.expected = {step: kills.state(save(tmp_path / "expected", step)) for step in (3, 6)}
    shutil.rmtree(tmp_path / "expected")
    return built


def test_a_checkpoint_as_it_should_be_is_the_step_to_go_on_from(recipe, tmp_path):
    assert recipe._inspect(tmp_path, 0, False) == 0, "killed before the first was saved"
    save(tmp_path, 3)
    assert recipe._inspect(tmp_path, 0, False) == 3
    assert recipe.tally == kills.Tally()


def test_what_is_corrupt_lost_or_unequal_is_counted(recipe, tmp_path, capsys):
    path = save(tmp_path, 3)
    assert recipe._inspect(tmp_path, 6, True) is None and recipe.tally.lost == 1
    assert "a checkpoint of step 6 was there, now the newest is of 3" in capsys.readouterr().out
    save(tmp_path, 3, weight=1.0 + 2**-20)
    assert recipe._inspect(tmp_path, 0, True) is None and recipe.tally.unequal == 1
    assert "differs at step 3 in state_dict.w" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-9])
    assert recipe._inspect(tmp_path, 0, True) is None and recipe.tally.corrupt == 1
    (path.parent / ".step=6.ckpt.partial").touch()
    recipe._inspect(tmp_path, 0, True)
    assert recipe.tally.writing == 1


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("EMA.shadows.0.w", lambda c: c["callbacks"]["EMA"]["shadows"][0]["w"].add_(1)),
        ("optimizer_states.0.state.0.exp_avg", lambda c: c["optimizer_states"][0]["state"][0]["exp_avg"].mul_(2)),
        ("optimizer_states.0.param_groups.0.lr", lambda c: c["optimizer_states"][0]["param_groups"][0].update(lr=0.2)),
        ("lr_schedulers.0.last_epoch", lambda c: c["lr_schedulers"][0].update(last_epoch=9)),
        ("loader.combined_loader.0.done", lambda c: c["loops"]["fit_loop"]["state_dict"]["combined_loader"][0].clear()),
        ("state_dict.w", lambda c: c["state_dict"].update(w=c["state_dict"]["w"].double())),
        ("state_dict.v", lambda c: c["state_dict"].update(v=torch.ones(1))),
    ],
)
def test_every_part_of_the_state_is_compared(place, change, monkeypatch):
    changed = content(3)
    change(changed)
    files = {"one": content(3), "other": changed}
    monkeypatch.setattr(kills, "read_torch", files.__getitem__)
    found = kills.differences(kills.state("one"), kills.state("other"))
    assert place in found and kills.differences(kills.state("one"), kills.state("one")) == []


def test_a_start_that_fails_ends_the_script_with_its_log(recipe, tmp_path, monkeypatch):
    failed = SimpleNamespace(code=1, cpu=0.0, log=tmp_path / "log", ended=lambda wait: True)
    failed.log.write_text("no such thing")
    monkeypatch.setattr(kills, "Start", lambda *arguments: failed)
    recipe.tally.kills = 1
    with pytest.raises(ValueError, match=r"(?s)a start of jit_digits failed: .*no such thing"):
        recipe._run(tmp_path, 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_of_a_real_run(tmp_path):
    line = [sys.executable, "-m", "benchmarks.kills", "--kills", "3", "--exp", "jit_digits"]
    environment = os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 kills: 0 corrupt and 0 lost checkpoints, 3 resumes equal" in done.stdout
    assert not list(tmp_path.glob("kills_*"))
