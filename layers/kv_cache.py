"""Keys and values of earlier positions, for decoding one token at a time.

Preallocated and explicit: the caller makes it, passes it down and tells it how far the sequence has come.
"""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of `depth` layers for `length` positions; `filled` of them hold something.

    Every layer writes at the same place; `advance` moves it on once all of them have.
    """

    def __init__(
        self,
        depth: int,
        batch: int,
        *,
        num_heads: int,
        length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (depth, 2, batch, num_heads, length, head_dim)
        self.store = torch.zeros(shape, dtype=dtype, device=device)
        self.length, self.filled = length, 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new (B, N, L, d) of a layer; return all of its keys and values so far (B, N, filled + L, d)."""
        end = self.filled + keys.shape[2]
        assert end <= self.length, f"{end} positions in a cache of {self.length}"
        self.store[layer, 0, :, :, self.filled : end] = keys
        self.store[layer, 1, :, :, self.filled : end] = values
        return self.store[layer, 0, :, :, :end], self.store[layer, 1, :, :, :end]

    def advance(self, positions: int) -> None:
        """The next `extend` of every layer writes `positions` further on."""
        self.filled += positions
