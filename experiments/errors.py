"""What a user sees of a mistake: one line that names the value and the cure. DEBUG=1 shows the traceback instead."""

import errno
import functools
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

try:
    from jsonargparse import ArgumentError
except ImportError:  # only the command line for training needs it

    class ArgumentError(Exception):  # type: ignore[no-redef]
        """Stands in where jsonargparse is absent."""


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # what a disk says that takes no more


def one_line_errors(main: Callable[[], Any]) -> Callable[[], Any]:
    """Run `main`; user errors end it with `error: ...` on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped() -> Any:
        try:
            return main()
        except (ValueError, OSError, ArgumentError, MisconfigurationException) as error:
            if os.environ.get("DEBUG"):
                raise
            print(f"error: {describe(error)}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted before there was anything to save", file=sys.stderr)
            sys.exit(130)

    return wrapped


def describe(error: Exception) -> str:
    """The message in one line, without the command line parser's account of every type that it tried."""
    if full := _disk_full(error):
        return full
    text = re.sub(r"(?s)^Caught \w+ in DataLoader worker .*\n[\w.]*(?:Error|Exception): ", "", str(error))
    text = " ".join(text.split())
    text = re.sub(r" - Expected a <class 'NoneType'> Given value type: .*", "", text)
    text = re.sub(r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: - ", "", text)
    text = re.sub(r"Problem with given class_path '[^']*': ", "", text)
    text = re.sub(r'^(Parser key "[^"]*": )+', lambda match: match[1], text)
    return text


def _disk_full(error: BaseException | None) -> str | None:
    """The message where a disk is full, else None. Of all that fails then, what says most: ours, or what came first."""
    faults = []
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            faults.append(error)
        error = error.__cause__ or error.__context__
    if not faults:
        return None
    ours = [fault for fault in faults if fault.strerror is None]
    cure = "make room (checkpoints are untouched: training goes on with CKPT=last)"
    return str(ours[0]) if ours else f"{faults[-1]}: {cure}"
