"""npz files of strangers: named numpy arrays, read without pickle and without believing a size before it is checked.

`np.load` would allocate whatever a header says; here nothing is allocated that the file does not hold the bytes for,
and a file unpacks to at most `EXPANSION` times its size. Formats: zip, and numpy `lib/format.py`.
"""

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

EXPANSION = 32  # times its own size that a compressed file may unpack to; what networks make hardly compresses
SMALL = 2**26  # bytes that any file may unpack to
DAMAGED = (ValueError, ArithmeticError, RuntimeError, EOFError, OSError, LookupError, TypeError, SyntaxError)
DAMAGED += (MemoryError, zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError)  # MemoryError: a parser's


def read_arrays(path: str | Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of `names` that an npz file holds. Raises ValueError for one that is damaged or holds Python objects."""
    with reading(Path(path), "npz"), zipfile.ZipFile(path) as archive:
        entries = checked_entries(archive, Path(path).stat().st_size)
        return {name: _read_npy(archive, entries[name]) for name in names if name in entries}


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """One ValueError that names the file for everything that can be wrong with one."""
    try:
        yield
    except DAMAGED as error:
        raise ValueError(f"{path} is not a readable {kind} file: {str(error)[:200] or type(error).__name__}") from error


def checked_entries(archive: zipfile.ZipFile, file_size: int) -> dict[str, zipfile.ZipInfo]:
    """Entries by name without .npy. Raises ValueError before anything is unpacked that would not end well."""
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name == info.filename or name in entries:
            raise ValueError(f"its entry '{info.filename}' is no array or is there twice")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.compress_size > file_size:
            raise ValueError(f"its entry '{info.filename}' is longer than the file, or packed in an unknown way")
        entries[name] = info
    unpacked = sum(info.file_size for info in entries.values())
    if unpacked > max(EXPANSION * file_size, SMALL):
        raise ValueError(f"its {file_size} bytes would unpack to {unpacked}, which no weights do")
    return entries


def _read_npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as file:
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        version = np.lib.format.read_magic(file)
        if version not in read_header:
            raise ValueError(f"'{info.filename}' is of version {version}, only {', '.join(map(str, read_header))} read")
        shape, fortran, dtype = read_header[version](file)
        declared, found = math.prod(shape) * dtype.itemsize, info.file_size - file.tell()
        if dtype.hasobject or declared != found or min(shape, default=0) < 0:
            raise ValueError(f"'{info.filename}' is {dtype} {shape}, {declared} bytes, but has {found}, or objects")
        array = np.empty(math.prod(shape), dtype)
        if declared:
            _fill(array.view(np.uint8).data, file)
    return array.reshape(shape, order="F" if fortran else "C")


def _fill(target: memoryview, file: zipfile.ZipExtFile) -> None:
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])
        if not count:
            raise EOFError(f"it ends {len(target) - done} bytes too early")
        done += count
