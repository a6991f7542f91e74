"""Scoring a module: draw the images of a set once, and take every figure from them.

Used by the callback `fid`, by `make eval` and by `make sweep`, so that a curve of a training run and a table mean the
same (up to the float type that images are drawn in).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.base import sum_over_ranks
from lightning_modules.extractors import Extractor
from lightning_modules.generate import Drawn
from lightning_modules.metrics import GenerationMetric
from lightning_modules.reference import Reference

Judge = Callable[[Tensor, Tensor], dict[str, float]]  # uint8 images (B, 3, H, W), labels (B,) -> means over them


@dataclass
class Evaluation:
    """What to measure. `extractor` None: only what `judge` says. `reference` None: only what needs no real images."""

    num_images: int
    extractor: Extractor | None = None
    reference: Reference | None = None
    judge: Judge | None = None

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError(f"the number of images is {self.num_images}: it must be positive")
        if self.extractor is not None and self.num_images < 2:
            raise ValueError("one image has no covariance: a distance needs at least two (NUM=, fid.num_images)")
        if self.reference is not None and self.extractor is None:
            raise ValueError("statistics are given but no extractor to compare with them: name one (EXTRACTOR=)")

    def __call__(self, drawn: Iterable[Drawn], *, device: torch.device | str) -> dict[str, float]:
        """Figures over the images of all processes, of which `drawn` are this one's; the same on each process."""
        metric = self._metric(device)
        sums: dict[str, float] = {}
        for index, labels, images in drawn:
            if metric is not None:
                metric.update(images, index)
            for name, value in self._judged(images, labels).items():
                sums[name] = sums.get(name, 0.0) + value * len(index)
            sums["images"] = sums.get("images", 0.0) + len(index)
        sums = sum_over_ranks(sums)
        count = sums.pop("images", 0.0)
        figures = metric.compute(self._resolved(device)) if metric is not None else {"n": int(count)}
        return figures | {name: value / count for name, value in sums.items()}

    def _metric(self, device: torch.device | str) -> GenerationMetric | None:
        if self.extractor is None:
            return None
        wants_rows = self.reference is not None and (
            self.reference.features is not None or self.reference.images is not None
        )
        keep = self.num_images if wants_rows else 0  # all of them, as ADM's evaluator has it
        return GenerationMetric(self.extractor, num_images=self.num_images, keep_features=keep).to(device)

    def _resolved(self, device: torch.device | str) -> Reference | None:
        """The reference with features, computed once where the file holds images instead."""
        if self.reference is not None and self.reference.features is None:
            self.reference.features = self.reference.features_by(self.extractor, device=device)
        return self.reference

    def _judged(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        return self.judge(images.cpu(), labels) if self.judge else {}
