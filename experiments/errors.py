"""What a user sees of a mistake: one line that names the value and the cure. DEBUG=1 shows the traceback instead."""

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
    text = re.sub(r"(?s)^Caught \w+ in DataLoader worker .*\n[\w.]*(?:Error|Exception): ", "", str(error))
    text = " ".join(text.split())
    text = re.sub(r" - Expected a <class 'NoneType'> Given value type: .*", "", text)
    text = re.sub(r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: - ", "", text)
    text = re.sub(r"Problem with given class_path '[^']*': ", "", text)
    text = re.sub(r'^(Parser key "[^"]*": )+', lambda match: match[1], text)
    return text
