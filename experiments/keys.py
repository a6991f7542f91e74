"""Checks the keys of command-line overrides before LightningCLI sees them: it would take an abbreviation inside `net`
for the field that it begins, and for a mistyped key it names no alternative."""

import dataclasses
import importlib
import inspect
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.load import is_known
from lightning_modules.config import unknown_key


def check_keys(overrides: Sequence[str], config: Mapping[str, Any], sections: Mapping[str, type]) -> None:
    """Raise ValueError for the first override such as --model.init_args.net.dept=3 whose key does not exist.

    `config` is the recipe (it says which classes `model` and `data` are), `sections` the classes of other sections.
    """
    chosen = dict(config)
    for override in overrides:
        name, _, value = override.removeprefix("--").partition("=")
        section, _, rest = name.partition(".")
        if section in ("model", "data") and rest in ("", "class_path"):
            chosen[section] = {"class_path": value}
        elif section in ("model", "data") and rest:
            _walk(chosen.get(section), rest.split("."), section)
        elif section in sections and rest:
            _walk(sections[section], rest.split("."), section)


def _walk(owner: Any, path: list[str], where: str) -> None:
    """`owner` is a class, or the {"class_path", "init_args"} of one; `path` the keys below it."""
    config = owner if isinstance(owner, Mapping) else {}
    if not path or not isinstance(owner, Mapping | type):  # the whole of it is given, or the parser will say better
        return
    if isinstance(owner, Mapping):
        if path[0] == "class_path":
            return
        if path[0] == "init_args":
            where, path = f"{where}.init_args", path[1:]
        owner = _find_class(owner.get("class_path", ""))
    if owner is None or not path:
        return
    hints = _arguments(owner)
    key = path[0].removesuffix("+")
    if key not in hints:
        raise ValueError(unknown_key(f"--{where}.{key}", [f"--{where}.{name}" for name in hints]))
    given = config.get("init_args")
    inner = given.get(key) if isinstance(given, Mapping) else None
    if isinstance(inner, Mapping) and "class_path" in inner:
        _walk(inner, path[1:], f"{where}.{key}")
    elif dataclasses.is_dataclass(hints[key]):
        _walk(hints[key], path[1:], f"{where}.{key}")


def _arguments(cls: type) -> dict[str, Any]:
    """Constructor arguments and their types."""
    hints = typing.get_type_hints(cls.__init__) if not dataclasses.is_dataclass(cls) else typing.get_type_hints(cls)
    names = list(inspect.signature(cls).parameters)
    return {name: hints.get(name) for name in names}


def _find_class(class_path: Any) -> type | None:
    """The class, or None where the parser will say better what is wrong, and for one that is not to be imported."""
    if not is_known(class_path):
        return None
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
    return found if isinstance(found, type) else None
