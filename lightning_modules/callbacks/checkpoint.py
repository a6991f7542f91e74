"""Checkpoints that are whole or absent, whatever happens while one is written."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_modules.paths import shown
from lightning_modules.weights import check_bytes, existing, is_zip, read_torch, readable

LOCK = ".lock"  # in the folder of a run's checkpoints: held while it trains
PARTIAL = ".partial"  # suffix of a file that is being written, or was when its process was killed


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, reads back, then renames: a kill at any moment leaves the old file or
    the new, and no file is replaced by one that cannot be loaded.

    Lightning's own writer goes through a temporary file that may lie on another disk, where a move is a copy.
    """

    def __init__(self) -> None:
        self._loads = False
        self._keeps = False
        self.failure: Exception | None = None

    @contextmanager
    def keeping_failures(self) -> Iterator[None]:
        """Inside, what goes wrong is kept as `failure` and not raised."""
        self._keeps, self.failure = True, None
        try:
            yield
        finally:
            self._keeps = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises OSError for a disk that is full or fails, and ValueError for a file that reads back otherwise than it
        was written; then nothing is left of it, and the checkpoints of before are untouched."""
        try:
            self._save(checkpoint, Path(path))
        except Exception as error:
            if not self._keeps:
                raise
            self.failure = error

    def _save(self, checkpoint: dict[str, Any], path: Path) -> None:
        partial = path.with_name(f".{path.name}{PARTIAL}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(checkpoint, partial)
            check_bytes(partial)
            if not self._loads:  # of what kind the contents are does not change from one to the next
                read_torch(partial)
                self._loads = True
            partial.replace(path)
            _flush_folder(path.parent)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if fault := _disk_fault(error):
                raise _cannot_write(path, fault) from error
            raise

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Tensors and plain values only, whatever `weights_only` says; mapped, so that processes of a node share it.
        Raises ValueError for a damaged file."""
        path = existing(path)
        with readable(path):
            return torch.load(path, map_location=map_location or "cpu", weights_only=True, mmap=is_zip(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """One file, as this writes them. Lightning's would remove whole folders, and takes names from checkpoints."""
        path = Path(path)
        if path.suffix == ".ckpt" and path.is_file():
            path.unlink()


def _write(content: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    """A rename is on disk when its folder is."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that flush files alone
            raise
    finally:
        os.close(folder)


def _lock_folder(path: Path) -> IO[str] | None:
    """Take a run's folder for this process, until it ends. None where the file system has no locks.

    Raises ValueError if another process writes there: each would remove the other's checkpoints.
    """
    path.mkdir(parents=True, exist_ok=True)
    file = (path / LOCK).open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(
                f"another process is training in {shown(path.parent)}: wait for its end before you go on from there "
                f"with CKPT=, or begin a run of its own without"
            ) from error
        return None
    return file


def _disk_fault(error: BaseException | None) -> OSError | None:
    """What the disk said; torch hides it behind a RuntimeError about positions in the file."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _cannot_write(path: Path, fault: OSError) -> OSError:
    """The one error of a run whose disk is full."""
    folder = next(folder for folder in path.parents if folder.is_dir())
    text = (
        f"the checkpoint {shown(path)} could not be written: {fault.strerror or fault} "
        f"({shutil.disk_usage(folder).free / 1e9:.2f} GB free there). Nothing of it was kept and what was saved "
        f"before is untouched: make room, for a new one beside the old, and go on with CKPT=last"
    )
    error = OSError(text)
    error.errno = fault.errno  # set afterwards, because it would be printed in front of the text
    return error


class OwnCheckpoint(ModelCheckpoint):
    """What both kinds share: which files there are is known from the run itself, a trial run leaves none, and where the
    first process cannot write, all end: the others would wait for it, on GPUs for as long as a watchdog lets them."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: Lightning would remove the file that a checkpoint, maybe a stranger's, says was written before."""

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Any]) -> None:
        if not trainer.fast_dev_run:
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        writer = trainer.strategy.checkpoint_io
        if trainer.world_size == 1 or not isinstance(writer, AtomicCheckpointIO):
            return super()._save_checkpoint(trainer, filepath)
        with writer.keeping_failures():
            super()._save_checkpoint(trainer, filepath)
        if failure := trainer.strategy.broadcast(writer.failure):  # before Lightning removes the file of before
            raise failure


class LatestCheckpoint(OwnCheckpoint):
    """Every `every_n_train_steps` optimiser steps and after the last one; only the newest file is kept.

    The file that a run was resumed from goes too, once a newer one is written, if it lies in the same folder. While
    `hold()` is true none is written, so that the last good one stays; the next step makes up for it. The last step is
    also the one after which the run is told to stop, by trainer.max_time or a callback. A callback that says so when
    the model is validated or an epoch is over is heard too late for a save within the epoch: such a file has all
    weights, and goes on with the next epoch.
    """

    def __init__(self, every_n_train_steps: int = 1000, dirpath: str | None = None) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"checkpoint.every_n_train_steps is {every_n_train_steps}: give 1 or more")
        super().__init__(
            dirpath=dirpath,
            filename="step={step:07d}",
            auto_insert_metric_name=False,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )
        self.hold: Callable[[], bool] = lambda: False
        self.newest = ""  # path of the last file that was written
        self._owed = False
        self._lock: IO[str] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:
            self._lock = _lock_folder(Path(self.dirpath))
            for leftover in Path(self.dirpath).glob(f".*{PARTIAL}"):  # of a process that was killed while it wrote
                leftover.unlink(missing_ok=True)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if self._lock:
            self._lock.close()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # the step that was resumed is saved already: once more would be in the midst of the next one's accumulation
        self._last_global_step_saved = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        told = trainer.should_stop and trainer.fit_loop._can_stop_early  # not before trainer.min_steps and min_epochs
        finished = told or trainer.global_step >= trainer.estimated_stepping_batches
        if finished and self._last_global_step_saved != trainer.global_step:
            self.save_now(trainer)
        elif self._owed:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._last_global_step_saved != trainer.global_step:
            self.save_now(trainer)

    def save_now(self, trainer: L.Trainer) -> str:
        """Save at the current step, whatever the interval; returns the path."""
        self._save(trainer, self._monitor_candidates(trainer))
        return self.best_model_path

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Any]) -> None:
        self._owed = self.hold()
        if not self._owed:
            self._save(trainer, monitor_candidates)

    def _save(self, trainer: L.Trainer, monitor_candidates: dict[str, Any]) -> None:
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        self.newest = self.best_model_path  # which Lightning sets before the file is there
        resumed, newest = Path(trainer.ckpt_path or "").resolve(), Path(self.newest).resolve()  # also through a link
        if resumed.match("step=*.ckpt") and resumed.parent == newest.parent and resumed != newest:
            trainer.strategy.remove_checkpoint(resumed)  # on rank zero only, and once


class MilestoneCheckpoint(OwnCheckpoint):
    """Every `every_n_epochs` epochs; all are kept.

    Written when the epoch's last batch is done, as LatestCheckpoint writes: at the epoch's end, where Lightning would,
    its loops stand elsewhere, and a run that goes on from there counts batches anew.
    """

    def __init__(self, every_n_epochs: int = 100, dirpath: str | None = None) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"milestones.every_n_epochs is {every_n_epochs}: give 1 or more")
        self.interval = every_n_epochs
        super().__init__(
            dirpath=dirpath,
            filename="epoch={epoch:04d}",
            auto_insert_metric_name=False,
            every_n_epochs=every_n_epochs,
            save_top_k=-1,
            enable_version_counter=False,
        )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.is_last_batch and (trainer.current_epoch + 1) % self.interval == 0:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing, nor after validation: it is written already."""

    on_validation_end = on_train_epoch_end


def save_if_due(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Save the step that was just taken, if it is to be saved: before something that takes long, or may fail."""
    if latest := latest_checkpoint(trainer):
        latest.on_train_batch_end(trainer, pl_module, None, None, 0)


def latest_checkpoint(trainer: L.Trainer) -> LatestCheckpoint | None:
    """The trainer's LatestCheckpoint, None if it has none."""
    return next((c for c in trainer.checkpoint_callbacks if isinstance(c, LatestCheckpoint)), None)
