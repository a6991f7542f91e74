"""The reader of cached latents and crops: rows of the right shape, or one error that names the folder."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datamodules.crop_cache import crop_key, open_crop_cache
from datamodules.latents import LatentData, latent_key
from datamodules.sampler import RowKey
from datamodules.shards import ShardWriter
from datamodules.synthetic import SyntheticData
from tests.fuzz.guard import survives
from tests.fuzz.mutations import mutated, mutated_tree

ROWS, SHAPE = 7, (4, 2, 2)
TOKENIZER = {"class_path": "layers.tokenizers.pixels.PixelTokenizer", "init_args": {}, "sha256": "ab" * 32}
KEY = crop_key("somewhere", "train", 8)
CAPTIONS = ["a red apple", "", "Größe", "x"]


def images():
    return SyntheticData(image_size=16, batch_size=4, num_classes=7, length=ROWS)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A cache of latents and one of crops with captions, as bytes by name."""
    root = tmp_path_factory.mktemp("good")
    meta = latent_key(images(), "train") | {"num_classes": 7, "class_names": None, "tokenizer": TOKENIZER}
    writer = ShardWriter(root / "train", meta=meta | {"flip": True, "encoded": "float32"}, rows=ROWS, shard_rows=4)
    for number in writer.numbers():
        count = len(writer.rows_of(number))
        raw, label = torch.rand(count, 2, *SHAPE).half(), torch.arange(count)
        writer.write(number, {"raw": raw, "label": label, "index": label.clone()})
    writer.finish()
    meta = KEY | {"class_names": ["a", "b"], "num_classes": 2}
    writer = ShardWriter(root / "crops", meta=meta, rows=len(CAPTIONS), shard_rows=len(CAPTIONS))
    image = torch.zeros(len(CAPTIONS), 3, 8, 8, dtype=torch.uint8)
    writer.write(0, {"image": image, "label": torch.zeros(len(CAPTIONS), dtype=torch.int64)}, captions=CAPTIONS)
    writer.finish()
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def written(folder, files):
    """The folder with these files and no others; fresh ones, since old ones may be mapped still."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read_latents(root):
    data = LatentData(str(root), images(), batch_size=4, num_workers=0, val_length=2)
    data.setup()
    batches = [rows.__getitems__([RowKey(0, i) for i in range(len(rows))]) for rows in (data.train_set, data.val_set)]
    assert all(batch["raw"].shape[1:] == SHAPE and batch["raw"].dtype == torch.float32 for batch in batches)
    assert all(batch["label"].dtype == torch.int64 and batch["label"].ndim == 1 for batch in batches)
    return data.tokenizer_class, data.tokenizer_checksum, data.tokenizer_arch, data.discover_classes()


def read_crops(root):
    rows = open_crop_cache(root / "crops", KEY)
    batch = rows.__getitems__([RowKey(0, i) for i in range(len(rows))])
    assert batch["image"].shape[1] == 3 and batch["image"].dtype == torch.uint8
    assert all(isinstance(text, str) for text in batch.get("caption", []))  # a cache may have none


READERS = {"train": read_latents, "crops": read_crops}


def check(folder, files, kind):
    root = written(folder, {name: data for name, data in files.items() if name.startswith(kind)})
    survives(lambda: READERS[kind](root), named=str(root))


@pytest.mark.parametrize("kind", READERS)
@given(data=st.data())
def test_bytes_of_any_file(kind, good, tmp_path, data):
    name = data.draw(st.sampled_from([name for name in good if name.startswith(kind)]))
    check(tmp_path / "x", good | {name: data.draw(mutated([good[name]]))}, kind)


@pytest.mark.parametrize("kind", READERS)
@given(data=st.data())
def test_entries_of_the_description(kind, good, tmp_path, data):
    meta = data.draw(mutated_tree(json.loads(good[f"{kind}/meta.json"])))
    check(tmp_path / "x", good | {f"{kind}/meta.json": json.dumps(meta).encode()}, kind)


@pytest.mark.parametrize("kind", READERS)
@given(data=st.data())
def test_headers_of_shards(kind, good, tmp_path, data):
    """The header changed, its length right, and the size of the file as the description says."""
    name = f"{kind}/shard-00000.safetensors"
    length = int.from_bytes(good[name][:8], "little")
    header = json.dumps(data.draw(mutated_tree(json.loads(good[name][8 : 8 + length])))).encode()
    shard = len(header).to_bytes(8, "little") + header + good[name][8 + length :]
    meta = json.loads(good[f"{kind}/meta.json"])
    meta["shards"][0]["bytes"] = len(shard)
    check(tmp_path / "x", good | {name: shard, f"{kind}/meta.json": json.dumps(meta).encode()}, kind)


@given(data=st.data())
def test_places_of_captions(good, tmp_path, data):
    name = "crops/shard-00000.safetensors"
    content = bytearray(good[name])
    content[-data.draw(st.integers(1, 120)) :] = data.draw(st.binary(min_size=1, max_size=120))
    content = content[: len(good[name])].ljust(len(good[name]), b"\xff")
    check(tmp_path / "x", good | {name: bytes(content)}, "crops")


def test_the_good_caches_are_read(good, tmp_path):
    root = written(tmp_path / "x", good)
    assert read_latents(root)[0] == TOKENIZER["class_path"]
    rows = open_crop_cache(root / "crops", KEY)
    assert rows.__getitems__([RowKey(0, i) for i in range(4)])["caption"] == CAPTIONS
