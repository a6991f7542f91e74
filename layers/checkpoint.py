"""Names and layouts of official checkpoints, both ways.

A method lists `Rule`s; `to_ours` and `to_official` apply the first that matches each name, and fail on anything that is
left over, missing or of another shape: a checkpoint is never loaded in part without a word.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

Transform = Callable[[Tensor], Tensor]


class Rule(NamedTuple):
    """`official` and `ours` are names in which `*` stands for the same text on both sides."""

    official: str
    ours: str
    to_ours: Transform | None = None
    to_official: Transform | None = None


def to_ours(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Official state dict -> ours. Raises ValueError for names that no rule knows."""
    return _rename(state, [(r.official, r.ours, r.to_ours) for r in rules])


def to_official(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Our state dict -> official. Raises ValueError for names that no rule knows."""
    return _rename(state, [(r.ours, r.official, r.to_official) for r in rules])


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


def _rename(state: Mapping[str, Tensor], rules: Sequence[tuple[str, str, Transform | None]]) -> dict[str, Tensor]:
    patterns = [(re.compile(re.escape(old).replace(r"\*", "(.*)")), new, transform) for old, new, transform in rules]
    renamed, unknown = {}, []
    for name, tensor in state.items():
        for pattern, new, transform in patterns:
            if match := pattern.fullmatch(name):
                renamed[_fill(new, match.groups())] = transform(tensor) if transform else tensor
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"the checkpoint is of another model: {_listing('unknown', unknown)}")
    return renamed


def _fill(template: str, parts: Sequence[str]) -> str:
    for part in parts:
        template = template.replace("*", part, 1)
    return template


def _listing(what: str, items: Sequence[str]) -> str:
    shown = ", ".join(items[:3]) + (" ..." if len(items) > 3 else "")
    return f"{len(items)} {what} ({shown})" if items else ""
