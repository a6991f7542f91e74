"""ImageData and ImageTextData over streams: classes, rows that are not known, wrong columns, damage, captions."""

import pytest
import torch

from datamodules.image_text import ImageTextData
from datamodules.images import ImageData
from tests.datamodules.streams import TOTAL, encoded, table, write_tar


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.fixture
def source(tmp_path):
    """Tars of a training and a validation split."""
    for name, rows in (("train", range(20)), ("validation", range(20, 26))):
        (tmp_path / "set" / name).mkdir(parents=True)
        write_tar(tmp_path / "set" / name / "0.tar", rows)
    return tmp_path / "set"


def make(source, *, kind=ImageData, setup=True, **options):
    options = {"batch_size": 4, "num_workers": 0, "streaming": True} | options
    if kind is ImageData:
        options = {"num_classes": TOTAL} | options
    data = kind(str(source), 8, cache_dir=str(source.parent / "cache"), **options)
    if setup:
        data.setup("fit")
    return data


def test_classes_of_streams_are_found_by_their_features(source, tmp_path):
    def found(where, **options):
        return make(where, setup=False, **{"num_classes": None} | options).discover_classes()

    assert found(source) is None  # cls holds integers: only the rows would tell
    assert found(source, columns={"label": None}) == 1
    assert found(source, num_classes=3) == 3
    table(range(3), named=True).to_parquet(str(tmp_path / "named.parquet"))
    assert found(tmp_path / "named.parquet") == TOTAL
    table(range(3)).remove_columns("label").to_parquet(str(tmp_path / "plain.parquet"))
    assert found(tmp_path / "plain.parquet") == 1


def test_validation_rows_that_are_not_known(source, monkeypatch, caplog):
    assert len(make(source).val_set) == 6
    monkeypatch.setattr("datamodules.stream_counts.countable", lambda file: "train/" in file)
    monkeypatch.setattr("datamodules.images.countable", lambda file: "train/" in file)
    with caplog.at_level("INFO"):
        data = make(source)
    assert data.val_set is None and len(data.train_set) == 20
    assert "training goes without its split 'validation', the rows of its shards are not known: state" in caplog.text
    with pytest.raises(ValueError, match=r"state shard_rows={train: ..., validation: ...}, or set val_split=null"):
        make(source, val_split="val")
    assert len(make(source, shard_rows={"val": 6}).val_set) == 6
    both = make(source, shard_rows={"train": [20], "validation": 6}, val_split="validation")
    assert len(both.train_set) == 20 and len(both.val_set) == 6
    assert make(source, shard_rows=20).val_set is None, "a number speaks of the training split"
    with pytest.raises(
        ValueError, match=r"shard_rows names the split 'fold', but '.*set' has \['train', 'validation'\]"
    ):
        make(source, shard_rows={"fold": 6})


def test_wrong_columns_and_labels_fail_before_training(source):
    with pytest.raises(ValueError, match=r"row 2 of shard '.*train/0.tar' has label 2, but num_classes=2"):
        make(source, num_classes=2)
    with pytest.raises(ValueError, match=r"8 of 8 rows that were tried cannot be used, such as row 0 of shard"):
        make(source, columns={"image": "txt"})
    with pytest.raises(ValueError, match=r"train/0.tar' holds 20 rows, but 5 were stated"):
        make(source, shard_rows=5)


def test_the_rows_that_were_tried_are_let_go(source):
    store = make(source).train_set.store
    assert not store._held and store._place is None


@pytest.mark.filterwarnings("ignore:.*The next row takes its place")
def test_damaged_images_stop_a_stream_when_there_are_many(tmp_path):
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / "0.tar"
    write_tar(path, range(100))
    data, marked = path.read_bytes(), 0
    for i in range(8, 100, 6):  # behind the rows that are tried
        data, marked = data.replace(encoded(i), bytes(len(encoded(i)))), marked + 1
    path.write_bytes(data)
    rows = make(tmp_path / "set", num_classes=100, val_split=None)
    with pytest.raises(ValueError, match=r"rows that were read cannot be used, such as row \d+ of shard '.*0.tar'"):
        list(rows.train_dataloader())
    with pytest.raises(ValueError, match=r"8 of 8 rows that were tried cannot be used"):
        path.write_bytes(path.read_bytes().replace(b"\x89PNG", b"no.."))
        make(tmp_path / "set", num_classes=100, val_split=None)


def test_a_damaged_shard_is_named(source):
    path = source / "train" / "0.tar"
    data = path.read_bytes()
    path.write_bytes(b"torn" * 400)
    with pytest.raises(ValueError, match=r"shard '.*train/0.tar' cannot be read \(ReadError: .*\): replace it"):
        make(source)
    path.write_bytes(data[: len(data) // 2 + 700])
    with pytest.raises(ValueError, match=r"shard '.*train/0.tar' cannot be read \(ReadError: .*\): replace it"):
        make(source)
    with pytest.raises(ValueError, match=r"shard '.*train/0.tar' cannot be read \(ReadError: .*\): replace it"):
        make(source, shard_rows={"train": 20})  # not counted, but read


def test_captions_of_a_stream(source):
    data = make(source, kind=ImageTextData, shuffle_buffer=8, shard_rows={"train": 20})
    assert data.num_classes == 1 and data.train_set.shuffle_buffer == 8
    batches = list(data.train_dataloader())
    captions = [text for batch in batches for text in batch["caption"]]
    assert sorted(captions) == sorted(f"row {i}" for i in range(20))
    assert all(torch.equal(batch["label"], torch.zeros(4, dtype=torch.int64)) for batch in batches)
    assert [text for batch in data.val_dataloader() for text in batch["caption"]] == [f"row {i}" for i in range(20, 26)]
    with pytest.raises(ValueError, match="has no captions"):
        make(source, kind=ImageTextData, columns={"caption": None})
