"""Names and layouts of official checkpoints, both ways.

A method lists `Rule`s; `to_ours` and `to_official` apply the first that matches each name, and fail on anything that is
left over, missing or of another shape: a checkpoint is never loaded in part without a word.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

# tensor -> tensor; where a rule has several official names, to_ours takes as many and to_official returns them
Transform = Callable[..., Any]


class Rule(NamedTuple):
    """`official` and `ours` are names in which `*` stands for the same text on both sides.

    Several official names: tensors that are one of ours, such as query, key and value of fused attention; both
    transforms are needed then.
    """

    official: str | tuple[str, ...]
    ours: str
    to_ours: Transform | None = None
    to_official: Transform | None = None


def to_ours(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Official state dict -> ours. Raises ValueError for names that no rule knows, and for a part of several alone."""
    renamed: dict[str, Tensor] = {}
    for (number, found), names in _grouped(state, [_names(rule.official) for rule in rules]).items():
        rule, wanted = rules[number], [_fill(name, found) for name in _names(rules[number].official)]
        if missing := [name for name in wanted if name not in names]:
            raise ValueError(f"the checkpoint is of another model: {_listing('missing', missing)}")
        tensors = [state[name] for name in wanted]
        renamed[_fill(rule.ours, found)] = rule.to_ours(*tensors) if rule.to_ours else tensors[0]
    return renamed


def to_official(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Our state dict -> official. Raises ValueError for names that no rule knows."""
    renamed: dict[str, Tensor] = {}
    for (number, found), (name,) in _grouped(state, [(rule.ours,) for rule in rules]).items():
        rule = rules[number]
        made = rule.to_official(state[name]) if rule.to_official else state[name]
        parts = (made,) if isinstance(rule.official, str) else made
        names = [_fill(official, found) for official in _names(rule.official)]
        renamed |= dict(zip(names, parts, strict=True))
    return renamed


def check_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, origin: str) -> None:
    """Raise one ValueError that names every kind of misfit between a state dict and the model's own."""
    problems = [
        _listing("missing", [name for name in expected if name not in state]),
        _listing("unknown", [name for name in state if name not in expected]),
        _listing(
            "of another shape",
            [
                f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
                for name, tensor in expected.items()
                if name in state and state[name].shape != tensor.shape
            ],
        ),
    ]
    if any(problems):
        raise ValueError(f"{origin} does not fit this model: {'; '.join(p for p in problems if p)}")


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _grouped(
    state: Mapping[str, Tensor], templates: Sequence[tuple[str, ...]]
) -> dict[tuple[int, tuple[str, ...]], list[str]]:
    """Names by (number of the first rule that matches, texts its stars stand for). Raises ValueError for others."""
    patterns = [[re.compile(re.escape(name).replace(r"\*", "(.*)")) for name in names] for names in templates]

    def matches(name: str) -> Iterator[tuple[int, tuple[str, ...]]]:
        for number, alternatives in enumerate(patterns):
            yield from ((number, m.groups()) for pattern in alternatives if (m := pattern.fullmatch(name)))

    groups: dict[tuple[int, tuple[str, ...]], list[str]] = {}
    unknown = []
    for name in state:
        key = next(matches(name), None)
        if key is None:
            unknown.append(name)
        else:
            groups.setdefault(key, []).append(name)
    if unknown:
        raise ValueError(f"the checkpoint is of another model: {_listing('unknown', unknown)}")
    return groups


def _fill(template: str, parts: Sequence[str]) -> str:
    for part in parts:
        template = template.replace("*", part, 1)
    return template


def _listing(what: str, items: Sequence[str]) -> str:
    shown = ", ".join(items[:3]) + (" ..." if len(items) > 3 else "")
    return f"{len(items)} {what} ({shown})" if items else ""
