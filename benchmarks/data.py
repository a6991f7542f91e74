"""How fast are the inputs? Rows per second of one core, by the way they are stored: `python -m benchmarks.data`.

One process, one thread, no worker: what each worker of a loader adds. Photos are cut from those that ship inside
scikit-image (smooth noise without it), encoded on the fly and read from memory or from a temporary folder that the
page cache holds, so no disk is timed. Prints rows/s and the ratio to the decoding of photos; writes JSON.
"""

import argparse
import io
import json
import platform
import random
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Measured, measure
from datamodules.base import RowDataset
from datamodules.crop_cache import crop_key, open_crop_cache, write_crop_cache
from datamodules.digits import DigitsData
from datamodules.image_rows import ImageRows
from datamodules.latents import LatentRows
from datamodules.rows import RawRow
from datamodules.sampler import RowKey
from datamodules.shards import Shards, ShardWriter
from datamodules.stream_plan import StreamSampler
from datamodules.streaming import StreamRows, open_stream_store, open_streams

PHOTO = (500, 375)  # pixels: the usual size in ImageNet
PHOTO_QUALITY = 95
CROP, ICON = 256, 64  # pixels of the cropped photos and of the small pictures
PHOTO_FILES = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "rocket.jpg")
DISTINCT = 64  # encoded pictures of each kind
CACHED = 1024  # rows of the shards: 201 MB
LATENT = (2, 32, 16, 16)  # of MAR's tokenizer at 256 pixels, with the mirror image: 32 KB in float16
LATENTS = 8192  # rows: 268 MB
BASE = f"JPEG {PHOTO[0]}x{PHOTO[1]} -> crop {CROP}"


class EncodedStore:
    """A store whose rows repeat the encoded pictures `data`."""

    class_names = None

    def __init__(self, data: Sequence[bytes], length: int) -> None:
        self.data, self.length = data, length

    def __len__(self) -> int:
        return self.length

    def fetch(self, indices: Sequence[int]) -> list[RawRow]:
        return [RawRow(self.data[i % len(self.data)], 0, None, f"row {i}") for i in indices]


def originals() -> list[Image.Image]:
    """Photos of the installed scikit-image; smooth noise where there is none."""
    try:
        import skimage
    except ImportError:
        noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        return [Image.fromarray(noise).resize((1024, 768), Image.Resampling.BICUBIC)]
    folder = Path(skimage.__file__).parent / "data"
    return [Image.open(folder / name).convert("RGB") for name in PHOTO_FILES]


def cut(size: tuple[int, int], count: int) -> Iterator[Image.Image]:
    """`count` random windows of the photos, of the proportions of `size`, resampled to it."""
    rng = random.Random(0)
    photos = originals()
    for number in range(count):
        photo = photos[number % len(photos)]
        largest = min(photo.width / size[0], photo.height / size[1])
        width, height = (side * largest * rng.uniform(0.6, 1.0) for side in size)
        left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
        yield photo.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))


def encode(images: Iterator[Image.Image], kind: str) -> list[bytes]:
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, kind, **({"quality": PHOTO_QUALITY} if kind == "JPEG" else {}))
        encoded.append(buffer.getvalue())
    return encoded


def random_batches(rows: RowDataset, batch: int) -> Callable[[], object]:
    """Reads a batch of random rows per call."""
    rng = random.Random(0)
    return lambda: rows.__getitems__([RowKey(0, rng.randrange(len(rows))) for _ in range(batch)])


def streamed_batches(folder: Path, photos: Sequence[bytes], batch: int) -> Callable[[], object]:
    """Writes the photos as two tars and reads a batch per call, in the order of a stream."""
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as opened:
            for i, data in enumerate(photos):
                for name, content in ((f"{i:06d}.jpg", data), (f"{i:06d}.cls", b"0")):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    opened.addfile(info, io.BytesIO(content))
    split = open_streams(str(folder), cache_dir=str(folder / "cache"))["train"]
    store = open_stream_store(split, str(folder), num_classes=1, cache_dir=str(folder / "cache"))
    rows = StreamRows(ImageRows(store, CROP), store)
    sampler = StreamSampler(rows.shard_rows, global_batch_size=batch, shuffle_buffer=batch)
    keys = endless(sampler)
    return lambda: rows.__getitems__([next(keys) for _ in range(batch)])


def endless(sampler: StreamSampler) -> Iterator[Any]:
    while True:
        yield from sampler
        sampler.set_epoch(sampler.epoch + 1)


def cached_rows(folder: Path, photos: Sequence[bytes]) -> RowDataset:
    """A crop cache of `CACHED` rows, in four shards."""
    key = crop_key("photos", "train", CROP)
    rows = ImageRows(EncodedStore(photos, CACHED), CROP)
    write_crop_cache(rows, folder, key, shard_bytes=CACHED // 4 * 3 * CROP * CROP, say=lambda _: None)
    return open_crop_cache(folder, key, flip=True)


def latent_rows(folder: Path) -> RowDataset:
    """A latent cache of `LATENTS` rows, in four shards."""
    writer = ShardWriter(folder, meta={"encoded": "float32"}, rows=LATENTS, shard_rows=LATENTS // 4)
    generator = torch.Generator().manual_seed(0)
    for number in writer.numbers():
        raw = torch.randn(len(writer.rows_of(number)), *LATENT, generator=generator).half()
        writer.write(number, {"raw": raw, "label": torch.zeros(len(raw), dtype=torch.int64)})
    writer.finish()
    return LatentRows(Shards(folder), flip=True)


def digits_rows() -> RowDataset:
    data = DigitsData(image_size=16, batch_size=1)
    data.setup()
    return data.train_set


def cases(folder: Path, batch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what, a call that reads one batch) of each way to store rows."""
    photos = encode(cut(PHOTO, DISTINCT), "JPEG")
    yield BASE, random_batches(ImageRows(EncodedStore(photos, DISTINCT), CROP, flip=True), batch)
    (folder / "tars").mkdir()
    yield "the same from a stream of tars", streamed_batches(folder / "tars", photos, batch)
    yield f"crop cache, uint8 {CROP}", random_batches(cached_rows(folder / "cache", photos), batch)
    yield "latents 16x16x32, float16", random_batches(latent_rows(folder / "latents"), batch)
    icons = encode(cut((ICON, ICON), DISTINCT), "PNG")
    yield f"PNG {ICON}x{ICON}", random_batches(ImageRows(EncodedStore(icons, DISTINCT), ICON, flip=True), batch)
    yield "digits 16, in memory", random_batches(digits_rows(), batch)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All rows of the table, with the machine and the versions."""
    torch.set_num_threads(1)
    timing = {"device": "cpu", "repeats": options.repeats, "warmup": options.warmup}
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row(what, measure([call], **timing)[0], options.batch) for what, call in cases(Path(folder), options.batch)
        ]
    for entry in rows:
        entry["ratio"] = entry["rows_per_s"] / rows[0]["rows_per_s"]
    return {"experiment": "data", **environment(), "batch": options.batch, "repeats": options.repeats, "rows": rows}


def row(what: str, measured: Measured, batch: int) -> dict[str, Any]:
    return {
        "what": what,
        "rows_per_s": batch / measured.median,
        "ms_per_row": measured.median / batch * 1000,
        "ms_fastest": measured.fastest / batch * 1000,
    }


def environment() -> dict[str, str]:
    return {
        "device": cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "numpy": np.__version__,
    }


def cpu_name() -> str:
    """As Linux names it; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def show(result: dict[str, Any]) -> None:
    title = f"one core of {result['device']}; Pillow {result['pillow']}, numpy {result['numpy']}"
    table = Table(title=title, title_justify="left")
    for column in ("what", "rows/s", "ms/row", "fastest", "ratio"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for entry in result["rows"]:
        numbers = (f"{entry['rows_per_s']:.0f}", f"{entry['ms_per_row']:.3f}", f"{entry['ms_fastest']:.3f}")
        table.add_row(entry["what"], *numbers, f"{entry['ratio']:.1f}x")
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="data", description=__doc__, allow_abbrev=False)
    parser.add_argument("--batch", type=int, default=32, help="rows per call")
    parser.add_argument("--repeats", type=int, default=21, help="timed calls, of which the median counts")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("runs/bench/data.json"))
    options = parser.parse_args()
    result = run(options)
    show(result)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
