"""The readers of lists of rows: metadata files, COCO's panoptic.json, and the shards of streams."""

import io
import json
import tarfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from datamodules.image_rows import ImageRows
from datamodules.label_sources import read_coco
from datamodules.metadata import MetadataStore, count_listed_classes
from datamodules.sampler import RowKey
from datamodules.stream_counts import count_rows
from datamodules.streaming import StreamRows, open_stream_store, open_streams
from tests.datamodules.streams import encoded, members, table
from tests.fuzz.guard import fresh, survives
from tests.fuzz.mutations import JSON, mutated, mutated_tree

LINES = [{"file_name": f"{i}.png", "text": f"row {i}", "label": label} for i, label in enumerate("abca")]
CSV = b'file_name,text,label\n0.png,"a, b",1\n1.png,,2\n'
COCO = {
    "categories": [{"id": 1, "isthing": 1}, {"id": 7, "isthing": 0}],
    "annotations": [{"file_name": "a.png", "segments_info": [{"id": 5, "category_id": 7, "iscrowd": 1}]}],
}


def jsonl(lines) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def tar_of(rows) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as opened:
        for name, data in (member for i in rows for member in members(i)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Small shards of the three kinds, as bytes by suffix."""
    folder = tmp_path_factory.mktemp("shards")
    rows = table(range(3))
    rows.to_parquet(folder / "a.parquet")
    rows.save_to_disk(str(folder / "saved"))
    arrow = next((folder / "saved").glob("*.arrow"))
    return {".tar": tar_of(range(3)), ".parquet": (folder / "a.parquet").read_bytes(), ".arrow": arrow.read_bytes()}


def check_metadata(folder, name, data):
    path = folder / name
    path.write_bytes(data)
    survives(lambda: count_listed_classes(path, None), named=name)
    store = survives(lambda: MetadataStore(path), named=name)
    if store is not None:
        survives(lambda: [store.fetch([i]) for i in range(len(store))])


@pytest.fixture
def pictures(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
    return tmp_path


@given(data=mutated([jsonl(LINES)]) | st.binary(max_size=40))
def test_lines_of_json(data, pictures):
    check_metadata(pictures, "metadata.jsonl", data)


@example(lines=[{**LINES[0], "file_name": "\0"}, *LINES[1:]])
@given(lines=mutated_tree(LINES))
def test_values_of_json(lines, pictures):
    check_metadata(pictures, "metadata.jsonl", jsonl(lines))


@given(data=mutated([CSV]))
def test_lines_of_csv(data, pictures):
    check_metadata(pictures, "metadata.csv", data)


@given(data=mutated([json.dumps(COCO).encode()]) | mutated_tree(COCO, values=JSON).map(json.dumps).map(str.encode))
def test_panoptic_files(data, tmp_path):
    path = fresh(tmp_path, data, ".json")
    survives(lambda: read_coco(path), named=path.name)


@pytest.mark.parametrize("suffix", [".tar", ".parquet", ".arrow"])
@given(data=st.data())
def test_counting_the_rows_of_a_shard(suffix, shards, tmp_path, data):
    path = fresh(tmp_path, data.draw(mutated([shards[suffix]])), suffix)
    rows = survives(lambda: count_rows(str(path)), named=path.name)
    assert rows is None or rows >= 0


def read_stream(path, cache):
    """All rows of a stream of one shard; damaged ones are replaced by others."""
    split = open_streams(str(path), cache_dir=str(cache))["train"]
    store = open_stream_store(split, str(path), columns={"label": None}, cache_dir=str(cache))
    rows = StreamRows(ImageRows(store, 8, num_classes=1, on_bad="skip"), store)
    return [rows.__getitems__([RowKey(0, i)]) for i in range(len(rows))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".tar", ".parquet", ".arrow"])
@settings(max_examples=8)  # datasets takes a fifth of a second to open one
@given(data=st.data())
def test_streams(suffix, shards, tmp_path, data):
    path = fresh(tmp_path, data.draw(mutated([shards[suffix]], most=2)), suffix)
    survives(lambda: read_stream(path, tmp_path / "cache"), memory=2**30)
