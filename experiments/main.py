"""The one entry point for training: `python -m experiments.main fit --exp jit_digits [LightningCLI overrides]`.

`--exp NAME` becomes the recipe's files, `--ckpt last|PATH` a checkpoint to resume, `--official PATH` weights to start
from. What follows is plain LightningCLI; `make train` calls this. Files and options can name classes of this project
and of Lightning alone, unless the line has `--trust-config`: naming a class is importing it, and so running code.
"""

import logging
import re
import sys
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from datamodules.base import BatchData
from experiments import recipes
from experiments.errors import ArgumentError, one_line_errors
from experiments.keys import check_keys
from experiments.load import PACKAGES, TRUST, class_paths, find_class, instantiate, load_config, read_config, untrusted
from lightning_modules.base import GenerativeModule
from lightning_modules.callbacks import slurm
from lightning_modules.callbacks.checkpoint import AtomicCheckpointIO, LatestCheckpoint, MilestoneCheckpoint
from lightning_modules.callbacks.ema import EMA
from lightning_modules.callbacks.fid import FID
from lightning_modules.callbacks.guard import Guard
from lightning_modules.callbacks.progress import StepProgressBar
from lightning_modules.callbacks.report import Report
from lightning_modules.callbacks.samples import SampleGrid
from lightning_modules.callbacks.throughput import Throughput
from lightning_modules.weights import check_resumable, read_torch

# Registered by name, so that each merges like any other section. The averages come first: whoever follows may sample.
CALLBACKS = {
    "ema": EMA,
    "throughput": Throughput,
    "samples": SampleGrid,
    "fid": FID,
    "guard": Guard,
    "report": Report,
    "milestones": MilestoneCheckpoint,
    "checkpoint": LatestCheckpoint,
}
COMMANDS = ("fit", "validate")
SECTIONS = {"trainer": L.Trainer, **CALLBACKS}


class Parser(LightningArgumentParser):
    """What it dumps is what it has parsed, so it is not validated again: a third of a second of each start."""

    def dump(self, *args: Any, **kwargs: Any) -> str:
        if "skip_none" in kwargs:  # as Lightning says it, of which jsonargparse 4.53 warns
            kwargs["skip_unset"] = kwargs.pop("skip_none")
        return super().dump(*args, **{**kwargs, "skip_validation": True})


class SaveConfig(SaveConfigCallback):
    """Writes a run's config.yaml once it trains: a command that does not, or that is refused, changes none."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")


class CLI(LightningCLI):
    """LightningCLI over the recipes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("args")
        self.line: list[str] = list(sys.argv[1:] if given is None else given)
        super().__init__(*args, parser_class=Parser, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        # an abbreviated key would be taken for the one that it begins, where a mistyped one should be an error
        return super().init_parser(exit_on_error=False, allow_abbrev=False, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:
        """Training, and the validation loss of a checkpoint; sampling is experiments/sample.py.

        Only the one that the line asks for, if it is one of them: a parser of each takes a while to build.
        """
        asked = [self.line[0]] if self.line and self.line[0] in COMMANDS else COMMANDS
        return {name: LightningCLI.subcommands()[name] for name in asked}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, name)

    def parse_arguments(self, parser: LightningArgumentParser, args: Sequence[str] | None) -> None:
        from jsonargparse import set_parsing_settings

        trusted = TRUST in self.line
        if not trusted:  # for the rest of the process: objects are made after parsing, by the same names
            set_parsing_settings(
                import_path_denylist=["*"],
                import_path_allowlist=list(PACKAGES),
                instantiate_subclass_spec_in_any=False,
            )
        try:
            self.config = parser.parse_args([word for word in self.line if word != TRUST])
        except ArgumentError as error:
            if denied := re.search(r"Importing '([^']*)' is not allowed", str(error)):
                raise ValueError(f"the configuration names {untrusted(denied[1])}") from error
            raise
        for class_path in () if trusted else class_paths(self.config.as_dict()):
            find_class(class_path, "configuration")  # classes alone: a function can do anything, and is called

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        _write_atomically(trainer)
        trainer.callbacks = [StepProgressBar() if type(c) is RichProgressBar else c for c in trainer.callbacks]
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would let hyper-parameters stored in the checkpoint beat the YAML and the command line."""


def _write_atomically(trainer: L.Trainer) -> None:
    """Checkpoints are written whole and read safely, also where trainer.plugins was replaced by a list without that.

    Raises ValueError for a plugin that would write or read them otherwise: Lightning's reads pickles if told to.
    """
    given = trainer._accelerator_connector.checkpoint_io
    if given is not None and not isinstance(given, AtomicCheckpointIO):
        raise ValueError(
            f"trainer.plugins has {type(given).__name__}, which writes and reads checkpoints otherwise than this "
            f"project does (whole files, tensors and plain values alone): leave it out"
        )
    if given is None:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


def expand(argv: Sequence[str]) -> list[str]:
    """Replace --exp, --ckpt and --official by what LightningCLI knows. Without --exp the line is left as it is.

    Processes of a distributed run are started again with the expanded line, so expanding twice must change nothing.
    """
    argv = [_long(word) for word in argv]
    experiment = _take(argv, "--exp")
    if experiment is None:
        return argv
    job = slurm.run_name(argv) if argv[:1] == ["fit"] else None
    checkpoint, official = _take(argv, "--ckpt"), _take(argv, "--official")
    line = [f"--config={path}" for path in recipes.files(experiment)]
    line += [f"--trainer.default_root_dir={recipes.RUNS / experiment}", f"--trainer.logger.init_args.name={experiment}"]
    line += [f"--report.experiment={experiment}"]
    line += _resumed(experiment, checkpoint, job)
    if official:
        line += [f"--model.init_args.init_from={official}"]
    config = load_config(experiment, overlays=_overlays(argv), trusted=TRUST in argv)
    for value in (word.partition("=")[2] for word in _joined(argv)):
        if Path(value).suffix in (".yaml", ".yml") and Path(value).is_file():  # --trainer=FILE, --model=FILE
            read_config(Path(value), trusted=TRUST in argv)
    check_keys([word for word in argv if word.startswith("--")], config, SECTIONS)
    line += match_classes(experiment, argv)
    commands = argv[:1] if argv and not argv[0].startswith("-") else []
    return commands + line + [_null_inside(word) for word in argv[len(commands) :]]


def _resumed(experiment: str, wanted: str | None, job: str | None) -> list[str]:
    """Options that make a run go on from a checkpoint, in the folder of its run.

    `job`: the folder that this line has in a job of SLURM. One that was requeued goes on with what it had begun, also
    where the line says what to begin from; its folder is new, unless the same line ran in the same job before.
    """
    folder = recipes.RUNS / experiment / (job or "")
    if job and folder.exists() and not slurm.was_requeued():
        job = None
    saved = list(folder.glob("checkpoints/*.ckpt")) if job else []
    path = recipes.newest_whole(saved)
    if saved and path is None:
        raise ValueError(
            f"of the {len(saved)} checkpoints in '{folder}' none is whole, so the job does not go on, nor begins anew: "
            f"submit it with another CKPT=, or remove that folder"
        )
    if path is None and wanted:
        path = recipes.find_checkpoint(experiment, wanted)
        check_resumable(read_torch(path), path)
    version = job or (path and recipes.run_version(path, experiment))
    options = {"--ckpt_path": path, "--trainer.logger.init_args.version": version}
    return [f"{name}={value}" for name, value in options.items() if value]


def match_classes(experiment: str, argv: Sequence[str]) -> list[str]:
    """Overrides that make the model fit the classes of other data than the recipe's, where the line does not say.

    So a folder of one's own needs no more than its name. One class means no condition: nothing to drop or to guide.
    """
    words = _joined(argv)
    changed = any(word.startswith("--data") for word in words)
    if not changed or any(word.startswith("--model") and "num_classes" in word for word in words):
        return []
    words = [
        re.sub(r"^--(data|model)=(?!\{)", r"--\1.class_path=", word)
        for word in words
        if not word.startswith("--config=")
    ]
    trusted = TRUST in argv
    config = load_config(experiment, words, overlays=_overlays(argv), trusted=trusted)
    data = instantiate(config["data"], "data", trusted=trusted)
    found = data.discover_classes() if isinstance(data, BatchData) else None
    if found is None or found == config["model"]["init_args"]["num_classes"]:
        return []
    changes = [f"num_classes={found}"]
    if found == 1 and not config["model"]["init_args"].get("text"):  # captions condition where one class cannot
        module = find_class(config["model"]["class_path"], "model", trusted=trusted)
        given = [word.partition("=")[0] for word in words]
        changes += [c for c in module.UNCONDITIONAL if f"--model.init_args.{c.partition('=')[0]}" not in given]
    print(
        f"the data has {found} class{'es' if found > 1 else ''}: {' '.join(f'--model.init_args.{c}' for c in changes)}"
    )
    return [f"--model.init_args.{change}" for change in changes]


def _null_inside(word: str) -> str:
    """--model.init_args.optim.blr=null as --model.init_args.optim={blr: null}, which is the same and which jsonargparse
    4.53 can read: it takes a null inside a dataclass for the text "null"."""
    match = re.fullmatch(r"(--(?:model|data)\.init_args(?:\.\w+)*\.(?!init_args\b)\w+)\.(\w+)=null", word)
    return f"{match[1]}={{{match[2]}: null}}" if match else word


def _long(word: str) -> str:
    """-c FILE, -cFILE and -c=FILE, LightningCLI's other names for --config."""
    if not re.match("-c", word):
        return word
    file = word[2:].removeprefix("=")
    return f"--config={file}" if file else "--config"


def _overlays(argv: Sequence[str]) -> list[Path]:
    """Files that the line itself adds: --config=FILE or --config FILE."""
    pairs = pairwise([*argv, ""])
    paths = [
        Path(word.partition("=")[2] or following) for word, following in pairs if word.partition("=")[0] == "--config"
    ]
    return [path for path in paths if path.is_file()]  # the parser reports the others


def _joined(argv: Sequence[str]) -> list[str]:
    """The options of a line as --key=value, also where it has --key value."""
    pairs = pairwise([*argv, "--"])
    joined = [word if "=" in word or following.startswith("--") else f"{word}={following}" for word, following in pairs]
    return [word for word in joined if word.startswith("--") and "=" in word]


def _take(argv: list[str], flag: str) -> str | None:
    """Remove `flag VALUE` or `flag=VALUE` from the line; its value, None if absent.

    Raises ValueError for an empty one: without the checkpoint that was meant, a run would begin from scratch.
    """
    for i, word in enumerate(argv):
        name, separator, value = word.partition("=")
        if name == flag:
            value = value if separator else "".join(argv[i + 1 : i + 2])
            if not value:
                raise ValueError(f"{flag} needs a value, or is to be left out")
            del argv[i : i + (1 if separator else 2)]
            return value
    return None


def cli(argv: Sequence[str] | None = None, *, run: bool = True) -> CLI:
    """Parse a line and, with `run`, do it. `run=False` only builds model, data and trainer (no subcommand then)."""
    return CLI(
        GenerativeModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        args=None if argv is None else expand(argv),
        run=run,
    )


def quiet() -> None:
    """Silence remarks of libraries that a user of the recipes can do nothing about."""
    for remark in (
        ".*does not have many workers.*",  # the offline sets need none
        ".*number of training batches.*smaller than the logging interval.*",
        ".*You have overridden `on_before_batch_transfer` in `LightningModule`.*",  # labels are checked there
        ".*isinstance.treespec, LeafSpec.*",
        ".*It is recommended to use `self.log.*sync_dist=True.*",  # ours are sums over processes already
        ".*Checkpoint directory .* exists and is not empty.*",  # resumed runs go on in their own folder
    ):
        warnings.filterwarnings("ignore", remark)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.msg)


@one_line_errors
def main() -> None:
    quiet()
    sys.argv[1:] = expand(sys.argv[1:])
    cli()


if __name__ == "__main__":
    main()
