"""Folders of shards: what is written comes back, from any row; damage and other contents are named."""

import json
import os
import pickle
import struct

import pytest
import torch

from datamodules.sampler import RowKey, coin
from datamodules.shards import ShardRows, Shards, ShardWriter, read_header, shard_batches

ROWS, SHARD = 23, 5
META = {"source": "pets", "split": "train", "size": 4}


def tensors():
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randint(0, 256, (ROWS, 3, 4, 4), dtype=torch.uint8, generator=generator),
        "label": torch.randint(0, 9, (ROWS,), generator=generator),
        "moments": torch.randn(ROWS, 2, 3, generator=generator).to(torch.bfloat16),
    }


def captions():
    return [f"número {i}" * (i % 3) for i in range(ROWS)]  # some are empty, letters take two bytes


def write(folder, *, numbers=None, texts=None, finish=True, **meta):
    writer = ShardWriter(folder, meta=META | meta, rows=ROWS, shard_rows=SHARD)
    for number in writer.numbers() if numbers is None else numbers:
        covered = writer.rows_of(number)
        part = {name: tensor[covered.start : covered.stop] for name, tensor in tensors().items()}
        writer.write(number, part, captions=None if texts is None else texts[covered.start : covered.stop])
    if finish:
        writer.finish()
    return writer


def test_rows_come_back_in_any_order(tmp_path):
    write(tmp_path, texts=captions())
    shards = Shards(tmp_path, expect=META)
    assert len(shards) == ROWS and [shard["rows"] for shard in shards.meta["shards"]] == [5, 5, 5, 5, 3]
    assert shards.meta["tensors"]["image"] == {"dtype": "U8", "shape": [3, 4, 4]}
    order = [*torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)).tolist(), 0, 22, 22]
    for name, tensor in tensors().items():
        found = shards.gather(name, order)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor[order])
    assert shards.captions(order) == [captions()[i] for i in order]
    shards.verify()
    copy = pickle.loads(pickle.dumps(shards))  # how a spawned worker gets it
    assert torch.equal(copy.gather("label", order), tensors()["label"][order])
    assert len(pickle.dumps(shards)) < 5000
    for index in (-1, ROWS):
        with pytest.raises(IndexError, match=r"are not all within 0..22"):
            shards.gather("label", [0, index])


def test_rows_of_images(tmp_path):
    write(tmp_path / "plain")
    batch = ShardRows(tmp_path / "plain")[7]
    assert set(batch) == {"image", "label"} and torch.equal(batch["image"][0], tensors()["image"][7])
    write(tmp_path / "captions", texts=captions())
    rows = ShardRows(tmp_path / "captions", flip=True, seed=3)
    keys = [RowKey(2, i) for i in (4, 21, 0, 8, 9, 10, 13)]
    flips = [coin(3, key) for key in keys]
    assert len(set(flips)) == 2
    images = [tensors()["image"][key.index] for key in keys]
    batch = rows.__getitems__(keys)
    mirrored = [image.flip(-1) if flip else image for image, flip in zip(images, flips, strict=True)]
    assert torch.equal(batch["image"], torch.stack(mirrored))
    assert batch["label"].tolist() == [tensors()["label"][key.index].item() for key in keys]
    assert batch["caption"] == [captions()[key.index] for key in keys]


def test_writing_goes_on_after_an_interrupt_and_may_be_shared(tmp_path):
    first = write(tmp_path, numbers=[3, 0], finish=False)
    with pytest.raises(ValueError, match=r"lacks 3 shards, such as number 1"):
        first.finish()
    with pytest.raises(ValueError, match=r"is unfinished: run what writes it again"):
        Shards(tmp_path)
    second = ShardWriter(tmp_path, meta=META, rows=ROWS, shard_rows=SHARD)
    assert [second.is_written(number) for number in second.numbers()] == [True, False, False, True, False]
    kept = (tmp_path / "shard-00003.safetensors").stat().st_mtime_ns
    write(tmp_path, numbers=[4, 1], finish=False)  # another process
    write(tmp_path, numbers=[2])
    assert (tmp_path / "shard-00003.safetensors").stat().st_mtime_ns == kept
    assert torch.equal(Shards(tmp_path).gather("label", range(ROWS)), tensors()["label"])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] + [".safetensors"] * 5
    again = ShardWriter(tmp_path, meta=META, rows=ROWS, shard_rows=SHARD)
    assert all(again.is_written(number) for number in again.numbers())
    again.finish()


def test_two_processes_may_write_all_of_one_folder(tmp_path):
    one, other = (write(tmp_path, numbers=[], finish=False) for _ in range(2))
    first = range(0, SHARD)
    parts = {name: tensor[first.start : first.stop] for name, tensor in tensors().items()}
    other.write(0, parts)
    write(tmp_path)  # a third one is faster
    kept = (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns
    assert one.finished and all(other.is_written(number) for number in other.numbers())
    other.write(0, parts)
    other.finish()
    assert (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == kept
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] + [".safetensors"] * 5
    Shards(tmp_path).verify()


@pytest.mark.parametrize("when", ["save", "notes"])
def test_another_process_finishes_at_the_worst_moment(tmp_path, monkeypatch, when):
    """While the first one still writes a shard, or between its look at the notes and their reading."""
    from datamodules import shards

    slow = write(tmp_path, numbers=range(4) if when == "save" else None, finish=False)
    name = "sha256" if when == "save" else "read_json"
    original = getattr(shards, name)

    def overtaken(path):
        monkeypatch.setattr(shards, name, original)
        write(tmp_path)
        return original(path)

    monkeypatch.setattr(shards, name, overtaken)
    if when == "save":
        slow.write(4, {name: tensor[20:] for name, tensor in tensors().items()})
    slow.finish()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] + [".safetensors"] * 5
    Shards(tmp_path).verify()


def test_finishing_removes_what_a_killed_process_left(tmp_path):
    write(tmp_path, numbers=[0], finish=False)
    (tmp_path / "shard-00001.safetensors.0123.part").write_bytes(b"half")
    write(tmp_path)
    assert not list(tmp_path.glob("*.part"))


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    import safetensors.torch

    def fail(tensors, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, numbers=[0])
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished.json"]


@pytest.mark.parametrize("finish", [True, False])
def test_another_content_is_refused(tmp_path, finish):
    write(tmp_path, finish=finish)
    with pytest.raises(ValueError, match=r"was made with size=4, but 8 is asked for: use another folder"):
        write(tmp_path, size=8)
    with pytest.raises(ValueError, match=r"was made with n=23, but 24 is asked for"):
        ShardWriter(tmp_path, meta=META, rows=24, shard_rows=SHARD)


def test_reading_what_was_not_expected(tmp_path):
    with pytest.raises(ValueError, match=r"is no folder of shards \(meta.json is missing\)"):
        Shards(tmp_path / "nothing")
    write(tmp_path)
    with pytest.raises(ValueError, match=r"was made with split='train', but 'validation' is asked for"):
        ShardRows(tmp_path, expect={"split": "validation"})
    with pytest.raises(ValueError, match=r"was made with crop=None, but 'adm' is asked for"):
        ShardRows(tmp_path, expect={"crop": "adm"})
    meta = json.loads((tmp_path / "meta.json").read_text())
    del meta["tensors"]["label"]
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"holds \['image', 'moments'\], but no \['label'\]"):
        ShardRows(tmp_path)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"meta.json' is damaged"):
        Shards(tmp_path)


def damage(path, kind):
    data = bytearray(path.read_bytes())
    if kind == "missing":
        return path.unlink()
    if kind == "short":
        del data[-1]
    elif kind == "long":
        data += b"x"
    elif kind == "header":
        data[8] ^= 1
    elif kind == "length":
        data[:8] = struct.pack("<Q", 1 << 62)
    elif kind == "offsets":  # one more byte for the label than it has
        place = data.index(b'"data_offsets":[0,') + len('"data_offsets":[0,')
        data[place] += 1
    elif kind == "dtype":
        data = data.replace(b'"I64"', b'"F16"')
    elif kind == "name":
        data = data.replace(b'"label"', b'"lapel"')
    return path.write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "is missing"),
        ("short", r"has \d+ bytes instead of \d+"),
        ("long", r"has \d+ bytes instead of \d+"),
        ("header", "is damaged in its header"),
        ("length", "is damaged in its header"),
        ("offsets", "is damaged in its header"),
        ("dtype", "is damaged in its header"),
        ("name", r"has None for tensor 'label', but meta.json says"),
    ],
)
def test_a_damaged_shard_is_named_when_the_folder_is_opened(tmp_path, kind, message):
    write(tmp_path)
    damage(tmp_path / "shard-00002.safetensors", kind)
    with pytest.raises(ValueError, match=rf"shard-00002.safetensors' {message}"):
        Shards(tmp_path)


def test_verify_finds_a_changed_byte(tmp_path):
    write(tmp_path)
    path = tmp_path / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors' is damaged \(sha256\)"):
        Shards(tmp_path).verify()


@pytest.mark.parametrize("finish", [True, False])
def test_damaged_shards_are_forgotten_and_written_again(tmp_path, finish):
    write(tmp_path, finish=finish)
    intact = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    writer = write(tmp_path, numbers=[], finish=False)
    assert writer.forget_damaged() == [] and {p.name: p.read_bytes() for p in tmp_path.iterdir()} == intact
    for number, kind in ((0, "missing"), (2, "short"), (4, "header")):
        damage(tmp_path / f"shard-{number:05d}.safetensors", kind)
    assert writer.forget_damaged() == [0, 2, 4] and not writer.finished
    assert [writer.is_written(number) for number in writer.numbers()] == [False, True, False, True, False]
    assert writer.forget_damaged() == [], "what is not written cannot be damaged"
    write(tmp_path, finish=finish)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == intact


def test_one_part_of_each_row(tmp_path):
    write(tmp_path)
    shards, order, parts = Shards(tmp_path), [22, 0, 9, 9], [0, 1, 1, 0]
    found = shards.gather("moments", order, parts=parts)
    assert found.dtype == torch.bfloat16 and torch.equal(found, tensors()["moments"][order, parts])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_of_shards_start_anew_with_each(tmp_path, num_workers):
    write(tmp_path)
    ranges = {4: range(20, 23), 1: range(5, 10)}
    read = list(shard_batches(ShardRows(tmp_path), ranges, batch_rows=2, num_workers=num_workers))
    assert [(number, len(batch["label"])) for number, batch in read] == [(4, 2), (4, 1), (1, 2), (1, 2), (1, 1)]
    order = [*ranges[4], *ranges[1]]
    assert torch.equal(torch.cat([batch["image"] for _, batch in read]), tensors()["image"][order])


def test_the_files_are_safetensors(tmp_path):
    from safetensors.torch import load_file

    write(tmp_path, texts=captions())
    path = tmp_path / "shard-00004.safetensors"
    loaded = load_file(path)
    assert torch.equal(loaded["moments"], tensors()["moments"][20:])
    assert bytes(loaded["caption"].numpy()).decode() == "".join(captions()[20:])
    assert set(read_header(path, size=os.path.getsize(path))) == set(loaded)
