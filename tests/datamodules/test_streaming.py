"""Streams read from files: all formats, loaders with workers, resume at any batch, columns, shards of wrong length."""

import pickle
from itertools import chain, islice

import pytest
from torch.utils.data import DataLoader

from datamodules.sampler import RowKey, as_batch, coin
from datamodules.streaming import StreamSplit, StreamStore, open_stream_store, open_streams
from tests.datamodules.streams import (
    SEED,
    SHARDS,
    TOTAL,
    encoded,
    make_loader,
    make_rows,
    make_sampler,
    open_store,
    open_tars,
    plain,
    ranges,
    table,
    write_tar,
    write_tars,
)


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return write_tars(tmp_path_factory.mktemp("tars"))


def sources(folder, kind):
    """Shards of `kind` below `folder`, and the source to open them by."""
    if kind == "saved":
        table(range(TOTAL), named=True).save_to_disk(str(folder / "saved"), num_shards=7)
        return folder / "saved"
    (folder / "data").mkdir()
    for number, rows in enumerate(ranges()):
        path = folder / "data" / f"train-{number:03d}.{kind}"
        if kind == "parquet":
            table(rows, named=True).to_parquet(str(path), batch_size=2)  # row groups of two
        elif kind == "arrow":
            import pyarrow as pa

            data = table(rows, named=True).data.table
            opener = pa.ipc.new_file if number % 2 else pa.ipc.new_stream  # both layouts
            with opener(str(path), data.schema) as writer:
                writer.write_table(data, max_chunksize=2)
    return folder


@pytest.mark.parametrize("kind", ["tar", "parquet", "arrow", "saved"])
def test_rows_of_every_format(tmp_path, tars, kind):
    if kind == "tar":
        store = open_tars(tars)
    else:
        store = open_store(sources(tmp_path, kind), num_classes=None, cache_dir=str(tmp_path / "cache"))
        assert store.class_names == [str(i) for i in range(TOTAL)]
    assert store.shard_rows == (SHARDS if kind != "saved" else [7] * 5 + [6] * 2) and store.num_classes == TOTAL
    rows = make_rows(store)
    for epoch in (0, 1):
        seen = []
        for rank in (0, 1):
            loader = make_loader(rows, rank=rank, world_size=2)
            loader.sampler.set_epoch(epoch)
            for labels, lefts, captions in map(plain, loader):
                assert captions == [f"row {i}" for i in labels]
                flips = [coin(SEED, RowKey(epoch, i)) for i in labels]
                assert lefts == [255 - 2 * i if flip else 2 * i for i, flip in zip(labels, flips, strict=True)]
                seen += labels
        assert len(seen) == len(set(seen)) == 42


def test_sources_by_file_and_pattern_and_split(tmp_path, tars):
    pattern = open_store(f"{tars}/train-*.tar", columns={"label": "cls"}, cache_dir=str(tmp_path / "cache"))
    assert pattern.shard_rows == SHARDS
    one = open_store(tars / "train-001.tar", columns={"label": "cls"}, cache_dir=str(tmp_path / "cache"))
    assert one.shard_rows == [11] and one.files == [str(tars / "train-001.tar")]
    for name in ("train", "val"):
        (tmp_path / "set" / name).mkdir(parents=True)
        write_tar(tmp_path / "set" / name / "0.tar", range(3 if name == "val" else 5))
    splits = open_streams(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert set(splits) == {"train", "validation"}
    assert open_stream_store(splits["validation"], "set", columns={"label": None}).shard_rows == [3]


def test_looking_at_rows_and_limits(tars):
    store = open_tars(tars)
    rows = make_rows(store, flip=False)
    assert [rows[i]["label"].item() for i in (46, 0, 3, 13)] == [46, 0, 3, 13] and len(rows) == TOTAL
    batch = rows.__getitems__([RowKey(0, 20), RowKey(0, 5)])
    assert batch["label"].tolist() == [20, 5]
    few = make_rows(store, limit_n=10)
    assert few.shard_rows == [3, 7, 0, 0, 0, 0, 0] and len(few) == 10
    seen = [label for batch in make_loader(few, batch=5) for label in batch["label"].tolist()]
    assert sorted(seen) == list(range(10))


def test_columns_of_tars(tmp_path, tars):
    rows = make_rows(open_tars(tars), flip=False)
    assert rows[9]["caption"] == ["row 9"]
    columns = {"label": "cls", "caption": "json.note"}
    noted = open_store(tars, columns=columns, cache_dir=str(tmp_path / "cache"))
    loader = make_loader(make_rows(noted), num_workers=1, shuffle=False)
    assert next(iter(loader))["caption"] == [f"note {i}" for i in range(6)]
    plain_rows = open_store(
        tars, columns={"label": None, "caption": None}, num_classes=None, cache_dir=str(tmp_path / "cache")
    )
    batch = make_rows(plain_rows)[4]
    assert batch["label"].tolist() == [0] and "caption" not in batch
    with pytest.raises(ValueError, match=r"column 'cls' does not tell its classes: set num_classes"):
        open_tars(tars, num_classes=None)
    with pytest.raises(ValueError, match=r"column 'txt' does not tell its classes: its labels are names"):
        open_store(tars, columns={"label": "txt"}, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"no column 'json.absent' for caption"):
        open_store(tars, columns={"caption": "json.absent"}, cache_dir=str(tmp_path / "cache"))


def test_two_ranks_with_two_workers_each(tars):
    rows = make_rows(open_tars(tars))
    loaders = [make_loader(rows, rank=rank, world_size=2, num_workers=2, persistent_workers=True) for rank in (0, 1)]
    for _ in range(2):
        batches = [list(loader) for loader in loaders]
        assert [len(part) for part in batches] == [7, 7]
        labels = [label for batch in chain(*batches) for label in batch["label"].tolist()]
        assert len(labels) == len(set(labels)) == 42


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_equals_the_unbroken_run(tars, num_workers):
    store = open_tars(tars)
    options = {"num_workers": num_workers, "batch": 6, "buffer": 12}
    reference = make_loader(make_rows(store), **options)
    unbroken = [plain(batch) for _ in range(2) for batch in reference]
    assert len(unbroken) == 14
    for stop in range(14) if num_workers == 0 else (4, 9):
        loader, seen = make_loader(make_rows(store), **options), []
        while len(seen) < stop:
            seen += [plain(batch) for batch in islice(loader, stop - len(seen))]
        resumed = make_loader(make_rows(store), **options)
        resumed.load_state_dict(pickle.loads(pickle.dumps(loader.state_dict())))
        while len(seen) < len(unbroken):
            seen += [plain(batch) for batch in islice(resumed, len(unbroken) - len(seen))]
        assert seen == unbroken


def test_processes_do_not_share_files_that_the_main_process_opened(tmp_path):
    write_tar(tmp_path / "0.tar", range(100))
    rows = make_rows(open_tars(tmp_path, num_classes=100))
    first = next(iter(make_sampler(rows, num_workers=2, buffer=1)))
    rows.__getitems__([first])  # leaves the shard open where the first worker's part goes on
    loaders = [make_loader(rows, num_workers=2, buffer=1) for _ in range(2)]
    at_once = [(plain(a), plain(b)) for a, b in zip(*loaders, strict=True)]
    copy = pickle.loads(pickle.dumps(rows))  # how a spawned worker gets it
    expected = [plain(batch) for batch in make_loader(copy, num_workers=2, buffer=1)]
    assert at_once == [(batch, batch) for batch in expected] and len(expected) == 16


def test_each_shard_is_opened_once(tars, monkeypatch):
    opened, original = [], StreamStore._open
    monkeypatch.setattr(StreamStore, "_open", lambda self, *place: opened.append(place) or original(self, *place))
    assert len(list(make_loader(make_rows(open_tars(tars)), batch=2, buffer=4))) == 23
    assert sorted(opened) == [(shard, 0) for shard in range(len(SHARDS))]


def test_the_state_names_the_layout_and_refuses_another_inside_an_epoch(tars):
    rows = make_rows(open_tars(tars))
    loader = make_loader(rows)
    list(islice(loader, 3))
    state = loader.state_dict()
    layout = {"rows": 47, "batch_size": 6, "world_size": 1, "num_workers": 1, "chunk_batches": 1}
    assert state == {"epoch": 0, "done": 3, "batches": 7} | layout
    with pytest.raises(ValueError, match=r"stream read with num_workers=1, but it is now 2: keep it, or resume at"):
        make_loader(rows, num_workers=2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"batch_size=6, but it is now 3"):
        make_loader(rows, world_size=2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"chunk_batches=1, but it is now 2"):
        make_loader(rows, buffer=12).load_state_dict(state)
    with pytest.raises(ValueError, match=r"rows=None, but it is now 47"):
        make_loader(rows).load_state_dict({"epoch": 0, "done": 3, "batches": 7})  # of a map-style loader
    list(loader)
    other = make_loader(rows, world_size=2, num_workers=1)
    other.load_state_dict(loader.state_dict() | {"done": 7})
    assert other.state_dict()["epoch"] == 1 and len(list(other)) == 7


def test_validation_loader_with_workers(tars):
    seen = []
    for rank in range(2):
        rows = make_rows(open_tars(tars), flip=False)
        sampler = make_sampler(rows, shuffle=False, batch=8, rank=rank, world_size=2, num_workers=2)
        loader = DataLoader(rows, batch_size=sampler.batch_size, sampler=sampler, num_workers=2, collate_fn=as_batch)
        seen += [label for batch in loader for label in batch["label"].tolist()]
    assert sorted(seen) == list(range(TOTAL))


@pytest.mark.filterwarnings("ignore:.*The next row takes its place")
def test_a_bad_row_is_replaced_even_at_the_edge_of_a_chunk(tmp_path):
    for number, rows in enumerate([range(4), range(4, 8)]):
        write_tar(tmp_path / f"{number}.tar", rows)
    data = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(data.replace(encoded(3), encoded(3)[:20] + bytes(len(encoded(3)) - 20)))
    rows = make_rows(open_tars(tmp_path), on_bad="skip")
    labels = [batch["label"].tolist() for batch in make_loader(rows, batch=2, buffer=2)]
    assert sorted(chain(*labels)) == [0, 1, 2, 4, 4, 5, 6, 7]
    assert make_loader(rows, batch=2, buffer=2).dataset[3]["label"].tolist() == [4]


@pytest.mark.parametrize("stated", [4, 20])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_of_another_length_is_named(tars, stated, num_workers):
    counts = [*SHARDS[:2], stated, *SHARDS[3:]]
    rows = make_rows(open_tars(tars, shard_rows=counts))
    message = rf"train-002.tar' holds 7 rows, but {stated} were stated: correct shard_rows"
    with pytest.raises(ValueError, match=message):
        for _ in range(2):  # the dropped tail may hide it in one epoch
            list(make_loader(rows, batch=1, num_workers=num_workers))


def test_a_start_beyond_the_end_of_a_shard_counts_it(tars):
    store = open_tars(tars, shard_rows=[30, *SHARDS[1:]])
    with pytest.raises(ValueError, match=r"train-000.tar' holds 3 rows, but 30 were stated"):
        store.fetch([25])


def test_source_errors(tmp_path, tmp_path_factory):
    with pytest.raises(FileNotFoundError, match=r"absent' does not exist"):
        open_streams(str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=r"'.*\*.tar' matches no file: correct the pattern"):
        open_streams(f"{tmp_path}/*.tar", cache_dir=str(tmp_path / "cache"))
    pictures = tmp_path_factory.mktemp("pictures")
    (pictures / "0.png").write_bytes(encoded(0))
    with pytest.raises(ValueError, match=r"holds single images \('.*0.png'\), no shards: read it without streaming"):
        open_streams(str(pictures), cache_dir=str(tmp_path / "cache"))


def test_an_iterable_table_made_in_memory():
    split = StreamSplit(table(range(TOTAL)).to_iterable_dataset(num_shards=4), [f"part {i}" for i in range(4)])
    rows = make_rows(StreamStore(split, "memory", [12, 12, 12, 11], num_classes=TOTAL), flip=False)
    assert sorted(label for batch in make_loader(rows, batch=1) for label in batch["label"].tolist()) == [*range(TOTAL)]
