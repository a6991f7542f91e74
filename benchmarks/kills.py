"""Kills training at random moments, resumes it, and holds it against a run that nobody disturbed, bit for bit.

    python -m benchmarks.kills --kills 200 --seed 0 [--exp jit_digits,mar_digits]

Recipes are shrunken as by `make smoke` and trained through the real command line. A run is killed (SIGKILL, one time
in four SIGTERM), resumed with CKPT=last, killed again, until it comes to its end; then the next run of the recipe
begins. After each kill every checkpoint must be whole, none may be lost, and the newest must equal what the undisturbed
run held at that step: weights, averages, optimiser, schedule and position in the data. So must the end of each run.
Exit code 1 if anything of this fails; the folder of such a run is kept.

All starts are forks of one process that has imported everything, so that a kill costs about two seconds of one core.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.utils.tensorboard  # by the parent, for all its forks

from experiments import main, recipes
from experiments.errors import one_line_errors
from experiments.load import find_class, load_config
from lightning_modules.callbacks.checkpoint import PARTIAL, AtomicCheckpointIO
from lightning_modules.weights import check_whole, read_torch
from tests.smoke import SMOKE, shrunken

OFFLINE = ("digits", "shapes", "openmoji", "photos", "synthetic")  # last words of recipes that need no download
STEPS, SAVE_EVERY = 24, 3
SHARE_TERM, SHARE_EARLY = 1 / 4, 1 / 8  # of kills that are SIGTERM; that fall before the first step
OVERSHOOT = 1.15  # moments reach beyond the expected end, so that runs come to theirs
LINE = [
    f"--trainer.max_steps={STEPS}",
    "--trainer.val_check_interval=8",
    "--trainer.enable_progress_bar=false",
    "--samples.every_n_steps=12",
]
BEGUN = b" parameters, steps "  # what a run prints when its first step begins (callbacks/report.py)
PATIENCE = 600.0  # seconds for anything to happen


@dataclass
class Tally:
    """What came of the kills of one recipe."""

    kills: int = 0
    sigterm: int = 0
    early: int = 0  # before the first step of a start
    writing: int = 0  # while a checkpoint was being written
    runs: int = 0
    corrupt: int = 0
    lost: int = 0
    unequal: int = 0  # resumes whose next state differs
    cpu: float = 0.0  # seconds, of all starts

    def row(self) -> list[str]:
        return [f"{value:.0f}" for value in (getattr(self, field.name) for field in fields(self))]


class Start:
    """One start of training, in a process of its own."""

    def __init__(self, experiment: str, overrides: list[str], folder: Path, *, keep_all: bool = False) -> None:
        self.log, self.code, self.cpu = folder / "log", None, 0.0
        self.log.touch()
        self.offset = self.log.stat().st_size
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _train(experiment, overrides, folder, keep_all=keep_all)

    def ended(self, *, wait: bool = False) -> bool:
        """Whether the process is gone; its exit code, negative for a signal, is then `code`."""
        if self.code is None:
            pid, status, usage = os.wait4(self.pid, 0 if wait else os.WNOHANG)
            if pid:
                self.code, self.cpu = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        return self.code is not None

    def until(self, seconds: float, *, begun: bool = False) -> bool:
        """Wait so long, or until training has begun; False if the process ended before."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not (begun and BEGUN in self.log.read_bytes()[self.offset :]):
            if self.ended():
                return False
            time.sleep(0.005)
        return not self.ended()

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)
        self.ended(wait=True)


def _train(experiment: str, overrides: list[str], folder: Path, *, keep_all: bool) -> None:
    """The child: a line of training in `folder`, resumed if there is a checkpoint; never returns."""
    code = 1
    try:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        if keep_all:
            AtomicCheckpointIO.remove_checkpoint = lambda self, path: None
        resume = ["--ckpt=last"] if checkpoints(folder) else []
        main.cli(["fit", "--exp", experiment, *overrides, *resume])
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def checkpoints(folder: Path) -> list[Path]:
    """All of a folder's, the newest last."""
    return sorted(folder.glob("runs/*/*/checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def state(path: Path) -> dict[str, Any]:
    """What must be equal, flat: tensors and values by their place in the file."""
    content = read_torch(path)
    loader = content["loops"]["fit_loop"]["state_dict"]
    kept = {name: content[name] for name in ("global_step", "state_dict", "optimizer_states", "lr_schedulers")}
    return dict(_flat(kept | {"EMA": content["callbacks"]["EMA"], "loader": loader}))


def _flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    if not items:
        yield place, value
    for key, inner in items:
        yield from _flat(inner, f"{place}.{key}" if place else str(key))


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Places at which two states are not the same to the last bit."""
    missing = object()
    return [key for key in {**one, **other} if not _same(one.get(key, missing), other.get(key, missing))]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


class Recipe:
    """A recipe, its undisturbed run, and what kills do to others."""

    def __init__(self, experiment: str, folder: Path, seed: int) -> None:
        self.experiment, self.folder, self.tally = experiment, folder, Tally()
        self.random = random.Random(f"{seed} {experiment}")
        self.overrides = [*shrunken(experiment), *LINE]
        config = load_config(experiment, [word[2:] for word in self.overrides[1:]], overlays=[SMOKE])
        for part in ("model", "data"):
            find_class(config[part]["class_path"], part)  # imported by the parent
        self.startup, self.step_time = self._undisturbed()

    def _undisturbed(self) -> tuple[float, float]:
        """Train once, keeping the checkpoint of every step; seconds until the first step, and of a step."""
        folder, begin = self._new_folder("undisturbed"), time.monotonic()
        start = Start(self.experiment, [*self.overrides, "--checkpoint.every_n_train_steps=1"], folder, keep_all=True)
        start.until(PATIENCE, begun=True)
        begun = time.monotonic()
        start.ended(wait=True)
        if start.code:
            raise ValueError(f"{self.experiment} fails undisturbed: {start.log.read_text()[-2000:]}")
        self.expected = {content["global_step"]: content for content in map(state, checkpoints(folder))}
        shutil.rmtree(folder)
        return begun - begin, (time.monotonic() - begun) / STEPS

    def _new_folder(self, name: str) -> Path:
        path = self.folder / f"{self.experiment}_{name}"
        path.mkdir(parents=True)
        return path

    def kill(self, times: int) -> Tally:
        """Runs of the recipe until it was killed so often; each run goes on to its end."""
        while self.tally.kills < times:
            self.tally.runs += 1
            folder = self._new_folder(f"run{self.tally.runs}")
            if self._run(folder, times):
                shutil.rmtree(folder)
            else:
                print(f"{self.experiment}: look at {folder}", flush=True)
        return self.tally

    def _run(self, folder: Path, times: int) -> bool:
        """One run with its kills and resumes; whether all went well."""
        known, resumed = 0, False
        while True:
            start = Start(self.experiment, [*self.overrides, f"--checkpoint.every_n_train_steps={SAVE_EVERY}"], folder)
            killed = self.tally.kills < times and self._kill(start, known)
            start.ended(wait=True)
            self.tally.cpu += start.cpu
            if not killed and start.code:
                raise ValueError(f"a start of {self.experiment} failed: {start.log.read_text()[-2000:]}")
            step = self._inspect(folder, known, resumed)
            if step is None or not killed:
                return step == STEPS
            known, resumed = step, True

    def _kill(self, start: Start, known: int) -> bool:
        """Kill at a random moment of what is left of the run; False if it ended before."""
        early, number = self.random.random() < SHARE_EARLY, signal.SIGKILL
        if self.random.random() < SHARE_TERM:
            number = signal.SIGTERM
        left = self.startup if early else self.step_time * (STEPS - known)
        moment = self.random.uniform(0, left * OVERSHOOT)
        if not early:
            start.until(PATIENCE, begun=True)
        begun = time.monotonic()
        if not start.until(moment):
            if not early and known < STEPS:
                self.step_time = (time.monotonic() - begun) / (STEPS - known)
            return False
        start.kill(number)
        if start.code == 0:  # SIGTERM after the last step
            return False
        self.tally.kills += 1
        self.tally.sigterm += number == signal.SIGTERM
        self.tally.early += BEGUN not in start.log.read_bytes()[start.offset :]
        return True

    def _inspect(self, folder: Path, known: int, resumed: bool) -> int | None:
        """Step of the newest checkpoint (0: none yet); None if one is corrupt, lost or not as it should be."""
        self.tally.writing += bool(list(folder.glob(f"runs/*/*/checkpoints/.*{PARTIAL}")))
        found = checkpoints(folder)
        for path in found:
            try:
                check_whole(path)
            except ValueError as error:
                print(error)
                self.tally.corrupt += 1
                return None
        newest = state(found[-1]) if found else {"global_step": 0}
        step = newest["global_step"]
        if step < known:
            print(f"{self.experiment}: a checkpoint of step {known} was there, now the newest is of {step}")
            self.tally.lost += 1
            return None
        if found and (places := differences(newest, self.expected[step])):
            print(f"{self.experiment} differs at step {step} in {', '.join(places[:5])}")
            self.tally.unequal += resumed
            return None
        return step


def run(options: argparse.Namespace) -> bool:
    """All recipes in turn, a row for each; whether nothing was corrupt, lost or unequal."""
    chosen = options.exp.split(",") if options.exp else [n for n in recipes.names() if n.split("_")[-1] in OFFLINE]
    folder = Path(tempfile.mkdtemp(prefix="kills_"))
    names, total = [field.name for field in fields(Tally)], Tally()
    print(f"{options.kills} kills, seed {options.seed}, {len(chosen)} recipes, in {folder}\n")
    print(f"{'recipe':<22}" + "".join(f"{name:>9}" for name in names), flush=True)
    for i, experiment in enumerate(chosen):
        share = options.kills // len(chosen) + (i < options.kills % len(chosen))
        tally = Recipe(experiment, folder, options.seed).kill(share)
        for name in names:
            setattr(total, name, getattr(total, name) + getattr(tally, name))
        print(f"{experiment:<22}" + "".join(f"{value:>9}" for value in tally.row()), flush=True)
    print(f"{'all':<22}" + "".join(f"{value:>9}" for value in total.row()))
    bad = total.corrupt + total.lost + total.unequal
    equal = total.kills - total.unequal
    print(
        f"\n{total.kills} kills: {total.corrupt} corrupt and {total.lost} lost checkpoints, {equal} resumes equal to "
        f"the undisturbed run; {total.cpu / max(1, total.kills):.1f} CPU-seconds a kill"
    )
    if not bad:
        shutil.rmtree(folder)
    return not bad


@one_line_errors
def start() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="of all recipes together")
    parser.add_argument("--exp", default="", help="recipes, by commas (default: all that need no download)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    options = parser.parse_args()
    if options.kills < 1:
        raise ValueError(f"--kills is {options.kills}: give at least 1")
    main.quiet()
    torch.set_num_threads(1)
    sys.exit(not run(options))


if __name__ == "__main__":
    start()
