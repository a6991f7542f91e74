"""Latents: what a tokenizer makes of every image, computed once by `make cache` and read instead of the images.

A folder per split, `train` and `val`, of shards (shards.py) with `raw` (n, K, ...), label and index int64 (n,). Axis 1
holds K views: the image and, where training mirrors, the mirror image, encoded as well: mirrored latents are no latents
of a mirrored image (as in the official code of MAR, Li et al. 2024, which keeps one npz per image). Which of the two is
read is the coin of (seed, epoch, row), as with images. Or (RAR's `scripts/pretokenization.py`) five crops of the image
and five of the mirror image: an epoch reads one of an image's ten, and ten epochs, a pass over all that is there, each
once. `meta.json` says which images and which tokenizer they are of.
Batches: {"raw": (B, ...), "label": int64 (B,)}; raw of the type that the tokenizer returned: float16 and ids in uint16
are widened here, where it costs a worker little, so that no method need know how a cache is stored.
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from datamodules.base import BatchData, RowDataset
from datamodules.images import ImageData
from datamodules.sampler import RowKey, coin, hash64
from datamodules.shard_files import CURE, META, PLAN, check_kinds, read_meta
from datamodules.shards import Shards
from datamodules.transforms import enlarged

Split = Literal["train", "val"]
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.int64, torch.int32, torch.uint8)}
# constructor arguments that say how images are read, not which there are and how they look
READING = {"batch_size", "num_workers", "flip", "cache_dir", "crop_cache", "on_bad", "streaming", "shard_rows"}
READING |= {"shuffle_buffer", "image_size", "source"}
# what a description has beside what it is expected to have
KINDS = {"num_classes": (int, type(None)), "class_names": (list, type(None)), "tokenizer": dict}
KINDS |= {"flip": bool, "encoded": str}
CROPS, CENTRE = 5, 4  # crops of an image, and which of them is the centre (`five_crop`)


class LatentBatch(TypedDict):
    """One batch of latents."""

    raw: Tensor  # (B, ...)
    label: Tensor  # (B,)


class LatentRows(RowDataset):
    """Rows `rows` of a cache, all by default.

    `flip` reads mirror images by the coin of (seed, epoch, row). Where there are five crops, `draw_crop` reads all in
    turn (`drawn_view`), with `flip` those of the mirror image too, and else it is the centre that is read. Raises
    ValueError when a row is read that holds an id outside of the tokenizer's vocabulary.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        rows: np.ndarray | None = None,
        flip: bool = False,
        draw_crop: bool = False,
        seed: int = 0,
    ) -> None:
        self.shards, self.flip, self.draw_crop, self.seed = shards, flip, draw_crop, seed
        self.rows = np.arange(len(shards)) if rows is None else rows
        self.dtype = DTYPES[shards.meta["encoded"]]
        self.crops, self.vocab_size = shards.meta.get("crops", 1), shards.meta.get("vocab_size")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, keys: Sequence[RowKey]) -> LatentBatch:
        rows = self.rows[[key.index for key in keys]].tolist()
        parts = [self._view(RowKey(key.epoch, row)) for key, row in zip(keys, rows, strict=True)]
        raw = self.shards.gather("raw", rows, parts=parts).to(self.dtype)  # (B, ...)
        if self.vocab_size is not None:
            self._check_ids(raw, rows)
        return {"raw": raw, "label": self.shards.gather("label", rows)}

    def _view(self, key: RowKey) -> int:
        """Which of axis 1 is read."""
        if self.crops == 1:
            return int(self.flip and coin(self.seed, key))
        return drawn_view(self.seed, key, self.crops * (2 if self.flip else 1)) if self.draw_crop else CENTRE

    def _check_ids(self, raw: Tensor, rows: Sequence[int]) -> None:
        bad = ((raw < 0) | (raw >= self.vocab_size)).flatten(1)
        if bad.any():
            first = int(bad.any(1).int().argmax())
            raise ValueError(
                f"'{self.shards.folder}' holds the id {int(raw[first].flatten()[bad[first]][0])} in row {rows[first]},"
                f" but its tokenizer has the ids 0..{self.vocab_size - 1}: delete the folder, write it again"
            )


class LatentData(BatchData):
    """Latents in the folder `root`, which `make cache` writes from `images`: the data module that reads those.

    `images` says which they are, their size and classes, and whether training mirrors; it is not opened. Validation
    reads the split `val` of the cache where it is there; `val_length` holds out as many training rows instead, always
    the same (0: no validation). `ten_crop`: the training split holds not the centre of an image but five crops of one
    1.1 times as large, the corners and the centre, and five of its mirror image if it is mirrored; each epoch reads one
    of them, and ten epochs each once. Sizes and headers of the shards are checked at the start; `verify` compares every
    byte with its sha256, once per node, which takes a minute or more for some tens of GB.

    Raises FileNotFoundError without a finished cache, ValueError without `images`, for a damaged cache and for one of
    other images.
    """

    def __init__(
        self,
        root: str,
        images: BatchData | None = None,
        *,
        batch_size: int = 1024,
        val_length: int | None = None,
        ten_crop: bool = False,
        verify: bool = False,
        num_workers: int = 4,
        seed: int = 0,
        limit_n: int | None = None,
    ) -> None:
        if images is None:
            raise ValueError(
                "images is missing: name the data module whose images are cached, with data.init_args.images"
                " {class_path: datamodules.images.ImageData, init_args: {...}}"
            )
        super().__init__(images.image_size, batch_size, num_workers=num_workers, seed=seed, limit_n=limit_n)
        if val_length is not None and val_length < 0:
            raise ValueError(f"val_length={val_length} must be 0 (no validation) or more")
        self.root, self.val_length, self.verify = Path(root).expanduser(), val_length, verify
        self.ten_crop = ten_crop
        self.num_classes, self.class_names = images.num_classes, images.class_names
        self._images = images

    @property
    def images(self) -> BatchData:
        """The data module of the images: what is cached, and what statistics of real images are taken from."""
        return self._images

    @property
    def score_samples(self) -> Callable[[Tensor, Tensor], dict[str, float]] | None:
        """What the set of the images can judge by itself."""
        return self._images.score_samples

    @property
    def tokenizer_checksum(self) -> str:
        """sha256 of the weights of the tokenizer that made the cache. Raises FileNotFoundError without one."""
        return self._meta("train")["tokenizer"]["sha256"]

    @property
    def tokenizer_class(self) -> str:
        """Its class, as a recipe names it."""
        return self._meta("train")["tokenizer"]["class_path"]

    @property
    def tokenizer_arch(self) -> dict[str, Any] | None:
        """Its architecture, where it has one."""
        return self._meta("train")["tokenizer"].get("init_args", {}).get("arch")

    def prepare_data(self) -> None:
        """Compares all bytes with their sha256, if `verify`; Lightning calls this in one process per node."""
        if self.verify:
            for split in ("train", *self._val_split()):
                self._open(split).verify()

    def discover_classes(self) -> int | None:
        """The number of classes: of the images, where they tell at once, or of the cache."""
        if self._images.num_classes is None and (self.root / "train" / META).exists():
            return self._meta("train")["num_classes"]
        return self._images.discover_classes()

    def make_datasets(self) -> tuple[RowDataset, RowDataset | None]:
        """Opens the cache of both splits, or holds rows of the training split out."""
        train = self._open("train")
        self.num_classes = self.num_classes or train.meta["num_classes"]
        self.class_names = train.meta["class_names"]
        flip = getattr(self._images, "flip", False)
        if flip and not train.meta["flip"]:
            raise ValueError(
                f"'{self.root}' has no mirror images, but the images are mirrored in training: set"
                " data.init_args.images.init_args.flip=false, or delete the cache to write it again"
            )
        held_out = self._held_out(len(train))
        kept = np.setdiff1d(np.arange(len(train)), held_out)
        rows = LatentRows(train, rows=kept, flip=flip, draw_crop=True, seed=self.seed)
        if len(held_out):
            return rows, LatentRows(train, rows=held_out)
        val = [LatentRows(self._open_like(train)) for _ in self._val_split()]
        if not val and self.val_length is None:
            rank_zero_info(f"'{self.root}' has no split 'val': training goes without (make cache with SPLIT=val)")
        return rows, val[0] if val else None

    def _val_split(self) -> list[Split]:
        """["val"] if that split is validated on; begun and unfinished it counts, so that it is an error."""
        return ["val"] if self.val_length is None and (self.root / "val").exists() else []

    def _held_out(self, length: int) -> np.ndarray:
        """Sorted rows (val_length,); the same for every seed, so that runs compare."""
        wanted = self.val_length or 0
        if wanted >= length:
            raise ValueError(f"val_length={wanted} holds out all of the {length} rows in '{self.root}': lower it")
        order = torch.randperm(length, generator=torch.Generator().manual_seed(0))
        return order[:wanted].sort().values.numpy()

    def _open(self, split: Split) -> Shards:
        self._meta(split)
        return Shards(self.root / split, expect=latent_key(self._images, split, ten_crop=self.ten_crop))

    def _open_like(self, train: Shards) -> Shards:
        """The split `val`, which must be by the tokenizer of `train`."""
        val = self._open("val")
        if val.meta["tokenizer"]["sha256"] != train.meta["tokenizer"]["sha256"]:
            raise ValueError(
                f"'{val.folder}' is by another tokenizer than '{train.folder}': delete one, write it again"
            )
        return val

    def _meta(self, split: Split) -> dict[str, Any]:
        folder = self.root / split
        if not (folder / META).exists():
            state = "are unfinished" if (folder / PLAN).exists() else "do not exist"
            raise FileNotFoundError(f"the latents in '{folder}' {state}: make cache EXP=... SPLIT={split} writes them")
        meta = read_meta(folder)
        if "raw" not in meta["tensors"]:
            raise ValueError(
                f"'{folder}' holds {list(meta['tensors'])}, but no latents: set another data.init_args.root"
            )
        check_description(meta, folder / META)
        return meta


def check_description(meta: dict[str, Any], path: Path) -> None:
    """Raises ValueError for entries of a `meta.json` that no cache of latents has: missing, of other types, or of other
    views and labels than its tensors."""
    check_kinds(meta, KINDS, path)
    check_kinds(meta["tokenizer"], {"class_path": str, "sha256": str, "init_args": dict}, path)
    crops, vocab_size = meta.get("crops", 1), meta.get("vocab_size")
    check_kinds({"crops": crops, "vocab_size": vocab_size}, {"crops": int, "vocab_size": (int, type(None))}, path)
    views, tensors = crops * (2 if meta["flip"] else 1), meta["tensors"]
    whole = meta["encoded"] in DTYPES and tensors["raw"]["shape"][:1] == [views]
    if not whole or tensors.get("label") != {"dtype": "I64", "shape": []}:
        raise ValueError(
            f"'{path}' is damaged ({views} views of {meta['encoded']!r:.40} are no {tensors['raw']}, or labels are"
            f" missing): {CURE}"
        )


def drawn_view(seed: int, key: RowKey, views: int) -> int:
    """Which of its `views` a row shows in an epoch: in `views` epochs each once, in an order of (seed, row) that is
    another one in the next `views` epochs."""
    turn, place = divmod(key.epoch, views)
    left, code = list(range(views)), hash64(seed, turn, key.index)
    for _ in range(place + 1):  # the digits of one number are an order: its Lehmer code
        code, choice = divmod(code, len(left))
        view = left.pop(choice)
    return view


def latent_key(images: BatchData, split: Split, *, ten_crop: bool = False) -> dict[str, Any]:
    """Which images a cache was made from: entries of its `meta.json` that must agree when it is opened.

    `ten_crop` is of the training split alone. Ask before `images.setup()`, which may fill in arguments.
    """
    described = isinstance(images, ImageData)
    left_out = READING | ({"val_split"} if split == "train" else set()) | ({"num_classes"} if described else set())
    names = [name for name in inspect.signature(type(images)).parameters if name not in left_out]
    cls = type(images)
    return {
        "source": str(Path(images.source).expanduser()) if described else f"{cls.__module__}.{cls.__qualname__}",
        "split": split,
        "size": images.image_size,
        "crop": _crop(images, split, ten_crop=ten_crop),
        "arguments": {name: getattr(images, name) for name in names if hasattr(images, name)},
    }


def _crop(images: BatchData, split: Split, *, ten_crop: bool) -> str | None:
    if ten_crop and split == "train":
        return f"corners and centre of {enlarged(images.image_size)}"
    return "adm" if isinstance(images, ImageData) else None
