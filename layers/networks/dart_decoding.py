"""The steps of DART's sampler on its network: tokens that come next -> h, with a cache that conditions have entered.

On CUDA the steps can be captured as graphs, one for each step and number of rows, where launching some thousand small
kernels takes longer than they do. The cache then stays where it is, because captured kernels write to its addresses.
"""

from collections.abc import Callable

from torch import Tensor

from layers.cuda_graphs import Capture, Graphed
from layers.kv_cache import KVCache
from layers.networks.dart import DART, Condition

Advance = Callable[[Tensor], Tensor]  # tokens that come next (B, L, D) -> h (B, L, E)


class DARTDecoder:
    """Not a module: it holds no weights, only the network that has them."""

    def __init__(self, net: DART) -> None:
        self.net = net
        self._captured: Graphed | None = None
        self._caches: dict[int, KVCache] = {}  # of captured steps, by number of rows

    def capture(self, capture: Capture | None = None) -> None:
        """From now on steps are captured when they first occur; `capture` is CUDA's by default."""
        self._captured = Graphed(self._step, capture=capture)

    def start(self, condition: Condition, rows: int) -> Advance:
        """A new sample of `rows` sequences under these conditions."""
        kept = self._captured is not None
        cache = self._kept_cache(rows) if kept else self.net.init_cache(rows, self.net.rope.device)
        if condition.prefix is not None:
            self.net.begin(condition.prefix, cache)

        def advance(x: Tensor) -> Tensor:
            if self._captured is None:
                return self.net.extend(x, condition.vectors, cache)
            place = cache.filled
            h = self._captured(x, condition.vectors, place)
            cache.filled = place + x.shape[1]  # a replayed graph moves nothing on the host
            return h

        return advance

    def _kept_cache(self, rows: int) -> KVCache:
        if rows not in self._caches:
            self._caches[rows] = self.net.init_cache(rows, self.net.rope.device)
        self._caches[rows].filled = 0
        return self._caches[rows]

    def _step(self, x: Tensor, vectors: Tensor | None, place: int) -> Tensor:
        cache = self._caches[len(x)]
        cache.filled = place
        return self.net.extend(x, vectors, cache)
