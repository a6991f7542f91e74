"""Figures of predicted label maps: panoptic quality (Kirillov et al., arXiv 1801.00868) and errors of depth.

Sums are kept by name, so that those of several processes can be added; `figures` makes the averages of them. Panoptic
quality follows COCO's panopticapi: void pixels of the truth count neither for nor against a prediction. Crowds are
void here, but there only to predictions of their own class that match nothing. Depth follows big_vision's
`evaluators/proj/givt/nyu_depth.py`: figures of each image over its measured pixels, then their mean.
"""

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

MATCHED = 0.5  # two segments of one class with more than this overlap, intersection over union, are the same
Sums = dict[str, float]


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (K, H, W) of any dtype -> (K, *size): each pixel is the nearest one, so ids are never mixed."""
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    rows, columns = (
        ((torch.arange(new, device=maps.device) + 0.5) * old / new).long()
        for new, old in zip(size, maps.shape[1:], strict=True)
    )
    return maps[:, rows[:, None], columns]


def segments(maps: Tensor, stuff: Collection[int]) -> Tensor:
    """Class and instance (2, H, W) -> a number for each pixel's segment (H W,), 0 for void; all pixels of a `stuff`
    class are one segment."""
    classes, instances = maps.long().flatten(1)
    one = torch.isin(classes, torch.tensor(list(stuff), dtype=torch.int64, device=classes.device))
    return torch.where(classes > 0, classes << 32 | torch.where(one, 0, instances.clamp_min(0)), 0)


def panoptic_sums(predicted: Tensor, truth: Tensor, stuff: Collection[int] = ()) -> Sums:
    """Of one image, maps (2, H, W) both: by class "c/iou" over matched segments, and "c/tp", "c/fp", "c/fn"."""
    pairs, counts = torch.stack([segments(m, stuff) for m in (truth, predicted)]).unique(dim=1, return_counts=True)
    shared = {(t, p): n for t, p, n in zip(*pairs.tolist(), counts.tolist(), strict=True)}
    areas = [_areas(shared, side) for side in (0, 1)]
    sums: Sums = {}
    matched: set[tuple[int, int]] = set()  # (side, segment)
    for (t, p), inside in shared.items():
        union = areas[0][t] + areas[1][p] - inside - shared.get((0, p), 0)
        if t and p and t >> 32 == p >> 32 and inside > MATCHED * union:
            matched |= {(0, t), (1, p)}
            _add(sums, t, "iou", inside / union)
            _add(sums, t, "tp", 1)
    for t in areas[0]:
        if t and (0, t) not in matched:
            _add(sums, t, "fn", 1)
    for p, area in areas[1].items():
        if p and (1, p) not in matched and shared.get((0, p), 0) <= MATCHED * area:
            _add(sums, p, "fp", 1)
    return sums


def _areas(shared: Mapping[tuple[int, int], int], side: int) -> dict[int, int]:
    areas: dict[int, int] = {}
    for pair, count in shared.items():
        areas[pair[side]] = areas.get(pair[side], 0) + count
    return areas


def _add(sums: Sums, segment: int, what: str, value: float) -> None:
    name = f"{segment >> 32}/{what}"
    sums[name] = sums.get(name, 0.0) + value


def panoptic_figures(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over the classes that occurred: "pq" = "sq" (of matched overlaps) x "rq" (of segments found), per class."""
    classes = {name.split("/")[0] for name in sums}
    if not classes:
        return {}
    rows = [[sums.get(f"{c}/{what}", 0.0) for what in ("iou", "tp", "fp", "fn")] for c in sorted(classes)]
    quality = [(iou / max(tp, 1), tp / (tp + (fp + fn) / 2)) for iou, tp, fp, fn in rows]
    values = {"pq": [s * r for s, r in quality], "sq": [s for s, _ in quality], "rq": [r for _, r in quality]}
    return {name: sum(column) / len(column) for name, column in values.items()}


def depth_sums(predicted: Tensor, truth: Tensor, *, low: float, high: float) -> Sums:
    """Of one image, depth (1, H, W) both, over pixels whose truth lies between low and high; nothing without any."""
    valid = (truth > low) & (truth < high)
    if not valid.any():
        return {}
    truth, predicted = truth[valid].double(), predicted[valid].double()
    ratio = torch.maximum(truth / predicted, predicted / truth)
    figures = {
        "rmse": F.mse_loss(predicted, truth).sqrt(),
        "abs_rel": ((predicted - truth).abs() / truth).mean(),
        "delta1": (ratio < 1.25).double().mean(),
    }
    return {name: float(value) for name, value in figures.items()} | {"images": 1.0}


def depth_figures(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over images: "rmse" in the unit of the depth, "abs_rel", and "delta1", the share within a quarter."""
    return {name: value / sums["images"] for name, value in sums.items() if name != "images"}
