"""Small streams for the tests: shards of uneven length as tars or tables, and loaders over them."""

import io
import json
import tarfile
from itertools import chain

import numpy as np
from PIL import Image

from datamodules.image_rows import ImageRows
from datamodules.sampler import ResumableLoader
from datamodules.stream_plan import StreamSampler
from datamodules.streaming import StreamRows, open_stream_store, open_streams

SHARDS = [3, 11, 7, 5, 9, 4, 8]  # rows of each
TOTAL = sum(SHARDS)  # 47
SEED = 4


def encoded(i):
    """A PNG with a left half of 2 i and a right half of 255 - 2 i: the row and its flip show."""
    pixels = np.full((8, 8, 3), 255 - 2 * i, np.uint8)
    pixels[:, :4] = 2 * i
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def members(i):
    """Files of row i; the first and the last row of the set have no json."""
    yield f"{i:04d}.png", encoded(i)
    yield f"{i:04d}.cls", str(i).encode()
    yield f"{i:04d}.txt", f"row {i}".encode()
    yield f"{i:04d}.json", json.dumps({"note": f"note {i}", "size": 8}).encode()


def write_tar(path, rows):
    with tarfile.open(path, "w") as opened:
        for name, data in chain([("._hidden.png", b"x"), ("readme", b"y")], *map(members, rows)):
            info = tarfile.TarInfo(f"pictures.v1/{name}" if name != "readme" else name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))


def table(rows, *, named=False):
    import datasets

    names = [str(i) for i in range(TOTAL)]
    label = datasets.ClassLabel(names=names) if named else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": label, "caption": datasets.Value("string")})
    columns = {
        "image": [{"bytes": encoded(i), "path": None} for i in rows],
        "label": list(rows),
        "caption": [f"row {i}" for i in rows],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def ranges():
    starts = np.cumsum([0, *SHARDS]).tolist()
    return [range(start, start + n) for start, n in zip(starts, SHARDS, strict=False)]


def open_store(source, *, split="train", **options):
    options = {key: str(value) if key == "cache_dir" else value for key, value in options.items()}
    stream = open_streams(str(source), cache_dir=options["cache_dir"])[split]
    return open_stream_store(stream, str(source), **{"num_classes": TOTAL} | options)


def open_tars(folder, **options):
    return open_store(folder, cache_dir=str(folder / "cache"), columns={"label": "cls"}, **options)


def make_rows(store, *, flip=True, limit_n=None, on_bad="error"):
    rows = ImageRows(store, 8, num_classes=store.num_classes, flip=flip, seed=SEED, on_bad=on_bad)
    return StreamRows(rows, store, limit_n=limit_n)


def make_sampler(rows, *, batch=6, buffer=9, shuffle=True, **options):
    options = {"global_batch_size": batch, "seed": SEED, "shuffle": shuffle, "shuffle_buffer": buffer} | options
    return StreamSampler(rows if isinstance(rows, list) else rows.shard_rows, **options)


def make_loader(rows, *, num_workers=0, persistent_workers=False, **options):
    sampler = make_sampler(rows, num_workers=num_workers, **options)
    return ResumableLoader(rows, sampler, num_workers=num_workers, persistent_workers=persistent_workers)


def plain(batch):
    """A batch as comparable values: labels, left edges, captions."""
    return batch["label"].tolist(), batch["image"][:, 0, 0, 0].tolist(), batch["caption"]


def write_tars(folder):
    """One tar per entry of `SHARDS`."""
    for number, rows in enumerate(ranges()):
        write_tar(folder / f"train-{number:03d}.tar", rows)
    return folder
