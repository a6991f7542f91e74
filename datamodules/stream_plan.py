"""The order of a stream: which rows a process and a worker read, known beforehand and exact.

A stream is a list of shards that are read from front to back; the number of rows of each is known. In an epoch the
shards are permuted by (seed, epoch) and their rows numbered through. Each process takes one contiguous range of these,
each of its workers one contiguous part of that, so that every shard is opened by few and read once. Within a part,
chunks of `shuffle_buffer` rows are shuffled. All of this is a pure function of (seed, epoch, world size, workers): a
position is the number of batches done, as for the map-style sampler, and skipping to it needs no replay.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate as running_sum
from typing import NamedTuple

import torch

from datamodules.sampler import StatelessSampler, hash64


class Span(NamedTuple):
    """Rows `start` to `stop` of shard `shard`."""

    shard: int
    start: int
    stop: int


class StreamKey(NamedTuple):
    """Names one use of one row, as `RowKey` does, and the chunk that is read and held to serve it.

    `index` counts rows in the order of the source, so that a row's coin depends on neither ranks nor workers.
    """

    epoch: int
    index: int
    chunk: tuple[Span, ...]


class StreamSampler(StatelessSampler):
    """Rows of one rank in one epoch, as `StreamKey`s; batch k is for worker k mod num_workers, as DataLoader deals.

    `shuffle=True`, training: whole global batches, so all ranks have equally many, and each row at most once. A chunk
    holds as many whole batches as fit into `shuffle_buffer`, at least one. `shuffle=False`, validation: every row once
    over all ranks, each worker's part in order; ranks may differ by one row and therefore by one batch.

    Raises ValueError for a `shuffle_buffer` below 1, and as `StatelessSampler` does.
    """

    def __init__(
        self,
        shard_rows: Sequence[int],
        *,
        global_batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        shuffle_buffer: int = 1,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        num_workers: int = 0,
    ) -> None:
        """`shard_rows`: rows of each shard. `num_workers`: of the loader; 0 reads like 1."""
        super().__init__(
            sum(shard_rows),
            global_batch_size=global_batch_size,
            seed=seed,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
            accumulate=accumulate,
        )
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer={shuffle_buffer} must be at least 1 row")
        self.shard_rows = list(shard_rows)
        self.num_workers = max(1, num_workers)
        self.chunk_batches = max(1, shuffle_buffer // self.batch_size) if shuffle else 1
        self.num_batches = -(-len(self) // self.batch_size)
        share, extra = divmod(self.usable, world_size)
        self._worker_starts = self._parts(rank * share + min(rank, extra))

    @property
    def layout(self) -> dict[str, int]:
        """What fixes the order besides seed and epoch: it cannot change inside an epoch."""
        return {
            "rows": self.length,
            "batch_size": self.batch_size,
            "world_size": self.num_replicas,
            "num_workers": self.num_workers,
            "chunk_batches": self.chunk_batches,
        }

    def __iter__(self) -> Iterator[StreamKey]:
        epoch, plan = self.epoch, self._plan(self.epoch)
        held: list[list[StreamKey]] = [[] for _ in range(self.num_workers)]  # rows of each worker's current chunk
        for number in range(self.start, self.num_batches):
            worker, own = number % self.num_workers, number // self.num_workers
            chunk, inside = divmod(own, self.chunk_batches)
            if inside == 0 or not held[worker]:
                held[worker] = self._chunk(plan, epoch, worker, chunk)
            yield from held[worker][inside * self.batch_size : (inside + 1) * self.batch_size]

    def _parts(self, start: int) -> list[int]:
        """First row of each worker's part, and the end of the last one, when the rank's rows begin at `start`."""
        batches = [len(range(worker, self.num_batches, self.num_workers)) for worker in range(self.num_workers)]
        rows = [count * self.batch_size for count in batches]
        if self.num_batches:  # the last batch may be short
            rows[(self.num_batches - 1) % self.num_workers] -= self.num_batches * self.batch_size - len(self)
        return [start, *(start + end for end in running_sum(rows))]

    def _plan(self, epoch: int) -> "_EpochPlan":
        order = list(range(len(self.shard_rows)))
        if self.shuffle:
            generator = torch.Generator().manual_seed(hash64(self.seed, epoch) >> 1)
            order = torch.randperm(len(order), generator=generator).tolist()
        return _EpochPlan(self.shard_rows, order)

    def _chunk(self, plan: "_EpochPlan", epoch: int, worker: int, number: int) -> list[StreamKey]:
        """Rows of chunk `number` of `worker`, in the order in which they are used."""
        size = self.chunk_batches * self.batch_size
        start = self._worker_starts[worker] + number * size
        spans = plan.spans(start, min(start + size, self._worker_starts[worker + 1]))
        rows = [plan.first_index[span.shard] + row for span in spans for row in range(span.start, span.stop)]
        if self.shuffle:
            generator = torch.Generator().manual_seed(hash64(self.seed, epoch, start) >> 1)
            rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        return [StreamKey(epoch, row, spans) for row in rows]


class _EpochPlan:
    """Shards in the order of one epoch, with their rows numbered through."""

    def __init__(self, shard_rows: Sequence[int], order: Sequence[int]) -> None:
        self.shard_rows, self.order = shard_rows, order
        self.ends = list(running_sum(shard_rows[shard] for shard in order))
        self.first_index = [0, *running_sum(shard_rows)]  # of each shard, in the order of the source

    def spans(self, start: int, stop: int) -> tuple[Span, ...]:
        """Where rows `start` to `stop` of the epoch are."""
        spans = []
        for place in range(bisect_right(self.ends, start), len(self.order)):
            shard = self.order[place]
            begin = self.ends[place] - self.shard_rows[shard]
            if begin >= stop:
                break
            if self.shard_rows[shard]:
                spans.append(Span(shard, max(start - begin, 0), min(stop - begin, self.shard_rows[shard])))
        return tuple(spans)
