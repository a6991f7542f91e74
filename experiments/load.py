"""The recipes without jsonargparse: merges the same YAML files and builds the same objects.

For sampling, exporting, benchmarks and machines that lack jsonargparse; `tests/test_experiments.py` checks that the
command line builds the same. A configuration is a stranger's text: it names classes of `PACKAGES` only, which
`--trust-config` lifts in training (main.py), and whatever is wrong with it is a ValueError that names the file or key.
"""

import copy
import importlib
import inspect
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning as L
import yaml

from experiments import recipes
from layers.tokenizers.base import Tokenizer
from lightning_modules.base import GenerativeModule
from lightning_modules.config import as_config, class_of, made_of, unknown_key

PACKAGES = ("layers", "lightning_modules", "datamodules", "lightning")  # a configuration names classes of these only
TRUST = "--trust-config"  # the word of a training command that lifts this
# what the classes of a configuration must be; below these, the constructors' own types say it
ROOTS = {"model": GenerativeModule, "data": L.LightningDataModule, "model.init_args.tokenizer": Tokenizer}
MAX_VALUES = 100_000  # of a file, its anchors written out: no recipe has a hundredth of it
# what PyYAML raises beside YAMLError: for "!!int x", a 13th month, lists in lists by the thousand, ...
NOT_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


def load_config(
    experiment: str, overrides: Sequence[str] = (), *, overlays: Sequence[Path] = (), trusted: bool = False
) -> dict[str, Any]:
    """The merged recipe with overrides such as "--model.init_args.net.depth=4" or "model.init_args.net.depth=4".

    Raises ValueError for a file that is no configuration or, unless `trusted`, names a class outside `PACKAGES`, and
    for an override that cannot be read.
    """
    config: dict[str, Any] = {}
    for path in [*recipes.files(experiment), *overlays]:
        config = merge(config, read_config(path, trusted=trusted))
    for override in overrides:
        config = merge(config, parse_override(override))
    return config


def read_config(path: Path, *, trusted: bool = False) -> dict[str, Any]:
    """One configuration file. Errors as in `load_config`."""
    try:
        config = copy.deepcopy(_parsed(path.read_text(encoding="utf-8")))
    except NOT_YAML as error:
        raise ValueError(f"'{path}' is no readable YAML: {str(error) or type(error).__name__}") from error
    if config is None:  # nothing but comments
        return {}
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise ValueError(f"'{path}' holds {config!r:.60}, expected sections such as model: and data:")
    if not trusted:
        for class_path in class_paths(config):
            if "." in str(class_path) and not is_known(class_path):  # Lightning's own have short names as well
                raise ValueError(f"'{path}' names {untrusted(class_path)}")
    return config


def is_known(class_path: Any) -> bool:
    """Whether a name is one of `PACKAGES`. Nothing is imported to find out."""
    return isinstance(class_path, str) and class_path.partition(".")[0] in PACKAGES


def untrusted(class_path: Any) -> str:
    """The rest of an error for a class that a configuration names and that is not imported."""
    return (
        f"the class '{class_path}', which is neither this project's nor Lightning's, so it was not imported: remove it,"
        f" or train with {TRUST} if you trust the file with everything that you can do yourself"
    )


def load_module(experiment: str, overrides: Sequence[str] = ()) -> Any:
    """The LightningModule of a recipe, freshly initialised."""
    return instantiate(load_config(experiment, overrides)["model"], "model")


def load_data(experiment: str, overrides: Sequence[str] = ()) -> Any:
    """The LightningDataModule of a recipe."""
    return instantiate(load_config(experiment, overrides)["data"], "data")


def ready_data(experiment: str, overrides: Sequence[str] = ()) -> Any:
    """The same, with its rows at hand."""
    data = load_data(experiment, overrides)
    data.prepare_data()
    data.setup()
    return data


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the data, and the rest, of the model."""
    data = [text for text in overrides if text.startswith("--data.")]
    return data, [text for text in overrides if text not in data]


def merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """Key by key; lists are replaced; another `class_path` drops the old `init_args`. As LightningCLI merges.

    Raises ValueError where `update` is no mapping.
    """
    if not isinstance(update, Mapping):
        raise ValueError(f"{update!r:.60} is given where keys and their values belong, such as {{depth: 4}}")
    merged = dict(base)
    if "class_path" in update and update["class_path"] != base.get("class_path"):
        merged.pop("init_args", None)
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            value = merge(merged[key], value)
        merged[key] = value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """ "--a.b=value" -> {"a": {"b": value}}, the value read as YAML."""
    name, separator, value = text.removeprefix("--").partition("=")
    if not separator:
        raise ValueError(f"override '{text}' has no value: write --key=value")
    try:
        parsed = copy.deepcopy(_parsed(value))
    except NOT_YAML as error:
        raise ValueError(f"the value of '{text:.200}' is no YAML ({error}): quote it, or correct it") from error
    for key in reversed(name.split(".")):
        parsed = {key: parsed}
    return parsed


def find_class(class_path: str, where: str, *, trusted: bool = False) -> type:
    """The class of a recipe. Raises ValueError for one outside `PACKAGES`, unless `trusted`, or that does not exist."""
    if not trusted and not is_known(class_path):
        raise ValueError(f"{where}.class_path names {untrusted(class_path)}")
    module_name, _, class_name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:  # ValueError: for names that can be no module's
        raise ValueError(f"{where}.class_path '{class_path}' does not exist ({error})") from error
    if not isinstance(found, type) or not (trusted or is_known(found.__module__)):  # what a module has imported itself
        raise ValueError(f"{where}.class_path '{class_path}' is no class of {', '.join(PACKAGES)}")
    return found


def instantiate(config: Any, where: str, *, trusted: bool = False) -> Any:
    """{"class_path", "init_args"} -> object, nested configs first.

    Raises ValueError for an unknown class or key, a class of another kind than belongs there, and for values that its
    constructor cannot work with.
    """
    return _instantiate(config, where, ROOTS.get(where), trusted)


def _instantiate(config: Any, where: str, hint: Any, trusted: bool) -> Any:
    class_path, arguments = class_of(config, where)
    cls = find_class(class_path, where, trusted=trusted)
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if isinstance(kind, type)]
    if kinds and not issubclass(cls, tuple(kinds)):
        raise ValueError(f"{where}.class_path '{class_path}' is no {kinds[0].__name__}")
    hints = typing.get_type_hints(cls.__init__)
    check_arguments(cls, arguments, where)
    built = {
        name: _build(value, hints.get(name), f"{where}.init_args.{name}", trusted) for name, value in arguments.items()
    }
    return made_of(cls, built, where)


def check_arguments(cls: type, arguments: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for a name that the constructor does not take, with the nearest that it does."""
    known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    for name in arguments:
        if name not in known:
            raise ValueError(unknown_key(f"{where}.init_args.{name}", [f"{where}.init_args.{key}" for key in known]))


def _build(value: Any, hint: Any, where: str, trusted: bool) -> Any:
    if isinstance(value, dict) and "class_path" in value:
        return _instantiate(value, where, hint, trusted)
    if is_dataclass(hint) and isinstance(value, dict):
        return as_config(hint, value)
    return value


def class_paths(value: Any) -> Iterator[Any]:
    """Every `class_path` of a configuration, at any depth."""
    if isinstance(value, dict):
        if "class_path" in value:
            yield value["class_path"]
        for inner in value.values():
            yield from class_paths(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from class_paths(inner)


@lru_cache(256)  # a command reads the same recipe several times, in pure Python, as libyaml crashes on deep nesting
def _parsed(text: str) -> Any:
    """The values of a YAML text, which the caller must not change."""
    values = yaml.load(text, _Loader)
    _count_values(values, {})
    return values


def _count_values(value: Any, counted: dict[int, float]) -> float:
    """Values of a YAML tree as if its anchors were written out; each is looked at once.

    Raises ValueError for more than `MAX_VALUES`, which some levels of anchors make of a few lines, and for an anchor
    that contains itself.
    """
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if id(value) not in counted:
        counted[id(value)] = math.inf  # until it is counted: an anchor inside itself meets this
        inner = value.values() if isinstance(value, dict) else value
        counted[id(value)] = 1 + sum(_count_values(part, counted) for part in inner)
    if counted[id(value)] > MAX_VALUES:
        raise ValueError(f"its anchors contain themselves, or stand for more than {MAX_VALUES} values")
    return counted[id(value)]


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number, as on the command line."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
