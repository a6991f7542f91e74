"""Row order: a stateless sampler and a loader that resumes in the middle of an epoch, exactly.

The order of an epoch is a pure function of (seed, epoch); a position in the run is two integers. So a checkpoint holds
no row list, every rank can use the state of rank 0, and nothing depends on the global random state or on the workers.
The sampler yields `RowKey(epoch, index)`, not bare indices: whatever is random about a row (its flip) is derived from
its key, so worker processes need not be told the epoch. Counts are batches of one process unless said otherwise.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

PREFETCH_BATCHES = 4  # per worker

_MASK64 = (1 << 64) - 1


class RowKey(NamedTuple):
    """Names one use of one row: the epoch it is read in and its index in the dataset."""

    epoch: int
    index: int


def hash64(*values: int) -> int:
    """Mixes integers into 64 well-spread bits: one SplitMix64 round (Steele, Lea, Flood 2014) per value."""
    state = 0
    for value in values:
        state = ((state ^ (value & _MASK64)) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


def coin(seed: int, key: RowKey) -> bool:
    """A fair coin for one row in one epoch: the same on every rank, worker and resumed run."""
    return bool(hash64(seed, key.epoch, key.index) >> 63)


class StatelessSampler(DistributedSampler):
    """Rows of one rank in one epoch, as `RowKey`s.

    `shuffle=True` is the training order: a permutation seeded by (seed, epoch), cut to whole global batches; rank r
    takes perm[r::world_size], so that batch k of all ranks together is the same set of rows for any number of ranks.
    `shuffle=False` is the validation order: rank r takes rows r, r + world_size, ...; every row exactly once over all
    ranks, with no duplicates as padding, so ranks may differ by one row and therefore by one batch.

    It is a DistributedSampler only so that Lightning never wraps it: by default Lightning would stride the ranks again.

    Raises ValueError when `global_batch_size` cannot be divided or no whole training batch exists.
    """

    def __init__(
        self,
        length: int,
        *,
        global_batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> None:
        """`length`: rows of the dataset. `accumulate`: batches of one process per optimiser step."""
        parts = world_size * accumulate
        if global_batch_size < 1 or global_batch_size % parts:
            raise ValueError(
                f"batch_size={global_batch_size} (global) is not a positive multiple of world_size={world_size} x"
                f" accumulate_grad_batches={accumulate}: choose a multiple of {parts}"
            )
        if shuffle and length < global_batch_size:
            raise ValueError(
                f"batch_size={global_batch_size} (global) exceeds the {length} training rows: lower batch_size"
            )
        super().__init__(range(length), num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
        self.length = length
        self.batch_size = global_batch_size // parts  # rows of one process
        self.usable = length // global_batch_size * global_batch_size if shuffle else length
        self.start = 0  # batches of this rank to leave out at the head of the next iteration

    @property
    def layout(self) -> dict[str, int]:
        """What the order of a rank depends on besides seed and epoch and may not change inside an epoch: nothing."""
        return {}

    def __len__(self) -> int:
        """Rows of this rank in a whole epoch, whatever `start` is."""
        return len(range(self.rank, self.usable, self.num_replicas))

    def __iter__(self) -> Iterator[RowKey]:
        epoch = self.epoch
        for index in self._order(epoch)[self.start * self.batch_size :].tolist():
            yield RowKey(epoch, index)

    def _order(self, epoch: int) -> torch.Tensor:
        """Row indices of this rank, int64 (len(self),)."""
        if not self.shuffle:
            return torch.arange(self.rank, self.length, self.num_replicas)
        generator = torch.Generator().manual_seed(hash64(self.seed, epoch) >> 1)
        return torch.randperm(self.length, generator=generator)[self.rank : self.usable : self.num_replicas]


def as_batch(batch: Any) -> Any:
    """Collate function of datasets whose `__getitems__` returns a finished batch."""
    return batch


class ResumableLoader(DataLoader):
    """DataLoader over a training `StatelessSampler` that goes on exactly where a loaded state stopped.

    `dataset` implements `__getitems__(keys) -> batch`. Iterating again continues the run: after a whole epoch with the
    next one, after a part of an epoch with its next batch. The loader counts epochs itself and reads `sampler.epoch`
    only before its first batch: after a stop by `max_steps` Lightning resumes with an epoch counter that is one too
    high.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: StatelessSampler,
        *,
        num_workers: int = 0,
        persistent_workers: bool = False,
        pin_memory: bool = False,
        epoch_batches: int | None = None,
    ) -> None:
        """`epoch_batches`: batches of this process that make an epoch, if fewer than the sampler has."""
        super().__init__(
            dataset,
            batch_size=sampler.batch_size,
            sampler=sampler,
            num_workers=num_workers,
            persistent_workers=persistent_workers,
            pin_memory=pin_memory,
            prefetch_factor=PREFETCH_BATCHES if num_workers > 0 else None,
            collate_fn=as_batch,
            # its own generator: a new iteration then draws nothing from the global one, which models may use
            generator=torch.Generator().manual_seed(hash64(sampler.seed) >> 1),
        )
        self.epoch_batches = len(self) if epoch_batches is None else min(epoch_batches, len(self))
        self._epoch: int | None = None  # None: nothing read and nothing loaded yet
        self._done = 0

    def __iter__(self) -> Iterator[Any]:
        # A generator starts at its first `next`. Lightning calls iter() before it sets the epoch, and a DataLoader with
        # workers reads ahead from within iter(): the first batches of a resumed run would come from epoch 0.
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        self._epoch, self._done = self._position()
        self.sampler.set_epoch(self._epoch)
        self.sampler.start = self._done
        for batch in islice(super().__iter__(), self.epoch_batches - self._done):
            self._done += 1
            yield batch

    def _position(self) -> tuple[int, int]:
        """(epoch, batches already done in it) at which the next iteration starts."""
        if self._epoch is None:
            return self.sampler.epoch, 0
        return (self._epoch, self._done) if self._done < self.epoch_batches else (self._epoch + 1, 0)

    def state_dict(self) -> dict[str, int]:
        """Position after the last batch handed out; equal on all ranks. `batches`: length of an epoch."""
        epoch = self.sampler.epoch if self._epoch is None else self._epoch
        return {"epoch": epoch, "done": self._done, "batches": self.epoch_batches, **self.sampler.layout}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ValueError for a state inside an epoch of another length or layout (other batch size, rows, ...)."""
        inside = 0 < state["done"] < state["batches"]
        if inside and state["batches"] != self.epoch_batches:
            raise ValueError(
                f"checkpoint lies inside an epoch of {state['batches']} batches but an epoch now has"
                f" {self.epoch_batches}: keep batch_size, accumulate_grad_batches and rows, or resume at an epoch end"
            )
        layout = self.sampler.layout
        saved = {name: value for name, value in state.items() if name not in ("epoch", "done", "batches")}
        if inside and saved != layout:
            name = next(name for name in {**saved, **layout} if saved.get(name) != layout.get(name))
            raise ValueError(
                f"checkpoint lies inside an epoch of a stream read with {name}={saved.get(name)}, but it is now"
                f" {layout.get(name)}: keep it, or resume at an epoch end"
            )
        ended = state["done"] >= state["batches"]
        self._epoch = state["epoch"] + 1 if ended else state["epoch"]
        self._done = 0 if ended else state["done"]
