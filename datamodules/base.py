"""What all data modules share: the batch, row datasets read by key, and the loaders.

A subclass supplies `make_datasets()`; batch sizes, ranks, order and resume are handled here. `batch_size` is the global
batch of one optimiser step, so a recipe does not change with the number of processes or with gradient accumulation.
Batches: {"image": uint8 (B,3,H,W), "label": int64 (B,)} plus "caption": list of B strings where the set has captions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, NotRequired, TypedDict

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.sampler import PREFETCH_BATCHES, ResumableLoader, RowKey, StatelessSampler, as_batch, hash64


class Batch(TypedDict):
    """One batch; images are uint8 in 0..255, labels are class indices from 0."""

    image: Tensor  # (B, 3, H, W)
    label: Tensor  # (B,)
    caption: NotRequired[list[str]]


class RowDataset(Dataset, ABC):
    """Rows read in batches: `__getitems__` gets the keys of a batch and returns it, already collated."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitems__(self, keys: Sequence[RowKey]) -> Batch: ...

    def sampler(self, *, num_workers: int, **options: Any) -> StatelessSampler:
        """The order in which a loader with `num_workers` reads these rows; `options` as of StatelessSampler."""
        return StatelessSampler(len(self), **options)

    def limited(self, limit_n: int, *, seed: int) -> "RowDataset":
        """`limit_n` rows of these, drawn by `seed`."""
        return LimitedRows(self, limit_n, seed=seed)

    def __getitem__(self, index: int) -> Batch:
        """The batch of one row `index`, as epoch 0 shows it (for looking at a set)."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} is outside 0..{len(self) - 1}")
        return self.__getitems__([RowKey(0, index)])


class TensorRows(RowDataset):
    """Rows held in memory: `images` uint8 (N,3,H,W), `labels` int64 (N,), captions looked up by label."""

    def __init__(self, images: Tensor, labels: Tensor, *, captions: Sequence[str] | None = None) -> None:
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64 and len(images) == len(labels)
        self.images, self.labels, self.captions = images, labels, captions

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: Sequence[RowKey]) -> Batch:
        rows = torch.tensor([key.index for key in keys])  # (B,)
        batch: Batch = {"image": self.images.index_select(0, rows), "label": self.labels.index_select(0, rows)}
        if self.captions is not None:
            batch["caption"] = [self.captions[label] for label in batch["label"].tolist()]
        return batch


class LimitedRows(RowDataset):
    """`limit_n` rows of `dataset`, drawn by `seed` and kept in the set's order.

    Drawn, because the first rows of a sorted set are all of one class. A smaller limit gives a subset of a larger one.
    """

    def __init__(self, dataset: RowDataset, limit_n: int, *, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(hash64(seed) >> 1)
        self.dataset = dataset
        self.rows = torch.randperm(len(dataset), generator=generator)[:limit_n].sort().values

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, keys: Sequence[RowKey]) -> Batch:
        return self.dataset.__getitems__([RowKey(key.epoch, int(self.rows[key.index])) for key in keys])


class BatchData(L.LightningDataModule, ABC):
    """Common part of the data modules. `batch_size` is global; `limit_n` bounds training and validation rows each.

    `num_classes` and `class_names` are known before `setup` where that costs nothing, else None until then.
    Raises ValueError for sizes below 1.
    """

    num_classes: int | None = None
    class_names: list[str] | None = None
    # A set that can tell by itself what a drawn image shows defines this as a method: uint8 images (N,3,S,S) and the
    # labels (N,) that were asked for -> {"colour_acc": share in 0..1, ...}.
    score_samples: Callable[[Tensor, Tensor], dict[str, float]] | None = None

    def __init__(
        self, image_size: int, batch_size: int, *, num_workers: int = 0, seed: int = 0, limit_n: int | None = None
    ) -> None:
        super().__init__()
        check_counts(image_size=image_size, batch_size=batch_size, limit_n=limit_n)
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} must be 0 (read in the main process) or more")
        self.image_size, self.batch_size = image_size, batch_size
        self.num_workers, self.seed, self.limit_n = num_workers, seed, limit_n
        self.train_set: RowDataset | None = None
        self.val_set: RowDataset | None = None

    @abstractmethod
    def make_datasets(self) -> tuple[RowDataset, RowDataset | None]:
        """Returns the training rows and the validation rows (None: no validation)."""

    def discover_classes(self) -> int | None:
        """How many classes the labels have, as cheaply as it can be told before `setup`; None if it cannot."""
        return self.num_classes

    def setup(self, stage: str | None = None) -> None:
        """Makes both datasets once, whatever the stage: a set without its validation split should fail at the start.

        Raises ValueError under Trainer(overfit_batches=...), which puts its own sampler in place of ours.
        """
        if self.trainer is not None and self.trainer.overfit_batches:
            raise ValueError(
                f"overfit_batches={self.trainer.overfit_batches} is not supported: use limit_n of the data module"
            )
        if self.train_set is None:
            train, val = self.make_datasets()
            self.train_set, self.val_set = self._limited(train), None if val is None else self._limited(val)

    def steps_per_epoch(self) -> int:
        """Optimiser steps that the trainer takes in one epoch."""
        sampler = self._sampler(self._ready(), shuffle=True, **self._share())
        batches = self._epoch_batches(len(sampler) // sampler.batch_size)
        return -(-batches // (self.trainer.accumulate_grad_batches if self.trainer else 1))

    def train_dataloader(self) -> ResumableLoader:
        """Loader of whole global batches in shuffled order; each batch holds this process's share of one."""
        rows = self._ready()
        sampler = self._sampler(rows, shuffle=True, **self._share())
        return ResumableLoader(
            rows,
            sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self._on_cuda(),
            epoch_batches=self._epoch_batches(len(sampler) // sampler.batch_size),
        )

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Loader over every validation row once, in order; an empty list when there is no validation set.

        Raises ValueError for fewer rows than processes: one without any would skip what the others wait for it in.
        """
        self._ready()
        if self.val_set is None:
            return []
        share = self._share()
        if len(self.val_set) < share["world_size"]:
            raise ValueError(
                f"there are {len(self.val_set)} validation rows for {share['world_size']} processes: lower"
                f" --trainer.devices, or take more rows (limit_n, val_length or val_split of the data)"
            )
        return self.ordered_loader("val", **share)

    def ordered_loader(self, split: Literal["train", "val"], *, rank: int = 0, world_size: int = 1) -> DataLoader:
        """Rows of a split for one of `world_size` processes, unshuffled: each row exactly once over all of them.

        Process `rank` reads rows rank, rank + world_size, ... in that order; of a stream it reads a range of rows, and
        its workers deal their batches in turn, so that the order depends on `num_workers`. Only that each row comes
        once may be relied upon.
        Raises ValueError if there is no validation set.
        """
        rows = self._rows_of(split)
        sampler = self._sampler(rows, shuffle=False, rank=rank, world_size=world_size)
        return DataLoader(
            rows,
            batch_size=sampler.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self._on_cuda(),
            prefetch_factor=PREFETCH_BATCHES if self.num_workers > 0 else None,
            collate_fn=as_batch,
            generator=torch.Generator().manual_seed(hash64(self.seed) >> 1),
        )

    def split_length(self, split: Literal["train", "val"]) -> int:
        """Rows of a split. Raises ValueError if there is no validation set."""
        return len(self._rows_of(split))

    def _ready(self) -> RowDataset:
        if self.train_set is None:
            raise RuntimeError(f"{type(self).__name__} has no rows yet: call setup() before asking for a loader")
        return self.train_set

    def _rows_of(self, split: str) -> RowDataset:
        train = self._ready()
        if split == "val" and self.val_set is None:
            raise ValueError("this data has no validation split: name one with --data.init_args.val_split")
        return train if split == "train" else self.val_set

    def _limited(self, rows: RowDataset) -> RowDataset:
        return rows if self.limit_n is None else rows.limited(self.limit_n, seed=self.seed)

    def _share(self) -> dict[str, int]:
        """Which process of how many this is."""
        trainer = self.trainer
        return {"rank": trainer.global_rank if trainer else 0, "world_size": trainer.world_size if trainer else 1}

    def _sampler(self, rows: RowDataset, *, shuffle: bool, rank: int, world_size: int) -> StatelessSampler:
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        if accumulate < 1:
            raise ValueError(f"--trainer.accumulate_grad_batches={accumulate} must be at least 1")
        return rows.sampler(
            num_workers=self.num_workers,
            global_batch_size=self.batch_size,
            seed=self.seed,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
            accumulate=accumulate,
        )

    def _on_cuda(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _epoch_batches(self, batches: int) -> int:
        """Batches that Lightning takes per epoch: the loader must agree with it on where an epoch ends."""
        if self.trainer is None:
            return batches
        limit = self.trainer.limit_train_batches
        return max(1, min(batches, limit if isinstance(limit, int) else int(batches * limit)))


def check_counts(**counts: int | None) -> None:
    """Raise ValueError unless these arguments are 1 or more, or None."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
