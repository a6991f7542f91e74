"""What every reader is held to: it returns, or raises a documented error that names its file, in bounded memory."""

import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

DOCUMENTED = (ValueError, OSError)  # FileNotFoundError is an OSError
ADDRESS_SPACE = 2**33  # bytes beyond those of the process that a test may ask for; not all of them are touched
MEMORY = 2**28  # bytes that reading a small file may take
SECONDS = 10.0  # of the processor's time; what waits for ever meets the time limit of the test
_numbers = count()


def status(name: str) -> int:
    """Bytes of one line of the kernel's account of this process, such as VmSize, or VmHWM, the most memory so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def survives(read: Callable[[], Any], *, named: str = "", memory: int = MEMORY) -> Any:
    """What `read` returns, None after a documented error, whose text has `named` in it.

    Fails for any other error, and where it took more than `memory` bytes or `SECONDS`.
    """
    with suppress(OSError):  # resets the peak; where that is not allowed the peak is that of the process
        Path("/proc/self/clear_refs").write_text("5")
    before, start, result = status("VmRSS"), time.process_time(), None
    try:
        result = read()
    except DOCUMENTED as error:
        assert named in str(error), f"the error does not say where: {error}"
        assert str(error).strip(), "an error without a text"
    taken = max(0, status("VmHWM") - before)
    assert taken < memory, f"{taken / 2**20:.0f} MiB were taken"
    assert time.process_time() - start < SECONDS
    return result


def fresh(folder: Path, data: bytes, suffix: str = "") -> Path:
    """A new file: an old one may be mapped still."""
    for old in folder.glob("fuzz-*"):
        old.unlink()
    path = folder / f"fuzz-{next(_numbers)}{suffix}"
    path.write_bytes(data)
    return path
