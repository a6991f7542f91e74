"""Image sources: folders, parquet, saved tables; flips, labels and corrupt files."""

import io
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.image_rows import ImageRows
from datamodules.images import ImageData
from datamodules.sampler import RowKey, coin
from datamodules.transforms import center_crop, to_uint8_chw


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """No network, and no cache outside the test's folder. The library reads these variables when imported."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def picture(seed, width=20, height=14):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(seed):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def make_folder(root, classes, start=0):
    """One PNG picture per name in {class: [names]}, numbered from `start` in sorted order."""
    for name in sorted(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for file in classes[name]:
            picture(start).save(root / name / file)
            start += 1


def open_data(source, **options):
    defaults = {"batch_size": 2, "num_workers": 0, "val_split": None}
    data = ImageData(str(source), 8, **defaults | options)
    data.prepare_data()
    data.setup("fit")
    return data


def read(rows, indices, epoch=0):
    return rows.__getitems__([RowKey(epoch, i) for i in indices])


def expected(seed):
    return to_uint8_chw(center_crop(picture(seed), 8))


def table(labels, *, image_type="image", names=None, image="image", label="label", captions=None):
    import datasets

    features = {image: datasets.Image() if image_type == "image" else datasets.Value("binary")}
    columns = {image: [encoded(i) for i in range(len(labels))]}
    if label is not None:
        features[label] = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
        columns[label] = labels
    if captions is not None:
        features["caption"], columns["caption"] = datasets.Value("string"), captions
    if image_type == "image":
        columns[image] = [{"bytes": data, "path": None} for data in columns[image]]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_class_folders_label_by_sorted_name(tmp_path):
    make_folder(tmp_path, {"dog": ["a.png"], "Cat": ["b.PNG", "a.png"], "eel/deep": ["x.png"]})
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    data = open_data(tmp_path, flip=False)
    assert data.class_names == ["Cat", "dog", "eel"] and data.num_classes == 3
    batch = read(data.train_set, range(4))
    assert batch["label"].tolist() == [0, 0, 1, 2] and batch["label"].dtype == torch.int64
    # pictures are numbered in the order given above, the store sorts a.png before b.PNG
    assert torch.equal(batch["image"], torch.stack([expected(i) for i in (1, 0, 2, 3)]))
    assert "caption" not in batch


def test_flat_folder_has_one_class(tmp_path):
    make_folder(tmp_path, {"": ["b.png", "a.png", "c.png"]})
    data = open_data(tmp_path)
    assert data.num_classes == 1 and data.class_names is None and len(data.train_set) == 3
    assert read(data.train_set, [2, 0])["label"].tolist() == [0, 0]


def test_split_folders_share_the_training_labels(tmp_path):
    make_folder(tmp_path / "train", {"a": ["0.png"], "b": ["0.png", "1.png"], "c": ["0.png"]})
    make_folder(tmp_path / "val", {"c": ["0.png"]}, start=9)
    data = open_data(tmp_path, val_split="validation")
    assert (len(data.train_set), len(data.val_set)) == (4, 1)
    batch = next(iter(data.val_dataloader()))
    assert batch["label"].tolist() == [2] and torch.equal(batch["image"][0], expected(9))
    assert data.train_dataloader().batch_size == 2
    make_folder(tmp_path / "val", {"d": ["0.png"]})
    with pytest.raises(ValueError, match=r"val/d' is none of the 3 training classes"):
        open_data(tmp_path, val_split="val")


def test_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent' does not exist: give an existing folder"):
        open_data(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty' holds no images: expected files .*\.png"):
        open_data(tmp_path / "empty")
    make_folder(tmp_path / "mixed", {"": ["a.png"], "dog": ["b.png"]})
    with pytest.raises(ValueError, match=r"mixed' holds both images \('a.png'\) and folders \('dog'\)"):
        open_data(tmp_path / "mixed")
    make_folder(tmp_path / "hole", {"a": ["a.png"], "b": []})
    with pytest.raises(ValueError, match=r"hole/b' holds no images"):
        open_data(tmp_path / "hole")
    make_folder(tmp_path / "plain", {"a": ["a.png"]})
    with pytest.raises(FileNotFoundError, match=r"empty' holds no images"):
        open_data(tmp_path / "empty", columns={"label": None})
    (tmp_path / "hole" / "b" / "empty.png").touch()
    with pytest.raises(ValueError, match=r"hole/b' holds no images"):
        open_data(tmp_path / "hole")
    (tmp_path / "empty" / "a.png").touch()
    with pytest.raises(FileNotFoundError, match=r"empty' holds no images: .*, and '.*/a.png' is not usable: empty"):
        open_data(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"no split 'validation': it has \['train'\]; .* val_split to null"):
        open_data(tmp_path / "plain", val_split="validation")
    with pytest.raises(ValueError, match=r"columns=.*is a folder of images without metadata.jsonl"):
        open_data(tmp_path / "plain", columns={"image": "jpg"})
    (tmp_path / "list.csv").write_text("x")
    with pytest.raises(ValueError, match=r"list.csv' is no folder and no .parquet"):
        open_data(tmp_path / "list.csv")


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    make_folder(tmp_path, {"a": ["0.png"], "b": ["0.png"]})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"folder '.*/b' cannot be listed \(Permission denied\): allow reading or"):
        open_data(tmp_path)


def test_images_may_lie_beside_folders_without_any(tmp_path):
    make_folder(tmp_path, {"": ["0.png"], "papers/old": []})
    (tmp_path / "papers" / "old" / "a.pdf").touch()
    assert len(open_data(tmp_path, batch_size=1).train_set) == 1


def test_flips_depend_on_seed_epoch_and_row_only(tmp_path):
    make_folder(tmp_path, {"": [f"{i}.png" for i in range(8)]})
    images = [expected(i) for i in range(8)]
    patterns = set()
    for epoch in range(3):
        batch = read(open_data(tmp_path, seed=5).train_set, range(8), epoch)["image"]
        flips = [coin(5, RowKey(epoch, i)) for i in range(8)]
        wanted = [image.flip(-1) if flip else image for image, flip in zip(images, flips, strict=True)]
        assert torch.equal(batch, torch.stack(wanted))
        patterns.add(tuple(flips))
    assert len(patterns) == 3
    plain = open_data(tmp_path, val_split="train", flip=False)
    assert torch.equal(read(plain.train_set, range(8), 2)["image"], torch.stack(images))
    assert torch.equal(read(open_data(tmp_path, val_split="train").val_set, range(8), 2)["image"], torch.stack(images))


def test_workers_give_the_same_batches(tmp_path):
    make_folder(tmp_path, {"a": [f"{i}.png" for i in range(5)], "b": ["x.png"]})
    alone = list(open_data(tmp_path).train_dataloader())
    workers = list(open_data(tmp_path, num_workers=2).train_dataloader())
    assert len(alone) == len(workers) == 3
    for a, b in zip(alone, workers, strict=True):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


TORN = r"file '.*a/1.png' is no readable image \(.*truncated.*replace or remove"


def test_a_source_with_many_damaged_images_is_refused_at_the_start(tmp_path):
    make_folder(tmp_path, {"a": [f"{i}.png" for i in range(9)]})
    truncate(tmp_path / "a" / "1.png")
    with pytest.raises(ValueError, match=f"1 of 9 rows that were tried cannot be used, such as {TORN}"):
        open_data(tmp_path)
    make_folder(tmp_path, {"a": ["9.png"]})
    open_data(tmp_path)  # one of ten is let through
    with pytest.raises(ValueError, match=f"1 of 10 rows that were tried cannot be used, such as {TORN}"):
        open_data(tmp_path, on_bad="error")
    with pytest.raises(ValueError, match="on_bad='ignore' is unknown: use 'skip' or 'error'"):
        open_data(tmp_path, on_bad="ignore")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_image_stops_the_run_where_that_is_asked_for(tmp_path, num_workers):
    make_folder(tmp_path, {"a": ["0.png", "1.png"]})
    data = open_data(tmp_path, num_workers=num_workers, on_bad="error")
    truncate(tmp_path / "a" / "1.png")
    with pytest.raises(ValueError, match=TORN) as caught:
        list(data.train_dataloader())
    assert caught.type is ValueError  # not a subclass: the last line of a worker's error has to begin with that


def test_a_damaged_row_is_replaced_by_the_next_one(tmp_path):
    make_folder(tmp_path, {"a": [f"{i}.png" for i in range(3)], "b": ["3.png"]})
    data = open_data(tmp_path, flip=False)
    for name in ("a/1.png", "a/2.png"):
        truncate(tmp_path / name)
    with pytest.warns(UserWarning, match="truncated.*The next row takes its place") as warned:
        batch = read(data.train_set, [1, 3])
    assert [f"a/{i}.png" in str(warned[i - 1].message) for i in (1, 2)] == [True] * len(warned)
    assert torch.equal(batch["image"], torch.stack([expected(3)] * 2)) and batch["label"].tolist() == [1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = read(data.train_set, [2, 0])  # known by now
    assert torch.equal(again["image"], torch.stack([expected(3), expected(0)]))
    assert list(data.train_set.bad) == [1, 2]
    truncate(tmp_path / "b" / "3.png")
    with pytest.warns(UserWarning, match="b/3.png"):
        assert torch.equal(read(data.train_set, [3])["image"][0], expected(0))  # after the last the first


def test_a_disk_that_is_gone_stops_the_run(tmp_path):
    make_folder(tmp_path, {"a": ["0.png", "1.png"]})
    data = open_data(tmp_path)
    shutil.rmtree(tmp_path / "a")
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"2 rows one after another cannot be used; the first: .*1.png.*No such file"),
    ):
        read(data.train_set, [1])


@pytest.mark.parametrize("image_type", ["image", "binary"])
def test_parquet_file(tmp_path, image_type):
    path = tmp_path / "rows.parquet"
    table([2, 0, 1], image_type=image_type, names=["x", "y", "z"]).to_parquet(str(path))
    data = open_data(path, flip=False, cache_dir=str(tmp_path / "cache"))
    assert data.num_classes == 3 and data.class_names == ["x", "y", "z"]
    batch = read(data.train_set, [2, 0])
    assert batch["label"].tolist() == [1, 2]
    assert torch.equal(batch["image"], torch.stack([expected(2), expected(0)]))


def test_folder_of_parquet_files_with_splits(tmp_path):
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    table([0, 1, 0]).to_parquet(str(folder / "train-00000-of-00001.parquet"))
    table([1]).to_parquet(str(folder / "validation-00000-of-00001.parquet"))
    data = open_data(tmp_path / "set", val_split="val", num_classes=2, cache_dir=str(tmp_path / "cache"))
    assert (len(data.train_set), len(data.val_set), data.num_classes) == (3, 1, 2)


def test_save_to_disk_with_columns_and_captions(tmp_path):
    import datasets

    rows = table([1, 0], image="jpg", label="cls", captions=["a cat", "a dog"])
    datasets.DatasetDict({"train": rows, "val": rows.select([1])}).save_to_disk(str(tmp_path / "saved"))
    columns = {"image": "jpg", "label": "cls"}
    data = open_data(tmp_path / "saved", val_split="validation", columns=columns, flip=False)
    batch = read(data.train_set, [0, 1])
    assert batch["caption"] == ["a cat", "a dog"] and batch["label"].tolist() == [1, 0]
    assert read(data.val_set, [0])["caption"] == ["a dog"]
    with pytest.raises(ValueError, match=r"no column 'img' for image: it has \['jpg', 'cls', 'caption'\]; map it"):
        open_data(tmp_path / "saved", columns={"image": "img"})
    with pytest.raises(ValueError, match=r"no column 'text' for caption"):
        open_data(tmp_path / "saved", columns=columns | {"caption": "text"})
    with pytest.raises(ValueError, match=r"columns names \['target'\]"):
        open_data(tmp_path / "saved", columns={"target": "cls"})
    with pytest.raises(ValueError, match=r"no split 'test': it has \['train', 'val'\]"):
        open_data(tmp_path / "saved", split="test", columns=columns)


def test_labels_out_of_range_are_named(tmp_path):
    table([0, -1, 3]).save_to_disk(str(tmp_path / "s"))
    with pytest.raises(ValueError, match=r"row 2 of .* has label 3, but num_classes=3: use at least 4"):
        open_data(tmp_path / "s", num_classes=3)
    with pytest.raises(ValueError, match=r"1 of 3 rows .* row 1 of '.*s' has label -1: the split is not labelled"):
        open_data(tmp_path / "s")
    rows = ImageRows(open_data(tmp_path / "s", columns={"label": None}).train_set.store, 8, num_classes=1)
    assert read(rows, [0, 1, 2])["label"].tolist() == [0, 0, 0]
    make_folder(tmp_path / "f", {"a": ["0.png"], "b": ["0.png"]})
    with pytest.raises(ValueError, match="has 2 classes, more than num_classes=1"):
        open_data(tmp_path / "f", num_classes=1)


def test_values_of_the_wrong_type_are_named(tmp_path):
    import datasets

    def save(name, **columns):
        datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / name))
        return tmp_path / name

    rows = table([0])
    datasets.DatasetDict({"train": rows.filter(lambda _: False), "test": rows}).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"none' has a split without rows: choose another split"):
        open_data(tmp_path / "none")
    next((tmp_path / "none" / "test").glob("*.arrow")).write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"source='.*none' cannot be loaded: \w+: "):
        open_data(tmp_path / "none")
    with pytest.raises(ValueError, match=r"column 'label' of '.*s' holds 0.5, which is no label"):
        open_data(save("s", image=[encoded(0)], label=[0.5]))
    with pytest.raises(ValueError, match=r"row 0 of '.*t': column 'image' holds 7, which is no image"):
        open_data(save("t", image=[7], label=[0]))
    with pytest.raises(ValueError, match=r"row 0 of '.*u': column 'caption' holds 7, which is no caption"):
        open_data(save("u", image=[encoded(0)], label=[0], caption=[7]))
    with pytest.raises(ValueError, match=r"row 0 of '.*v' is no readable image"):
        open_data(save("v", image=[b"no image"], label=[0]))
    with pytest.raises(ValueError, match=r"row 0 of '.*w' is no readable image"):
        open_data(save("w", image=[None, encoded(1)], label=[0, 0]))


def test_a_set_without_labels_has_one_class_and_says_so(tmp_path, caplog):
    table([0, 0], label=None).save_to_disk(str(tmp_path / "s"))
    with caplog.at_level("INFO"):
        data = open_data(tmp_path / "s")
    assert "has no label column among ['image']: every row gets label 0" in caplog.text
    assert data.num_classes == 1 and read(data.train_set, [0, 1])["label"].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"no column 'label' for label: .*without labels, set num_classes=1"):
        open_data(tmp_path / "s", num_classes=5)


def test_columns_are_guessed_by_their_type(tmp_path):
    import datasets

    rows = table([1, 0], image="img", label="species", names=["cat", "dog"], captions=["c", None])
    rows.save_to_disk(str(tmp_path / "s"))
    data = open_data(tmp_path / "s", flip=False)
    batch = read(data.train_set, [0, 1])
    assert batch["label"].tolist() == [1, 0] and data.class_names == ["cat", "dog"]
    assert torch.equal(batch["image"], torch.stack([expected(0), expected(1)]))
    assert batch["caption"] == ["c", ""]  # captions are a bonus here
    webdataset = table([1, 0], image="jpg", label="cls")
    webdataset.save_to_disk(str(tmp_path / "w"))
    assert read(open_data(tmp_path / "w").train_set, [0, 1])["label"].tolist() == [1, 0]
    rows = rows.add_column("genus", [0, 0], feature=datasets.ClassLabel(names=["a"]))
    rows.save_to_disk(str(tmp_path / "t"))
    with pytest.raises(
        ValueError, match=r"several columns for label, \['species', 'genus'\]: choose one with columns="
    ):
        open_data(tmp_path / "t")
    assert open_data(tmp_path / "t", columns={"label": "genus"}).num_classes == 1
    with pytest.raises(ValueError, match=r"only a caption may have several columns"):
        open_data(tmp_path / "t", columns={"label": ["genus", "species"]})


def test_labels_that_are_names_and_integers_without_a_count(tmp_path):
    import datasets

    names = {"image": [encoded(i) for i in range(3)], "label": ["dog", "cat", "dog"]}
    part = {"image": [encoded(3)], "label": ["dog"]}
    splits = {"train": datasets.Dataset.from_dict(names), "dev": datasets.Dataset.from_dict(part)}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "s"))
    data = open_data(tmp_path / "s", val_split="auto")
    assert data.class_names == ["cat", "dog"] and read(data.train_set, [0, 1, 2])["label"].tolist() == [1, 0, 1]
    assert read(data.val_set, [0])["label"].tolist() == [1]  # not 0, although it is the only class there
    table([0, 6, 2]).save_to_disk(str(tmp_path / "t"))
    assert open_data(tmp_path / "t").num_classes == 7
    assert open_data(tmp_path / "t", num_classes=9).num_classes == 9


def test_classes_are_known_before_anything_is_read(tmp_path, monkeypatch):
    make_folder(tmp_path / "classes" / "train", {"a": ["0.png"], "b": ["0.png"], ".c": ["0.png"]})
    make_folder(tmp_path / "flat", {"": ["0.png"]})
    (tmp_path / "flat" / "papers").mkdir()
    table([0, 3]).save_to_disk(str(tmp_path / "numbers"))
    table([0, 1], names=["a", "b", "c"]).to_parquet(str(tmp_path / "names.parquet"))
    table([0, 1], label=None).save_to_disk(str(tmp_path / "unlabelled"))
    counts = {"classes": 2, "flat": 1, "numbers": 4, "names.parquet": 3, "unlabelled": 1}
    for name, count in counts.items():
        options = {"val_split": None, "batch_size": 1, "num_workers": 0, "cache_dir": str(tmp_path / "cache")}
        data = ImageData(str(tmp_path / name), 8, **options)
        assert data.discover_classes() == count and data.train_set is None
        data.setup("fit")
        assert data.num_classes == count
    assert ImageData(str(tmp_path / "classes"), 8, columns={"label": None}).discover_classes() == 1
    assert ImageData("a/b", 8, num_classes=5).discover_classes() == 5


def test_splits_with_different_classes_are_refused(tmp_path):
    import datasets

    splits = {"train": table([0, 1], names=["a", "b"]), "validation": table([0, 1], names=["b", "c"])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "s"))
    for val_split in ("auto", "val"):
        with pytest.raises(ValueError, match=r"classes of 'train' and 'validation' differ \(such as \['a', 'c'\]\)"):
            open_data(tmp_path / "s", val_split=val_split)
