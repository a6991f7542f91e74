"""Rows of shards: counted, stated, or an error that asks for them."""

import pytest

from datamodules.stream_counts import TAR_COUNTS, known_rows, tar_rows
from tests.datamodules.streams import SHARDS, write_tar, write_tars


def test_rows_are_counted_or_stated(tmp_path):
    write_tars(tmp_path)
    assert [tar_rows(path) for path in sorted(tmp_path.glob("*.tar"))] == SHARDS
    files = ["hf://datasets/a/b/0.tar", "hf://datasets/a/b/1.tar"]
    with pytest.raises(ValueError, match=r"rows of 'hf://.*/0.tar', a shard of 'a/b', cannot be counted .* list of 2"):
        known_rows(files, None, source="a/b")
    assert known_rows(files, 9, source="a/b") == [9, 9] and known_rows(files, [9, 4], source="a/b") == [9, 4]
    with pytest.raises(ValueError, match=r"shard_rows=\[1, 2, 3\] does not fit the 2 shards of 'a/b'"):
        known_rows(files, [1, 2, 3], source="a/b")


def test_tars_are_scanned_once_until_they_change(tmp_path, monkeypatch):
    files = [str(tmp_path / f"{number}.tar") for number in range(2)]
    for number, file in enumerate(files):
        write_tar(file, range(2 + number))
    scanned = []
    monkeypatch.setattr("datamodules.stream_counts.tar_rows", lambda file: scanned.append(file) or tar_rows(file))
    options = {"source": "a", "cache_dir": str(tmp_path / "cache")}
    for _ in range(2):
        assert known_rows(files, None, **options) == [2, 3]
    assert scanned == files
    write_tar(files[1], range(9))
    assert known_rows(files, None, **options) == [2, 9] and scanned == [*files, files[1]]


def test_damaged_counts_are_counted_anew(tmp_path, caplog):
    write_tar(tmp_path / "0.tar", range(4))
    options = {"source": "a", "cache_dir": str(tmp_path)}
    for damage in ("{", "[]", '{"x": "y"}'):
        (tmp_path / TAR_COUNTS).write_text(damage)
        with caplog.at_level("INFO"):
            assert known_rows([str(tmp_path / "0.tar")], None, **options) == [4]
        assert f"{TAR_COUNTS}' is damaged: the tars are counted anew" in caplog.text
        caplog.clear()
    assert known_rows([str(tmp_path / "0.tar")], None, **options) == [4] and not caplog.text


@pytest.mark.parametrize("kind", ["tar", "parquet", "arrow"])
def test_a_damaged_shard_is_named(tmp_path, kind):
    path = tmp_path / f"0.{kind}"
    path.write_bytes(b"torn" * 200)
    with pytest.raises(
        ValueError, match=rf"shard '.*0.{kind}' cannot be read \(\w+: .*\): replace it if it is damaged$"
    ):
        known_rows([str(path)], None, source="a", cache_dir=str(tmp_path))
