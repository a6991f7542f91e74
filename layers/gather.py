"""Rows by index, the same number for every item of a batch: no boolean mask, so no wait for the device."""

from torch import Tensor


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, R) of x (B, L, ...) -> (B, R, ...). A table (1, L, ...) is shared by the batch."""
    expanded = x.expand(len(index), *x.shape[1:])
    return expanded.gather(1, _wide(index, x))


def put(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """A copy of x (B, L, ...) with rows (B, R, ...) at `index` (B, R)."""
    return x.scatter(1, _wide(index, x), rows.to(x.dtype))


def _wide(index: Tensor, x: Tensor) -> Tensor:
    return index.reshape(*index.shape, *[1] * (x.ndim - 2)).expand(*index.shape, *x.shape[2:])
