"""Image sources: folders, parquet, saved tables, hub errors; flips, labels and corrupt files."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

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
    with pytest.raises(ValueError, match=r"no split 'validation': it has \['train'\]; .* val_split to null"):
        open_data(tmp_path / "plain", val_split="validation")
    with pytest.raises(ValueError, match=r"columns=.*is a folder of images"):
        open_data(tmp_path / "plain", columns={"image": "jpg"})
    (tmp_path / "list.csv").write_text("x")
    with pytest.raises(ValueError, match=r"list.csv' is no folder and no .parquet"):
        open_data(tmp_path / "list.csv")


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


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_corrupt_image_is_named(tmp_path, num_workers):
    make_folder(tmp_path, {"a": ["0.png", "1.png"]})
    whole = (tmp_path / "a" / "1.png").read_bytes()
    (tmp_path / "a" / "1.png").write_bytes(whole[: len(whole) // 2])
    data = open_data(tmp_path, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"file '.*a/1.png' is no readable image \(.*truncated.*replace or remove"):
        list(data.train_dataloader())


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
    with pytest.raises(ValueError, match=r"no column 'image' for image: it has \['jpg', 'cls', 'caption'\]; map it"):
        open_data(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"no column 'text' for caption"):
        open_data(tmp_path / "saved", columns=columns | {"caption": "text"})
    with pytest.raises(ValueError, match=r"columns names \['target'\]"):
        open_data(tmp_path / "saved", columns={"target": "cls"})
    with pytest.raises(ValueError, match=r"no split 'test': it has \['train', 'val'\]"):
        open_data(tmp_path / "saved", split="test", columns=columns)


def test_labels_out_of_range_are_named(tmp_path):
    table([0, -1, 3]).save_to_disk(str(tmp_path / "s"))
    rows = open_data(tmp_path / "s", num_classes=3).train_set
    with pytest.raises(ValueError, match=r"row 1 of '.*s' has label -1: the split is not labelled"):
        read(rows, [0, 1])
    with pytest.raises(ValueError, match=r"row 2 of .* has label 3, but num_classes=3: use at least 4"):
        read(rows, [2])
    make_folder(tmp_path / "f", {"a": ["0.png"], "b": ["0.png"]})
    with pytest.raises(ValueError, match="has 2 classes, more than num_classes=1"):
        open_data(tmp_path / "f", num_classes=1)


def test_values_of_the_wrong_type_are_named(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"image": ["x", "y"], "label": ["cat", "dog"]}).save_to_disk(str(tmp_path / "s"))
    with pytest.raises(ValueError, match=r"row 1 of '.*': column 'label' holds 'dog', which is no label"):
        read(open_data(tmp_path / "s").train_set, [1])
    table([0], captions=[None]).save_to_disk(str(tmp_path / "t"))
    with pytest.raises(ValueError, match=r"column 'caption' holds None, which is no caption"):
        read(open_data(tmp_path / "t").train_set, [0])
    bad = {"image": [b"no image"], "label": [0]}
    datasets.Dataset.from_dict(bad).save_to_disk(str(tmp_path / "u"))
    with pytest.raises(ValueError, match=r"row 0 of '.*u' is no readable image"):
        read(open_data(tmp_path / "u").train_set, [0])


def test_a_set_without_labels_needs_num_classes_1(tmp_path):
    table([0, 0], label=None).save_to_disk(str(tmp_path / "s"))
    with pytest.raises(ValueError, match=r"no column 'label' for label: .*without labels, set num_classes=1"):
        open_data(tmp_path / "s")
    data = open_data(tmp_path / "s", num_classes=1)
    assert read(data.train_set, [0, 1])["label"].tolist() == [0, 0]


def test_splits_with_different_classes_are_refused(tmp_path):
    import datasets

    splits = {"train": table([0, 1], names=["a", "b"]), "validation": table([0, 1], names=["b", "c"])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "s"))
    with pytest.raises(ValueError, match=r"classes of 'train' and 'validation' differ \(such as \['a', 'c'\]\)"):
        open_data(tmp_path / "s", val_split="validation")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("Couldn't reach 'a/b' on the Hub (ConnectError)"),
            "no local path, and the hub cannot be reached",
        ),
        (
            FileNotFoundError("Dataset 'a/b' is a gated dataset on the Hub. Visit ..."),
            "gated dataset: accept its terms",
        ),
        (
            FileNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."),
            "check the name and HF_TOKEN",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported, but found b.py\nmore"),
            "no longer supported, but found b.py",
        ),
    ],
)
def test_hub_failures_are_one_line(tmp_path, monkeypatch, error, message):
    import datasets

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=message) as caught:
        open_data("a/b")
    assert "source='a/b'" in str(caught.value) and "\n" not in str(caught.value)


def test_hub_id_offline(tmp_path, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"source='no/such-set' is no local path, and the hub cannot be reached"):
        open_data("no/such-set", cache_dir=str(tmp_path / "cache"))
