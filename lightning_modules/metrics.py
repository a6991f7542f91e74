"""The one evaluation metric: images in, one forward of an extractor, exact sums, every figure out.

Sums of f and f f^T are float64, so neither the batch size nor the number of processes changes a distance; logits and
features are kept with their image's index and sorted by it, so IS and the neighbour figures do not depend on the order
of arrival either. torchmetrics' own FID and InceptionScore resize as no paper did, and run two networks
(`docs/parity.md`). In: uint8 images (N, 3, H, W) and their indices. Out: {"fid" or "fd_<extractor>": ..., "is": ...}.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

from layers.processes import several_processes
from lightning_modules.extractors import Extractor
from lightning_modules.reference import Reference
from lightning_modules.scores import (
    IS_SPLITS,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_covariance,
    precision_recall,
)

KNN_IMAGES = 10_000  # real images in precision, recall, density and coverage, as many as ADM's reference holds
KNN_LEAST = 10  # below it neighbours say nothing


class GenerationMetric(Metric):
    """Accumulates features of images; `compute` gives means over all processes, the same on each.

    `keep_features`: the most images whose features are kept, evenly spread over the indices; 0 keeps none. Images of
    an index that was seen before (padding of a last batch) are left out.
    """

    full_state_update = False

    def __init__(self, extractor: Extractor, *, num_images: int, keep_features: int = 0) -> None:
        # torchmetrics' own gather would hold a covariance per process: sums are reduced here instead
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self.extractor = extractor
        if keep_features < 0:
            raise ValueError(f"the number of images whose features are kept is {keep_features}: 0 keeps none")
        self.stride = -(-num_images // keep_features) if keep_features else 0
        dim = extractor.dim
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(dim, dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("index", [], dist_reduce_fx="cat")
        self.add_state("logits", [], dist_reduce_fx="cat")
        self.add_state("kept_index", [], dist_reduce_fx="cat")
        self.add_state("kept", [], dist_reduce_fx="cat")
        self._seen: set[int] = set()

    def reset(self) -> None:
        super().reset()
        self._seen = set()

    def update(self, images: Tensor, index: Tensor) -> None:
        """uint8 images (N, 3, H, W); `index` int64 (N,) on the host: which image of the whole set each one is.

        Raises ValueError if the sums are no longer float64: rounded ones put the covariance off by more than itself.
        """
        if self.outer.dtype != torch.float64:
            raise ValueError(
                f"the metric was cast to {self.outer.dtype}, its sums need float64: keep it out of modules"
            )
        fresh = [row for row, i in enumerate(index.tolist()) if i not in self._seen]
        self._seen.update(index.tolist())
        if not fresh:
            return
        if len(fresh) < len(index):
            index, images = index[fresh], images[fresh]
        features, logits = self.extractor(images)  # (n, d), (n, K)
        wide = features.double()
        self.count += len(index)
        self.total += wide.sum(0)
        self.outer += wide.T @ wide
        if logits is not None:
            self.index.append(index.to(logits.device))
            self.logits.append(logits)
        if self.stride:
            chosen = [row for row, i in enumerate(index.tolist()) if i % self.stride == 0]
            self.kept_index.append(index[chosen].to(features.device))
            self.kept.append(features[chosen])

    def gathered(self) -> "GatheredFeatures":
        """Sums and rows of all processes."""
        count, total, outer = (_sum_over_ranks(value) for value in (self.count, self.total, self.outer))
        logits = _rows_over_ranks(self.index, self.logits) if self.extractor.has_logits else None
        kept = _rows_over_ranks(self.kept_index, self.kept) if self.stride else None
        mu, sigma = mean_covariance(int(count), total, outer)
        return GatheredFeatures(int(count), mu, sigma, logits, kept)

    def compute(self, reference: Reference | None = None) -> dict[str, float]:
        """Figures against `reference`, and those that need none.

        Keys: fid or fd_<extractor>; is, is_std; with features in the reference also kid (kd_<extractor>), precision,
        recall, density, coverage. "n" is the number of images.
        """
        return figures(self.gathered(), self.extractor, reference)


class GatheredFeatures:
    """What all processes saw: count n, mean (d,), covariance (d, d), logits (n, K) and kept features (m, d) in order of
    the image index."""

    def __init__(self, n: int, mu: Tensor, sigma: Tensor, logits: Tensor | None, kept: Tensor | None) -> None:
        self.n, self.mu, self.sigma, self.logits, self.kept = n, mu.cpu(), sigma.cpu(), logits, kept


def figures(seen: GatheredFeatures, extractor: Extractor, reference: Reference | None) -> dict[str, float]:
    """Every figure that these features allow; see GenerationMetric.compute."""
    key = extractor.key
    values: dict[str, float] = {"n": seen.n}
    if reference is not None:
        values[key] = frechet_distance(seen.mu, seen.sigma, reference.mu, reference.sigma)
    if seen.logits is not None and seen.n >= IS_SPLITS:
        prefix = "is" if key == "fid" else f"is_{key.removeprefix('fd_')}"
        values[prefix], values[f"{prefix}_std"] = inception_score(seen.logits)
    real = None if reference is None else reference.features
    if seen.kept is not None and real is not None and min(len(seen.kept), len(real)) >= KNN_LEAST:
        prefix = "kid" if key == "fid" else f"kd_{key.removeprefix('fd_')}"
        values[prefix], values[f"{prefix}_std"] = kernel_distance(seen.kept, real)
        values["precision"], values["recall"] = precision_recall(seen.kept, real)
        values["density"], values["coverage"] = density_coverage(seen.kept, real)
    return values


def _sum_over_ranks(value: Tensor) -> Tensor:
    value = value.clone()
    if several_processes():
        torch.distributed.all_reduce(value)
    return value


def _rows_over_ranks(index: list[Tensor], rows: list[Tensor]) -> Tensor:
    """Rows of all processes on the host, in order of their index, each index once; a process may have none."""
    parts = [([part.cpu() for part in index], [part.cpu() for part in rows])]
    if several_processes():
        parts = [parts[0]] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, parts[0])
    order, values = (torch.cat([part for rank in parts for part in rank[i]]) for i in (0, 1))
    order, position = order.sort(stable=True)
    first = torch.cat([torch.tensor([True]), order[1:] != order[:-1]])
    return values[position[first]]
