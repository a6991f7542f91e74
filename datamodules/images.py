"""Images of any source, centre-cropped: ImageNet from the hub or a folder, one's own pictures, parquet files.

Map-style: every row can be read at any time, so order and resume are exact (sampler.py). Worker processes decode,
convert to RGB, crop after ADM, and mirror training images with probability 1/2; the coin of a row depends on (seed,
epoch, row), so it is the same for any number of ranks and workers. Out: uint8 (B,3,S,S), labels int64 (B,), captions
where the set has them.
"""

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from datamodules.base import Batch, BatchData, RowDataset
from datamodules.sampler import RowKey, coin
from datamodules.sources import ArrowStore, FolderStore, RawRow, is_local, open_splits, open_store, pick_split
from datamodules.transforms import center_crop, flip_horizontal, to_uint8_chw


class ImageRows(RowDataset):
    """Decoded rows of a store. Raises ValueError, naming the row, for a corrupt image or a label out of range."""

    def __init__(
        self,
        store: FolderStore | ArrowStore,
        image_size: int,
        *,
        num_classes: int | None = None,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.store, self.image_size, self.num_classes = store, image_size, num_classes
        self.flip, self.seed = flip, seed

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, keys: Sequence[RowKey]) -> Batch:
        rows = self.store.fetch([key.index for key in keys])
        images = [self._image(row, key) for row, key in zip(rows, keys, strict=True)]
        batch: Batch = {
            "image": torch.stack(images),  # (B, 3, S, S)
            "label": torch.tensor([self._label(row) for row in rows]),  # (B,)
        }
        captions = [row.caption for row in rows if row.caption is not None]
        if captions:
            batch["caption"] = captions
        return batch

    def _image(self, row: RawRow, key: RowKey) -> Tensor:
        image = to_uint8_chw(center_crop(decode(row.data, row.name), self.image_size))  # (3, S, S)
        return flip_horizontal(image, self.flip and coin(self.seed, key))

    def _label(self, row: RawRow) -> int:
        if row.label < 0:
            raise ValueError(f"{row.name} has label {row.label}: the split is not labelled, use another one")
        if self.num_classes is not None and row.label >= self.num_classes:
            raise ValueError(
                f"{row.name} has label {row.label}, but num_classes={self.num_classes}: use at least {row.label + 1}"
            )
        return row.label


class ImageData(BatchData):
    """Rows of `source`: a hub id, a folder of images, a parquet or arrow file (or folder), or a `save_to_disk` folder.

    A folder holds one sub-folder per class, or images only (label 0), or such folders called train, val, ... `columns`
    maps image, label and caption to the names of the source. `num_classes` may be left out where the source names its
    classes; 1 also admits a source without labels. `split`, `val_split`: "val" and "validation" are the same.
    """

    def __init__(
        self,
        source: str,
        image_size: int = 256,
        *,
        batch_size: int = 1024,
        split: str = "train",
        val_split: str | None = "validation",
        columns: dict[str, str] | None = None,
        num_classes: int | None = None,
        flip: bool = True,
        num_workers: int = 8,
        cache_dir: str | None = None,
        limit_n: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(image_size, batch_size, num_workers=num_workers, seed=seed, limit_n=limit_n)
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1")
        self.source, self.split, self.val_split = source, split, val_split
        self.columns, self.flip, self.cache_dir = columns, flip, cache_dir
        self.num_classes = num_classes

    def prepare_data(self) -> None:
        """Downloads a hub dataset; Lightning calls this in one process per node, before `setup` in all of them."""
        if not is_local(self.source):
            open_splits(self.source, cache_dir=self.cache_dir)

    def make_datasets(self) -> tuple[RowDataset, RowDataset | None]:
        """Opens both splits. Raises ValueError if their classes differ or exceed `num_classes`."""
        splits = open_splits(self.source, cache_dir=self.cache_dir)
        stores = []
        for wanted in [self.split] if self.val_split is None else [self.split, self.val_split]:
            split = splits[pick_split(list(splits), wanted, source=self.source)]
            classes = stores[0].class_names if stores else None
            store = open_store(
                split, self.source, columns=self.columns, num_classes=self.num_classes, class_names=classes
            )
            stores.append(store)
        self._set_classes(stores)
        train, *val = stores
        return self._rows(train, flip=self.flip), self._rows(val[0], flip=False) if val else None

    def _set_classes(self, stores: list[FolderStore | ArrowStore]) -> None:
        train, val = stores[0], stores[-1]
        if val.class_names != train.class_names:
            differing = sorted(set(train.class_names or []) ^ set(val.class_names or []))[:3]
            raise ValueError(
                f"'{self.source}': classes of '{self.split}' and '{self.val_split}' differ (such as {differing}), so"
                " labels would not mean the same: make them equal or choose another val_split"
            )
        found = train.num_classes
        if self.num_classes is not None and found is not None and found > self.num_classes:
            raise ValueError(f"'{self.source}' has {found} classes, more than num_classes={self.num_classes}: raise it")
        self.class_names = train.class_names
        self.num_classes = found if self.num_classes is None else self.num_classes

    def _rows(self, store: FolderStore | ArrowStore, *, flip: bool) -> ImageRows:
        return ImageRows(store, self.image_size, num_classes=self.num_classes, flip=flip, seed=self.seed)


def decode(data: bytes | str, name: str) -> Image.Image:
    """Encoded bytes or a file -> RGB image, completely read. Raises ValueError with `name` if it does not decode."""
    try:
        with Image.open(data if isinstance(data, str) else io.BytesIO(data)) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, EOFError, ...
        raise ValueError(f"{name} is no readable image ({error}): replace or remove it") from error
