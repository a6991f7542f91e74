"""ImageData read in its three ways, in any order, as a stream and from a crop cache: the same rows, pixel for pixel."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from datamodules.crop_cache import write_crop_cache
from datamodules.images import ImageData
from tests.datamodules.streams import SHARDS, TOTAL, encoded, ranges, table, write_tar


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    for number, rows in enumerate(ranges()):
        write_tar(folder / f"{number:03d}.tar", rows)
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parquet")
    for number, rows in enumerate(ranges()):
        table(rows, named=True).to_parquet(folder / f"train-{number:05d}-of-{len(SHARDS):05d}.parquet")
    return folder


@pytest.fixture
def pictures(tmp_path):
    """Class folders with a validation split; images are larger than the crop."""
    for split, count in (("train", 9), ("val", 4)):
        for label in ("a", "b"):
            (tmp_path / "set" / split / label).mkdir(parents=True)
            for i in range(count):
                image = Image.effect_noise((30 + i, 40), 90).convert("RGB")
                image.save(tmp_path / "set" / split / label / f"{i}.png")
    return tmp_path / "set"


def make(source, *, rank=0, world=1, **options):
    """A data module as process `rank` of `world` sees it."""
    options = {"image_size": 8, "batch_size": 4, "num_workers": 0, "val_split": None} | options
    data = ImageData(str(source), **options)
    data.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world,
        accumulate_grad_batches=1,
        limit_train_batches=1.0,
        overfit_batches=0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    data.setup()
    return data


def epoch(loader):
    batches = list(loader)
    return [label for batch in batches for label in batch["label"].tolist()], batches


@pytest.mark.parametrize("kind", ["tars", "parquet"])
def test_two_ranks_with_two_workers_see_each_streamed_image_once(kind, request, tmp_path):
    options = {"streaming": True, "num_workers": 2, "cache_dir": str(tmp_path), "batch_size": 4, "shuffle_buffer": 6}
    options["num_classes"] = TOTAL
    seen = []
    for rank in (0, 1):
        data = make(request.getfixturevalue(kind), rank=rank, world=2, **options)
        assert data.steps_per_epoch() == TOTAL // 4
        labels, batches = epoch(data.train_dataloader())
        assert len(batches) == TOTAL // 4 and all(len(batch["label"]) == 2 for batch in batches)
        assert [f"row {label}" for label in labels] == [text for batch in batches for text in batch["caption"]]
        seen += labels
    assert len(set(seen)) == len(seen) == TOTAL // 4 * 4, "none twice; only what fills no batch is left out"


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_resume_at_any_step_repeats_and_misses_none(parquet, tmp_path, streaming):
    options = {"streaming": streaming, "cache_dir": str(tmp_path), "flip": True}
    loader = make(parquet, **options).train_dataloader()
    unbroken = [batch for _ in range(2) for batch in loader]
    length = len(unbroken) // 2
    assert length == TOTAL // 4
    for stop in range(len(unbroken)):
        first, second = (make(parquet, **options).train_dataloader() for _ in range(2))
        iterator = iter(first)
        for _ in range(stop):
            if (batch := next(iterator, None)) is None:
                iterator = iter(first)
                next(iterator)
        second.load_state_dict(first.state_dict())
        end = (stop // length + 1) * length  # of the epoch in which the next batch is
        for batch, wanted in zip(second, unbroken[stop:end], strict=True):
            assert torch.equal(batch["image"], wanted["image"]) and torch.equal(batch["label"], wanted["label"])
            assert batch["caption"] == wanted["caption"]


def test_stream_and_table_hold_the_same_pixels(parquet, tmp_path):
    options = {"flip": False, "cache_dir": str(tmp_path)}
    whole, stream = (make(parquet, streaming=streaming, **options) for streaming in (False, True))
    assert stream.num_classes == whole.num_classes == TOTAL and stream.class_names == whole.class_names
    for one, other in zip(whole.ordered_loader("train"), stream.ordered_loader("train"), strict=True):
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["label"], other["label"])


def test_limit_of_a_stream_takes_its_first_rows(parquet, tmp_path):
    data = make(parquet, streaming=True, limit_n=10, cache_dir=str(tmp_path))
    labels, _ = epoch(data.ordered_loader("train"))
    assert labels == list(range(10))


def test_crop_cache_is_the_direct_path_and_needs_no_source(pictures, tmp_path):
    options = {"val_split": "auto", "batch_size": 3}
    direct = make(pictures, **options)
    cached = make(pictures, crop_cache=str(tmp_path / "cache"), **options)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["train", "val"]
    shutil.move(pictures, tmp_path / "away")
    again = make(pictures, crop_cache=str(tmp_path / "cache"), **options)
    assert again.class_names == direct.class_names == ["a", "b"] and again.discover_classes() == 2
    shutil.move(tmp_path / "away", pictures)
    for data in (cached, again):
        for loader in ("train_dataloader", "val_dataloader"):
            ours, wanted = list(getattr(data, loader)()), list(getattr(direct, loader)())
            assert len(ours) == len(wanted) > 1
            for one, other in zip(ours, wanted, strict=True):
                assert torch.equal(one["image"], other["image"]), "the same rows, with the same flips"
                assert torch.equal(one["label"], other["label"])


def test_an_interrupted_cache_is_gone_on_with(pictures, tmp_path, monkeypatch):
    """The validation split is written first, so that a complete training split means a complete cache."""
    import datamodules.images as images

    def write(rows, folder, *args, **options):
        if folder.name == "train":
            raise KeyboardInterrupt
        write_crop_cache(rows, folder, *args, **options)

    options = {"val_split": "auto", "crop_cache": str(tmp_path / "cache")}
    monkeypatch.setattr(images, "write_crop_cache", write)
    with pytest.raises(KeyboardInterrupt):
        make(pictures, **options)
    monkeypatch.undo()
    assert ImageData(str(pictures), 8, **options).discover_classes() == 2, "the training split is not there yet"
    data = make(pictures, **options)
    assert len(data.train_set) == 18 and len(data.val_set) == 8


def test_a_cache_without_validation_gets_it_when_it_is_asked_for(pictures, tmp_path, caplog):
    cache = {"crop_cache": str(tmp_path / "cache")}
    assert make(pictures, **cache).val_set is None
    written = (tmp_path / "cache" / "train" / "meta.json").stat().st_mtime_ns
    shutil.move(pictures, tmp_path / "away")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        make(pictures, val_split="auto", **cache)  # the source had one, so going without would be wrong
    with pytest.raises(ValueError, match=r"has no split 'test': it has \['train', 'val'\]"):
        make(pictures, val_split="test", **cache)
    shutil.move(tmp_path / "away", pictures)
    assert len(make(pictures, val_split="validation", **cache).val_set) == 8
    caplog.clear()
    with caplog.at_level("INFO"):
        assert len(make(f"{pictures}/", val_split="auto", **cache).val_set) == 8
    assert (tmp_path / "cache" / "train" / "meta.json").stat().st_mtime_ns == written
    line = (
        f"crop cache '{tmp_path}/cache': 18 images of 'train' and 8 images of 'val', 2 classes, made from '{pictures}'"
    )
    assert caplog.text.count(line) == 1


def test_a_cache_keeps_the_classes_that_were_found(tmp_path, pictures):
    table(range(5)).save_to_disk(str(tmp_path / "saved"))
    options = {"crop_cache": str(tmp_path / "cache"), "columns": {"caption": None}}
    for stated, number in ((8, 8), (None, 5), (9, 9)):
        data = make(tmp_path / "saved", num_classes=stated, **options)
        assert data.num_classes == data.discover_classes() == number
    with pytest.raises(ValueError, match="has 5 classes, more than num_classes=4"):
        make(tmp_path / "saved", num_classes=4, **options)


def test_classes_that_only_validation_has_are_refused_at_the_start(tmp_path):
    import datasets

    splits = {"train": table(range(3)), "val": table(range(5))}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"'val' has 5 classes, more than the 3 of 'train': set num_classes=5"):
        make(tmp_path / "saved", val_split="auto")
    assert len(make(tmp_path / "saved", val_split="auto", num_classes=5).val_set) == 5


def test_a_crop_cache_that_is_a_file(tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(ValueError, match=r"crop_cache='.*cache' is a file: name a folder"):
        ImageData("a/b", 8, crop_cache=str(tmp_path / "cache"))


def test_a_cache_of_another_size_is_refused(pictures, tmp_path):
    make(pictures, crop_cache=str(tmp_path / "cache"), val_split="auto")
    with pytest.raises(ValueError, match="size=8, but 16 is asked for"):
        make(pictures, crop_cache=str(tmp_path / "cache"), val_split="auto", image_size=16)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"shard_rows": 5}, "set streaming=true"),
        ({"streaming": True, "crop_cache": "x"}, "exclude each other"),
        ({"streaming": True, "shuffle_buffer": 0}, "shuffle_buffer=0"),
    ],
)
def test_options_that_do_not_go_together(parquet, tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        make(parquet, cache_dir=str(tmp_path), **options).train_dataloader()


def test_stream_that_does_not_tell_its_classes(tars, tmp_path):
    with pytest.raises(ValueError, match="set num_classes"):
        make(tars, streaming=True, cache_dir=str(tmp_path))


def test_encoded_rows_differ():
    assert len({encoded(i) for i in range(TOTAL)}) == TOTAL, "the tests above tell rows apart by their pixels"
