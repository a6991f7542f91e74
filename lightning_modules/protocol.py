"""How a method's authors evaluated, and in what a figure of ours differs from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Protocol:
    """The published evaluation: how many images, of how many classes, against which statistics (file name by image
    size), with which weights."""

    num_images: int
    num_classes: int
    statistics: Mapping[int, str]
    weights: tuple[str, ...]  # names of the average that was evaluated
    note: str


@dataclass(frozen=True)
class Figure:
    """What was done here: metric key, images, classes and size of the model, statistics file name, changed settings."""

    key: str
    num_images: int
    num_classes: int
    image_size: int
    statistics: str | None
    weights: str  # "first" average, or the name that was asked for
    changed: Mapping[str, Any]


def differences(figure: Figure, protocol: Protocol | None) -> list[str]:
    """Why `figure` does not compare with the paper's; empty if nothing known differs."""
    if protocol is None:
        return ["this method has no published protocol here"]
    if figure.num_classes != protocol.num_classes:
        return ["the paper's figures are for ImageNet"]
    wanted = protocol.statistics.get(figure.image_size)
    reasons = []
    if figure.key != "fid":
        reasons.append(f"{figure.key} is no FID")
    if figure.num_images != protocol.num_images:
        reasons.append(f"{figure.num_images} images where the paper drew {protocol.num_images}: fewer bias it upward")
    if wanted is None:
        reasons.append(f"the paper has no statistics for {figure.image_size} pixels")
    elif figure.statistics != wanted:
        reasons.append(f"statistics {figure.statistics}, the paper used {wanted}")
    if figure.weights not in ("first", *protocol.weights):
        reasons.append(f"weights {figure.weights}, the paper's are the average {protocol.weights[0]}")
    reasons += [f"sampling.{name} is {value}, the recipe has another" for name, value in figure.changed.items()]
    return reasons
