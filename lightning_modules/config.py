"""Arguments as dataclasses, and as the plain values that a checkpoint may hold.

Checkpoints load with weights_only=True, so hyper-parameters are stored as dicts; a constructor accepts both forms.
"""

import dataclasses
import difflib
import importlib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from layers.text.base import TextTokenizer
from layers.tokenizers.base import Tokenizer

T = TypeVar("T")


def as_config(cls: type[T], value: T | Mapping[str, Any]) -> T:
    """A dataclass instance from itself or from a mapping of its fields.

    Raises ValueError naming a field that does not exist (with the nearest name), a value of the wrong type, or NaN.
    """
    made = value if isinstance(value, cls) else _from_mapping(cls, value)
    for field in dataclasses.fields(cls):
        number = getattr(made, field.name)
        if isinstance(number, float) and math.isnan(number):
            raise ValueError(f"{cls.__name__}.{field.name} is not a number (NaN): give one")
    return made


def _from_mapping(cls: type[T], value: Mapping[str, Any]) -> T:
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    for name in value:
        if name not in fields:
            raise ValueError(unknown_key(f"{cls.__name__}.{name}", [f"{cls.__name__}.{field}" for field in fields]))
    return cls(**{name: _coerce(item, fields[name], f"{cls.__name__}.{name}") for name, item in value.items()})


def unknown_key(name: str, known: list[str]) -> str:
    """Error text for a key that nothing reads, with the nearest that something does."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"unknown key '{name}'" + (
        f": did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(known)}"
    )


def tokenizer_config(tokenizer: Tokenizer | TextTokenizer) -> dict[str, Any]:
    """{"class_path", "init_args"} of a tokenizer, as in a recipe."""
    cls = type(tokenizer)
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": tokenizer.init_args()}


def as_tokenizer(value: Tokenizer | Mapping[str, Any]) -> Tokenizer:
    """A tokenizer from itself or its config. Only Tokenizer classes below `layers.tokenizers` are made.

    Raises ValueError for any other class, or for arguments that the class does not take.
    """
    if isinstance(value, Tokenizer):
        return value
    return made_in("layers.tokenizers", Tokenizer, *class_of(value, "tokenizer"), kind="tokenizer")


def made_in(package: str, base: type[T], class_path: str, arguments: Mapping[str, Any], *, kind: str) -> T:
    """An object of a subclass of `base` below `package`, and of no other: a checkpoint's config is a stranger's.

    Raises ValueError, in which `kind` says what was wanted.
    """
    module, _, name = class_path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name) if module.startswith(f"{package}.") else None
    except (ImportError, AttributeError):
        cls = None
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(f"'{class_path}' is no {kind} class in {package}: not loaded")
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"{kind} {name}: {error}") from error


def class_of(config: Any, name: str) -> tuple[str, Mapping[str, Any]]:
    """`class_path` and `init_args` of a config, which may be a stranger's. Raises ValueError if it is none."""
    arguments = (config.get("init_args") or {}) if isinstance(config, Mapping) else None
    if not isinstance(arguments, Mapping) or not isinstance(config.get("class_path"), str):
        raise ValueError(f"{name} is {config!r:.60}, expected a class_path and its init_args")
    return config["class_path"], arguments


def made_of(cls: type[T], arguments: Mapping[str, Any], origin: str) -> T:
    """An object of a stranger's arguments. Raises ValueError, which names the `origin`, whatever is wrong with them."""
    try:
        return cls(**arguments)
    except (TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{origin}: {cls.__name__} cannot be made of these arguments ({error})") from error


def _coerce(value: Any, hint: Any, name: str) -> Any:
    """`value` if it is of type `hint`, with the harmless conversions of a YAML reader: int to float, list to tuple."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [arg for arg in args if arg is not type(None)]
        return _coerce(value, options[0], name) if len(options) == 1 else value
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{name} is '{value}', expected one of {', '.join(map(str, args))}")
        return value
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(args):
        return tuple(_coerce(item, arg, name) for item, arg in zip(value, args, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = origin or hint
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ValueError(f"{name} is {value!r}, expected {getattr(hint, '__name__', hint)}")
    return value
