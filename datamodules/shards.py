"""Folders of memory-mapped safetensors shards: written once, read row by row in any order.

A folder holds `meta.json` (what it was made from, the tensors, rows, bytes and sha256 of each shard) and
`shard-00000.safetensors`, ...: named tensors with a leading row axis, such as label int64 (n,). Captions are UTF-8 in
one tensor `caption` uint8 (bytes,) with `caption_end` int64 (n,), mapped like the rest: a million need no memory.
Writing is resumable and may be shared; `meta.json` comes last, so a folder that has it is complete.
"""

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.base import Batch, RowDataset
from datamodules.sampler import PREFETCH_BATCHES, RowKey, as_batch, coin
from datamodules.shard_files import CURE, DTYPES, META, PLAN, Field, read_header, read_json, read_meta, sha256
from datamodules.transforms import flip_horizontal

RESERVED = ("n", "shard_rows", "tensors", "shards")  # keys of meta.json that the writer sets


class ShardWriter:
    """Writes `rows` rows as shards of `shard_rows` rows (the last one shorter). `meta` says what they are made from.

    Shards can be written in any order and by several processes, even the same ones; `finish` is called when all are
    there, by one process or by each. Started again after an interrupt, finished shards are kept. Raises ValueError when
    the folder holds rows of another meta.
    """

    def __init__(self, folder: Path | str, *, meta: Mapping[str, Any], rows: int, shard_rows: int) -> None:
        assert rows > 0 and shard_rows > 0 and not set(meta) & set(RESERVED)
        self.folder, self.rows, self.shard_rows = Path(folder), rows, shard_rows
        self.plan = json.loads(json.dumps({**meta, "n": rows, "shard_rows": shard_rows}))  # as a file gives it back
        self.folder.mkdir(parents=True, exist_ok=True)
        there = self._there()
        if there is None:
            _replace_json(self.folder / PLAN, self.plan)
        else:
            _check_same(there, self.plan, self.folder)

    @property
    def finished(self) -> bool:
        """Whether the folder is complete, by whichever process."""
        return (self.folder / META).exists()

    def numbers(self) -> range:
        """Numbers of all shards."""
        return range(-(-self.rows // self.shard_rows))

    def rows_of(self, number: int) -> range:
        """The rows that shard `number` holds."""
        start = number * self.shard_rows
        return range(start, min(start + self.shard_rows, self.rows))

    def is_written(self, number: int) -> bool:
        """Whether shard `number` is complete."""
        return self._note(number).exists() or self.finished  # in this order: notes go after meta.json has come

    def write(self, number: int, tensors: Mapping[str, Tensor], *, captions: Sequence[str] | None = None) -> None:
        """Writes one shard: tensors (n, ...) and n captions, where n is len(rows_of(number)).

        Leaves it as it is if another process was first.
        """
        if self.is_written(number):
            return
        count = len(self.rows_of(number))
        named = dict(tensors) | ({} if captions is None else _packed(captions))
        assert all(len(tensor) == count for name, tensor in named.items() if name != "caption")
        try:
            facts = self._save(number, named) | {"rows": count}
        except FileNotFoundError:  # another process has finished meanwhile, and removed what was only begun
            if not self.finished:
                raise
        else:
            _replace_json(self._note(number), facts)

    def finish(self) -> None:
        """Writes `meta.json`, removes what interrupts left. Raises ValueError naming the shards not written yet."""
        if missing := [number for number in self.numbers() if not self.is_written(number)]:
            raise ValueError(
                f"'{self.folder}' lacks {len(missing)} shards, such as number {missing[0]}: write them first"
            )
        try:
            self._write_meta([read_json(self._note(number)) for number in self.numbers()])
        except FileNotFoundError:  # another process has finished, and removed the notes and what was only begun
            if not self.finished:
                raise
        notes = [self._note(number) for number in self.numbers()]
        for leftover in (self.folder / PLAN, *notes, *self.folder.glob("*.part")):
            leftover.unlink(missing_ok=True)

    def forget_damaged(self) -> list[int]:
        """Compares every written shard with its sha256; those that differ count as not written, and are returned.

        Reads all that is there. One process calls it, before any writes. Does nothing to an intact folder.
        """
        facts = read_meta(self.folder)["shards"] if self.finished else [*map(self._noted, self.numbers())]
        damaged = [number for number in self.numbers() if facts[number] and not self._is_intact(facts[number])]
        if damaged and self.finished:  # notes and plan first: at every moment the folder says what it holds
            for number in self.numbers():
                _replace_json(self._note(number), facts[number])
            _replace_json(self.folder / PLAN, self.plan)
            (self.folder / META).unlink()
        for number in damaged:
            self._note(number).unlink()
        return damaged

    def _noted(self, number: int) -> dict[str, Any] | None:
        """Facts of a shard of an unfinished folder; None if it is not written."""
        return read_json(self._note(number)) if self._note(number).exists() else None

    def _is_intact(self, facts: Mapping[str, Any]) -> bool:
        path = self.folder / facts["file"]
        return path.exists() and path.stat().st_size == facts["bytes"] and sha256(path) == facts["sha256"]

    def _there(self) -> dict[str, Any] | None:
        """What the folder was made from; None for a new one."""
        for name in (META, PLAN, META):  # another process may finish between two looks: PLAN goes after META has come
            try:
                return read_json(self.folder / name)
            except FileNotFoundError:
                continue
        return None

    def _save(self, number: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Writes the file of a shard and returns its facts for `meta.json`."""
        from safetensors.torch import save_file

        path = self.folder / f"shard-{number:05d}.safetensors"
        with replacing(path) as part:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
            return {"file": path.name, "bytes": part.stat().st_size, "sha256": sha256(part)}

    def _write_meta(self, shards: list[dict[str, Any]]) -> None:
        header = read_header(self.folder / shards[0]["file"], size=shards[0]["bytes"])
        tensors = {
            name: {"dtype": field.dtype, "shape": list(field.shape[1:])} for name, field in sorted(header.items())
        }
        _replace_json(self.folder / META, {**self.plan, "tensors": tensors, "shards": shards})

    def _note(self, number: int) -> Path:
        """What `finish` needs to know of a shard; its presence says that the shard is complete."""
        return self.folder / f"shard-{number:05d}.json"


class Shards:
    """Random access to the rows of a finished folder, memory-mapped. Each process maps a shard when it first reads it.

    `expect` holds entries that `meta.json` must have. Raises ValueError for a folder that is unfinished or differs, and
    for a shard that is missing, cut short or damaged in its header; `verify` reads and compares everything.
    """

    def __init__(self, folder: Path | str, *, expect: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        _check_same(self.meta, expect or {}, self.folder)
        self._headers = [self._checked_header(shard) for shard in self.meta["shards"]]
        self._ends = np.cumsum([shard["rows"] for shard in self.meta["shards"]])
        self._maps: dict[int, dict[str, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.meta["n"]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # a spawned worker maps the files itself: pickling would copy them

    @property
    def has_captions(self) -> bool:
        """Whether `captions` can be asked for."""
        return "caption_end" in self.meta["tensors"]

    def gather(self, name: str, indices: Sequence[int], *, parts: Sequence[int] | None = None) -> Tensor:
        """Rows `indices` of tensor `name`: (len(indices), ...). Raises IndexError for a row that is not there.

        Of rows (K, ...), `parts` names one of the K for each row, and only that is read.
        """
        field = self.meta["tensors"][name]
        numpy_dtype, torch_dtype = DTYPES[field["dtype"]]
        out = np.empty((len(indices), *field["shape"][0 if parts is None else 1 :]), numpy_dtype)
        for position, (shard, row) in enumerate(self._locate(indices)):
            out[position] = self._map(shard)[name][row if parts is None else (row, parts[position])]
        return torch.from_numpy(out).view(torch_dtype)

    def captions(self, indices: Sequence[int]) -> list[str]:
        """Captions of rows `indices`. Raises ValueError for one that is no text."""
        return [self._caption(shard, row) for shard, row in self._locate(indices)]

    def _caption(self, shard: int, row: int) -> str:
        text, ends = (self._map(shard)[name] for name in ("caption", "caption_end"))
        start, end = (int(ends[row - 1]) if row else 0), int(ends[row])
        try:
            if not 0 <= start <= end <= len(text):
                raise ValueError(f"bytes {start}..{end} of {len(text)}")
            return text[start:end].tobytes().decode()
        except ValueError as error:  # UnicodeDecodeError is one
            where = f"row {row} of shard '{self.folder / self.meta['shards'][shard]['file']}'"
            raise ValueError(f"the caption of {where} is damaged ({error}): {CURE}") from error

    def verify(self) -> None:
        """Compares every shard with its sha256. Raises ValueError naming the first that differs."""
        for shard in self.meta["shards"]:
            if sha256(self.folder / shard["file"]) != shard["sha256"]:
                raise ValueError(
                    f"shard '{self.folder / shard['file']}' is damaged (sha256): delete the folder, write it again"
                )

    def _locate(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """(shard, row in it) of each index."""
        rows = np.asarray(indices, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()}..{rows.max()} are not all within 0..{len(self) - 1}")
        shards = np.searchsorted(self._ends, rows, side="right")
        starts = np.concatenate([[0], self._ends])[shards]
        return list(zip(shards.tolist(), (rows - starts).tolist(), strict=True))

    def _map(self, shard: int) -> dict[str, np.ndarray]:
        """Arrays of one shard, mapped; nothing is read before it is indexed."""
        if shard not in self._maps:
            path = self.folder / self.meta["shards"][shard]["file"]
            data = np.asarray(np.memmap(path, np.uint8, mode="r"))  # indexing a np.memmap itself costs twice the time
            self._maps[shard] = {name: _view(data, field) for name, field in self._headers[shard].items()}
        return self._maps[shard]

    def _checked_header(self, shard: dict[str, Any]) -> dict[str, Field]:
        """Header of one shard. Raises ValueError if its tensors are not those of `meta.json`."""
        path = self.folder / shard["file"]
        header = read_header(path, size=shard["bytes"])
        for name, field in self.meta["tensors"].items():
            found, shape = header.get(name), (shard["rows"], *field["shape"])
            fits = found is not None and (found.shape == shape or (name == "caption" and len(found.shape) == 1))
            if not fits or found.dtype != field["dtype"]:
                raise ValueError(
                    f"shard '{path}' has {found} for tensor '{name}', but {META} says {field}: write it again"
                )
        return header


class ShardRows(RowDataset):
    """Rows of a folder with tensors `image` uint8 (n,3,S,S) and `label` int64 (n,), and captions where it has them.

    `flip` mirrors rows by the coin of (seed, epoch, row). Errors as in `Shards`.
    """

    def __init__(
        self, folder: Path | str, *, expect: Mapping[str, Any] | None = None, flip: bool = False, seed: int = 0
    ) -> None:
        self.shards = Shards(folder, expect=expect)
        if missing := {"image", "label"} - set(self.shards.meta["tensors"]):
            raise ValueError(f"'{folder}' holds {list(self.shards.meta['tensors'])}, but no {sorted(missing)}")
        image, label = (self.shards.meta["tensors"][name] for name in ("image", "label"))
        if image["dtype"] != "U8" or image["shape"][:1] != [3] or label != {"dtype": "I64", "shape": []}:
            raise ValueError(f"'{folder}' holds no RGB images with a label each, but {image} and {label}: {CURE}")
        self.flip, self.seed = flip, seed

    def __len__(self) -> int:
        return len(self.shards)

    def __getitems__(self, keys: Sequence[RowKey]) -> Batch:
        indices = [key.index for key in keys]
        images = self.shards.gather("image", indices)  # (B, 3, S, S)
        if self.flip:
            for image, key in zip(images, keys, strict=True):  # one by one: a mask costs sixteen times the time
                if coin(self.seed, key):
                    image.copy_(flip_horizontal(image, True))
        batch: Batch = {"image": images, "label": self.shards.gather("label", indices)}
        if self.shards.has_captions:
            batch["caption"] = self.shards.captions(indices)
        return batch


def shard_batches(
    rows: RowDataset, ranges: Mapping[int, range], *, batch_rows: int, num_workers: int = 0
) -> Iterator[tuple[int, Batch]]:
    """(shard number, batch) of the rows of every shard of `ranges`, in order, as epoch 0 shows them.

    Batches start anew with each shard: what they hold does not depend on which other shards are read. One pool of
    workers reads them all.
    """
    parts = [
        (number, covered[start : start + batch_rows])
        for number, covered in ranges.items()
        for start in range(0, len(covered), batch_rows)
    ]
    loader = DataLoader(
        rows,
        batch_sampler=([RowKey(0, index) for index in part] for _, part in parts),
        num_workers=num_workers,
        prefetch_factor=PREFETCH_BATCHES if num_workers > 0 else None,
        collate_fn=as_batch,
        generator=torch.Generator().manual_seed(0),  # its own: nothing is drawn from the global one
    )
    for (number, _), batch in zip(parts, loader, strict=True):
        yield number, batch


def _view(data: np.ndarray, field: Field) -> np.ndarray:
    dtype = np.dtype(DTYPES[field.dtype][0])
    nbytes = int(np.prod(field.shape, dtype=np.int64)) * dtype.itemsize
    return data[field.offset : field.offset + nbytes].view(dtype).reshape(field.shape)


def _packed(captions: Sequence[str]) -> dict[str, Tensor]:
    encoded = [caption.encode() for caption in captions]
    joined = np.frombuffer(b"".join(encoded), np.uint8).copy()
    return {"caption": torch.from_numpy(joined), "caption_end": torch.tensor([len(text) for text in encoded]).cumsum(0)}


def _check_same(there: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path, *, inside: str = "") -> None:
    for name, value in wanted.items():
        found, cure = there.get(name), "use another folder, or delete this one to write it again"
        if isinstance(found, Mapping) and isinstance(value, Mapping):  # name what differs, not all there is
            _check_same(found, value, folder, inside=f"{inside}{name}.")
        if found != value:
            raise ValueError(f"'{folder}' was made with {inside}{name}={found!r}, but {value!r} is asked for: {cure}")


def _replace_json(path: Path, value: Mapping[str, Any]) -> None:
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file of its own to write to, which becomes `path` when all went well: nobody ever sees a part of `path`."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")  # processes of several nodes may write here
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
