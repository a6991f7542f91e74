"""The recipes without jsonargparse: merges the same YAML files and builds the same objects.

For sampling, exporting, benchmarks and machines that lack jsonargparse; `tests/test_experiments.py` checks that the
command line builds the same.
"""

import importlib
import inspect
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments import recipes
from lightning_modules.config import as_config, unknown_key

PACKAGES = ("layers", "lightning_modules", "datamodules", "lightning")  # a recipe names classes of these only


def load_config(experiment: str, overrides: Sequence[str] = (), *, overlays: Sequence[Path] = ()) -> dict[str, Any]:
    """The merged recipe with overrides such as "--model.init_args.net.depth=4" or "model.init_args.net.depth=4"."""
    config: dict[str, Any] = {}
    for path in [*recipes.files(experiment), *overlays]:
        config = merge(config, yaml.load(path.read_text(), _Loader) or {})
    for override in overrides:
        config = merge(config, parse_override(override))
    return config


def load_module(experiment: str, overrides: Sequence[str] = ()) -> Any:
    """The LightningModule of a recipe, freshly initialised."""
    return instantiate(load_config(experiment, overrides)["model"], "model")


def load_data(experiment: str, overrides: Sequence[str] = ()) -> Any:
    """The LightningDataModule of a recipe."""
    return instantiate(load_config(experiment, overrides)["data"], "data")


def merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """Key by key; lists are replaced; another `class_path` drops the old `init_args`. As LightningCLI merges."""
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
    parsed = yaml.load(value, _Loader)
    for key in reversed(name.split(".")):
        parsed = {key: parsed}
    return parsed


def find_class(class_path: str, where: str) -> type:
    """The class of a recipe. Raises ValueError for one outside the project and Lightning, or that does not exist."""
    module_name, _, class_name = class_path.rpartition(".")
    if module_name.split(".")[0] not in PACKAGES:
        raise ValueError(f"{where}.class_path '{class_path}' is not of {', '.join(PACKAGES)}: not imported")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"{where}.class_path '{class_path}' does not exist ({error})") from error


def instantiate(config: dict[str, Any], where: str) -> Any:
    """{"class_path", "init_args"} -> object, nested configs first. Raises ValueError for an unknown class or key."""
    cls = find_class(config["class_path"], where)
    hints = typing.get_type_hints(cls.__init__)
    arguments = config.get("init_args") or {}
    check_arguments(cls, arguments, where)
    return cls(
        **{name: _build(value, hints.get(name), f"{where}.init_args.{name}") for name, value in arguments.items()}
    )


def check_arguments(cls: type, arguments: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for a name that the constructor does not take, with the nearest that it does."""
    known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    for name in arguments:
        if name not in known:
            raise ValueError(unknown_key(f"{where}.init_args.{name}", [f"{where}.init_args.{key}" for key in known]))


def _build(value: Any, hint: Any, where: str) -> Any:
    if isinstance(value, dict) and "class_path" in value:
        return instantiate(value, where)
    if is_dataclass(hint) and isinstance(value, dict):
        return as_config(hint, value)
    return value


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number, as on the command line."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
