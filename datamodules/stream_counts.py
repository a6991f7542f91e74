"""How many rows the shards of a stream have: from their metadata, by their headers, or as the user states.

Splitting a stream exactly needs these numbers before the first row is read. Parquet says it in its footer, also on the
hub; arrow files on disk by the headers of their batches; tars on disk are scanned once, header by header, and the
result is kept in the cache folder. What is neither of these has to be stated.
"""

import json
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info

StatedRows = int | list[int] | dict[str, int | list[int]]  # of the training shards, or of those of each split
COUNTERS = 16  # footers that are read at once: on the hub each costs some round trips
TAR_COUNTS = "softtokens-tar-rows.json"  # in the cache folder


def known_rows(
    files: Sequence[str], stated: int | Sequence[int] | None, *, source: str, cache_dir: str | None = None
) -> list[int]:
    """Rows of each shard: as stated, one number for all or a list, else counted.

    Raises ValueError for a list of another length, if nothing is stated and a shard cannot be counted, and for a shard
    that is damaged where that shows.
    """
    if isinstance(stated, int):
        stated = [stated] * len(files)
    if stated is not None:
        if len(stated) != len(files) or min(stated) < 0:
            raise ValueError(
                f"shard_rows={stated!r:.60} does not fit the {len(files)} shards of '{source}': give one number for"
                " each, in their order"
            )
        return list(stated)
    for file in files:
        if not countable(file):
            raise ValueError(
                f"the rows of '{file}', a shard of '{source}', cannot be counted without reading it: state shard_rows,"
                f" one number if all shards have as many, else a list of {len(files)}"
            )
    if files[0].endswith(".tar"):
        return _kept_tar_rows(files, _cache_folder(cache_dir))
    with ThreadPoolExecutor(COUNTERS) as pool:
        return list(pool.map(count_rows, files))


def count_rows(file: str) -> int:
    """Rows of one shard that is `countable`. Raises ValueError, naming it, if it cannot be read."""
    count = _parquet_rows if file.endswith(".parquet") else _arrow_rows if file.endswith(".arrow") else tar_rows
    try:
        return count(file)
    except Exception as error:  # of three libraries: tarfile.ReadError, ArrowInvalid, OSError, ...
        raise ValueError(unreadable(file, error)) from error


def unreadable(file: str, error: Exception) -> str:
    """One line for a shard that cannot be read."""
    network = " and check the network" if "://" in file else ""
    text = str(error).strip().split("\n")[0]
    return f"shard '{file}' cannot be read ({type(error).__name__}: {text}): replace it if it is damaged{network}"


def tar_rows(file: str) -> int:
    """Rows of a tar as the webdataset format has them: neighbours whose names agree up to the first dot are one."""
    rows, last = 0, None
    with tarfile.open(file) as opened:
        for member in opened:
            folder, _, name = member.name.rpartition("/")
            stem, dot, _ = name.partition(".")
            if member.isfile() and stem and dot and not name.startswith("__") and (folder, stem) != last:
                rows, last = rows + 1, (folder, stem)
    return rows


def countable(file: str) -> bool:
    """Whether the rows of a shard can be told without reading it."""
    return file.endswith(".parquet") or (file.endswith((".arrow", ".tar")) and "://" not in file)


def _parquet_rows(file: str) -> int:
    from huggingface_hub import HfFileSystem
    from pyarrow.parquet import read_metadata

    with HfFileSystem().open(file, "rb") if "://" in file else open(file, "rb") as opened:
        return read_metadata(opened).num_rows


def _arrow_rows(file: str) -> int:
    import pyarrow as pa

    with pa.memory_map(file) as opened:
        try:
            return sum(batch.num_rows for batch in pa.ipc.open_stream(opened))
        except pa.ArrowInvalid:  # the other of the two layouts
            reader = pa.ipc.open_file(opened)
            return sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))


def _kept_tar_rows(files: Sequence[str], folder: Path) -> list[int]:
    """`tar_rows` of each file; those that have not changed since they were counted are not scanned again."""
    path = folder / TAR_COUNTS
    kept = _kept(path)
    keys = [_identity(file) for file in files]
    new = {key: count_rows(file) for file, key in zip(files, keys, strict=True) if key not in kept}
    if new:
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(json.dumps(kept | new, indent=0))
        os.replace(part, path)
    return [(kept | new)[key] for key in keys]


def _kept(path: Path) -> dict[str, int]:
    """What was counted before: rows by the identity of a tar."""
    try:
        kept = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        kept = None
    if isinstance(kept, dict) and all(isinstance(rows, int) for rows in kept.values()):
        return kept
    rank_zero_info(f"'{path}' is damaged: the tars are counted anew")
    return {}


def _identity(file: str) -> str:
    facts = os.stat(file)
    return f"{os.path.abspath(file)} {facts.st_size} {facts.st_mtime_ns}"


def _cache_folder(cache_dir: str | None) -> Path:
    import datasets

    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser()
