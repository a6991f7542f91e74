"""Recipes at smoke size, trained one after another by one process or by several, through the real command line.

`python -m tests.processes EXPERIMENT... [-- OVERRIDE...]` in a folder of its own; `train` calls it and reads what came
of it. One start serves all recipes: Lightning's launcher starts the other processes at the first.
"""

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from experiments import main, recipes
from experiments.load import find_class, instantiate, load_config
from lightning_modules.weights import read_torch
from tests import smoke

ROOT = Path(__file__).parents[1]
SHARDED, OPTIONS = "lightning_modules.sharding.ShardedStrategy", "--trainer.strategy.init_args"
STRATEGIES = {
    "one": [],
    "ddp": ["--trainer.devices=2", "--trainer.strategy=ddp"],
    "fsdp2": ["--trainer.devices=2", "--trainer.strategy=fsdp2"],
    "kept": ["--trainer.devices=2", f"--trainer.strategy={SHARDED}", f"{OPTIONS}.reshard_after_forward=false"],
    "groups": ["--trainer.devices=4", f"--trainer.strategy={SHARDED}", f"{OPTIONS}.shard_size=2"],
}
VAL_ROWS = 5  # two processes get three and two of them, in batches of two: one has a batch more


class Run(NamedTuple):
    """What a training left behind: curves by tag, the last checkpoint, and the files of the run's folder."""

    curves: dict[str, list[float]]
    checkpoint: dict[str, Any]
    files: list[str]

    def tensors(self) -> dict[str, Tensor]:
        """Of the checkpoint: weights, averages and the optimiser's moments."""
        found = {f"raw.{name}": tensor for name, tensor in self.checkpoint["state_dict"].items()}
        for i, shadow in enumerate(self.checkpoint["callbacks"]["EMA"]["shadows"]):
            found |= {f"ema{i}.{name}": tensor for name, tensor in shadow.items()}
        for i, state in self.checkpoint["optimizer_states"][0]["state"].items():
            found |= {f"optimizer{i}.{name}": torch.as_tensor(value) for name, value in state.items()}
        return found


def train(folder: Path, strategy: str, experiments: Sequence[str], *overrides: str) -> list[Run]:
    """Train each recipe in `folder`, which may hold runs to go on from; `overrides` follow the recipe's."""
    folder.mkdir(exist_ok=True)
    line = [sys.executable, "-m", "tests.processes", *experiments, "--", *STRATEGIES[strategy], *overrides]
    if strategy == "one":  # here, which saves a start
        with chdir(folder):
            run(experiments, overrides)
        return [result(folder, experiment) for experiment in experiments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [result(folder, experiment) for experiment in experiments]


def result(folder: Path, experiment: str) -> Run:
    """Of the one run that there is of a recipe."""
    (run,) = (folder / recipes.RUNS / experiment).iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    curves = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    (checkpoint,) = run.glob("checkpoints/*.ckpt")
    files = sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    files = [name.split(".tfevents.")[0] for name in files]  # the rest of that name is time and process
    return Run(curves, read_torch(checkpoint), files)


def steps(count: int) -> list[str]:
    """Overrides for a run of so many steps that logs each, and validates, draws and saves halfway and at the end."""
    half = count // 2
    return [
        f"--trainer.max_steps={count}",
        f"--trainer.val_check_interval={half}",
        "--trainer.limit_val_batches=1.0",
        "--trainer.enable_progress_bar=false",
        f"--samples.every_n_steps={half}",
        f"--checkpoint.every_n_train_steps={half}",
    ]


def shrunken(experiment: str) -> list[str]:
    """The recipe at smoke size, without dropout, which is each process's own, and with uneven validation rows."""
    overrides = [f"{key}={value}" for key, value in smoke.tiny(experiment).items()]
    config = load_config(experiment, overrides, overlays=[smoke.SMOKE])
    arguments = inspect.signature(find_class(config["data"]["class_path"], "data")).parameters
    rows = [f"--data.init_args.val_length={VAL_ROWS}"] if "val_length" in arguments else []
    module = instantiate(config["model"], "model")
    return [*smoke.shrunken(experiment), *rows, *(f"--model.init_args.{key}=0" for key in dropouts(module.hparams))]


def dropouts(arguments: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Keys of arguments that are rates of dropout."""
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            yield from dropouts(value, f"{prefix}{name}.")
        elif name.endswith("dropout") and value:
            yield f"{prefix}{name}"


def run(experiments: Sequence[str], overrides: Sequence[str]) -> None:
    """Train these recipes, one after another."""
    for experiment in experiments:
        main.cli(["fit", "--exp", experiment, *shrunken(experiment), *overrides])


if __name__ == "__main__":
    cut = sys.argv.index("--")
    main.quiet()
    run(sys.argv[1:cut], sys.argv[cut + 1 :])
