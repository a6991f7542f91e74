"""A checkpoint file is the old one or the new one, whatever happens while it is written; damage is found on reading."""

import errno
import os
import random
import resource
import signal
import struct
import zipfile
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from experiments.errors import describe
from lightning_modules.callbacks import checkpoint
from lightning_modules.callbacks.checkpoint import AtomicCheckpointIO, LatestCheckpoint
from lightning_modules.weights import check_bytes, check_whole

OLD = {"weights": {f"w{i}": torch.full((5000,), float(i)) for i in range(4)}}
NEW = {"weights": {f"w{i}": torch.full((5000,), float(-i)) for i in range(4)}}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint in a folder of its own."""
    path = tmp_path / "checkpoints" / "step=1.ckpt"
    AtomicCheckpointIO().save_checkpoint(OLD, path)
    return path


def assert_untouched(path):
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert all(torch.equal(loaded["weights"][name], tensor) for name, tensor in OLD["weights"].items())
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing of the new one may be left"


@contextmanager
def files_up_to(size: int):
    """The system writes no file longer than this: what a full disk does to a write, without filling one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 5_000, 50_000, 80_000])
@pytest.mark.parametrize("name", ["step=1.ckpt", "step=2.ckpt"])
def test_a_full_disk_leaves_the_old_file_and_one_clear_error(name, size, saved):
    assert saved.stat().st_size > 80_000
    with (
        pytest.raises(OSError, match=r"could not be written: File too large \(.* GB free there\)") as error,
        files_up_to(size),
    ):
        AtomicCheckpointIO().save_checkpoint(NEW, saved.with_name(name))
    assert_untouched(saved)
    assert describe(error.value).startswith("the checkpoint ") and "make room" in describe(error.value)
    assert "CKPT=last" in describe(error.value) and error.value.errno == errno.EFBIG


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_disk_that_fails_late_leaves_the_old_file(where, saved, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if where == "fsync" else (type(saved), "replace")), full)
    with pytest.raises(OSError, match="No space left on device"):
        AtomicCheckpointIO().save_checkpoint(NEW, saved)
    monkeypatch.undo()
    assert_untouched(saved)


def test_an_error_that_is_not_the_disks_is_left_as_it_is(saved):
    with pytest.raises(AttributeError, match="lambda"):
        AtomicCheckpointIO().save_checkpoint({"function": lambda: None}, saved)
    assert_untouched(saved)


def test_a_file_that_reads_back_otherwise_never_gets_its_name(saved, monkeypatch):
    write = checkpoint._write

    def careless(content, path):
        write(content, path)
        flip(path, path.stat().st_size // 2)

    monkeypatch.setattr(checkpoint, "_write", careless)
    with pytest.raises(ValueError, match="differ from the checksums"):
        AtomicCheckpointIO().save_checkpoint(NEW, saved)
    assert_untouched(saved)


class Thing:
    """A class that a checkpoint may not hold."""


def test_what_could_not_be_loaded_again_is_not_saved(saved):
    with pytest.raises(ValueError, match="more than tensors and plain values"):
        AtomicCheckpointIO().save_checkpoint({"thing": Thing()}, saved)
    assert_untouched(saved)


def flip(path, at: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 8]))


def test_every_cut_is_found(saved):
    content = saved.read_bytes()
    for length in [0, 1, 21, *range(100, len(content), 1999), len(content) - 1]:
        saved.write_bytes(content[:length])
        with pytest.raises(ValueError, match="damaged or cut short"):
            check_bytes(saved)


def test_a_flipped_bit_in_any_tensor_is_found(saved):
    content = saved.read_bytes()
    spots = []
    for record in zipfile.ZipFile(saved).infolist():
        start = record.header_offset + 30 + sum(struct.unpack_from("<HH", content, record.header_offset + 26))
        spots += [random.Random(start).randrange(start, start + record.file_size)] if record.file_size else []
    assert len(spots) > len(OLD["weights"])
    for spot in spots:
        saved.write_bytes(content)
        check_whole(saved)
        flip(saved, spot)
        with pytest.raises(ValueError, match="damaged"):
            check_bytes(saved)


def test_bytes_of_any_kind_are_an_error_of_ours(saved):
    """Bits of the file's own tables: found, or without meaning."""
    content, chance = saved.read_bytes(), random.Random(0)
    tables = content.rindex(b"PK\x01\x02")
    for _ in range(200):
        saved.write_bytes(content)
        flip(saved, chance.randrange(tables - 300, len(content)))
        try:
            check_whole(saved)
        except ValueError as error:
            assert str(saved) in str(error)


def test_a_damaged_file_is_named_when_it_is_loaded(saved):
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"step=1\.ckpt is not a readable torch checkpoint"):
        AtomicCheckpointIO().load_checkpoint(saved)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        AtomicCheckpointIO().load_checkpoint("nowhere.ckpt")


@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_end_where_the_first_cannot_write(rank, tmp_path):
    """Under DDP only the first writes; what it met is sent to all, before the file of before is removed."""
    writer, full = AtomicCheckpointIO(), OSError("the disk is full")

    def save(path, weights_only):
        if rank == 0:
            with files_up_to(100):
                writer.save_checkpoint({"x": torch.zeros(1000)}, path)

    strategy = SimpleNamespace(checkpoint_io=writer, broadcast=lambda failure: failure if rank == 0 else full)
    trainer = SimpleNamespace(
        world_size=2, strategy=strategy, save_checkpoint=save, global_step=3, is_global_zero=False, loggers=[]
    )
    with pytest.raises(OSError, match="File too large" if rank == 0 else "the disk is full"):
        LatestCheckpoint()._save_checkpoint(trainer, str(tmp_path / "step=3.ckpt"))
    assert not list(tmp_path.iterdir())
    with files_up_to(100), pytest.raises(OSError, match="File too large"):
        writer.save_checkpoint({"x": torch.zeros(1000)}, tmp_path / "alone.ckpt")
