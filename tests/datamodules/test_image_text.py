"""Captioned sets: columns, lists, metadata files, text files beside the images; which caption is drawn; none."""

import io
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.image_text import ImageTextData
from datamodules.images import ImageData
from datamodules.sampler import RowKey
from datamodules.transforms import to_uint8_chw


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def encoded(seed):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def make_images(root, names):
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(root / name)


def save_table(path, **columns):
    import datasets

    count = len(next(iter(columns.values())))
    datasets.Dataset.from_dict({"image": [encoded(i) for i in range(count)]} | columns).save_to_disk(str(path))
    return path


def open_data(source, kind=ImageTextData, **options):
    data = kind(str(source), 8, **{"batch_size": 1, "num_workers": 0} | options)
    data.setup("fit")
    return data


def captions(rows, indices, epoch=0):
    return rows.__getitems__([RowKey(epoch, i) for i in indices])["caption"]


def test_a_table_with_one_caption_per_row(tmp_path):
    data = open_data(save_table(tmp_path / "s", text=["a cat", " a dog\n"], label=[3, 4]))
    batch = data.train_set.__getitems__([RowKey(0, 1), RowKey(0, 0)])
    assert batch["caption"] == ["a dog", "a cat"]
    assert batch["label"].tolist() == [0, 0] and data.num_classes == data.discover_classes() == 1
    assert torch.equal(batch["image"], torch.stack([to_uint8_chw(picture(i)) for i in (1, 0)]))  # not flipped
    labelled = open_data(tmp_path / "s", columns={"label": "label"})
    assert labelled.train_set.__getitems__([RowKey(0, 1)])["label"].tolist() == [4] and labelled.num_classes == 5


@pytest.mark.parametrize("kind", ["list", "columns"])
def test_one_of_several_captions_is_drawn_by_seed_epoch_and_row(tmp_path, kind):
    texts = [[f"{row}{letter}" for letter in "abc"] for row in range(40)]
    if kind == "list":
        save_table(tmp_path / "s", captions=texts)
        columns = None
    else:
        save_table(tmp_path / "s", **{f"t{k}": [row[k] for row in texts] for k in range(3)})
        columns = {"caption": ["t0", "t1", "t2"]}
    data = open_data(tmp_path / "s", columns=columns, split="train", val_split="train")
    drawn = [captions(data.train_set, range(40), epoch) for epoch in range(30)]
    assert all(text[:-1] == str(i) for epoch in drawn for i, text in enumerate(epoch))
    counts = Counter(text[-1] for epoch in drawn for text in epoch)
    assert all(340 < counts[letter] < 460 for letter in "abc")  # of 1200: four standard deviations
    assert all(len({epoch[row] for epoch in drawn}) == 3 for row in range(40))
    backwards = captions(open_data(tmp_path / "s", columns=columns).train_set, range(39, -1, -1), 7)
    assert backwards[::-1] == drawn[7]  # neither the batch nor what was read before matters
    assert captions(open_data(tmp_path / "s", columns=columns, seed=1).train_set, range(40), 7) != drawn[7]
    assert captions(data.val_set, range(40), 7) == [f"{row}a" for row in range(40)]


def test_the_drawn_caption_does_not_follow_the_flip(tmp_path):
    save_table(tmp_path / "s", captions=[["a", "b"]] * 200)
    data = open_data(tmp_path / "s", flip=True)
    batch = data.train_set.__getitems__([RowKey(0, i) for i in range(200)])
    plain = torch.stack([to_uint8_chw(picture(i)) for i in range(200)])
    flipped = [bool((a != b).any()) for a, b in zip(batch["image"], plain, strict=True)]
    pairs = Counter(zip(flipped, batch["caption"], strict=True))
    assert len(pairs) == 4 and min(pairs.values()) > 25  # of 50 each


def test_rows_without_caption_are_replaced_or_refused(tmp_path):
    texts = ["x"] * 30
    texts[7], texts[8] = None, "  "
    save_table(tmp_path / "s", caption=texts[:7] + [None, "  "] + [f"row {i}" for i in range(9, 30)])
    data = open_data(tmp_path / "s")
    with pytest.warns(UserWarning, match=r"row [78] of '.*s' has no caption: add one or remove the row"):
        assert captions(data.train_set, [7, 8]) == ["row 9", "row 9"]
    with pytest.raises(
        ValueError, match=r"2 of 30 rows that were tried cannot be used, such as row 7 of .* no caption"
    ):
        open_data(tmp_path / "s", on_bad="error")
    save_table(tmp_path / "t", caption=["a", None, None])
    with pytest.raises(ValueError, match=r"2 of 3 rows that were tried cannot be used, such as row 1 .* no caption"):
        open_data(tmp_path / "t")
    blanks = open_data(save_table(tmp_path / "u", captions=[["", None, "a"], [None, "b", "c"]])).train_set
    assert captions(blanks, [0]) == ["a"] and captions(blanks, [1])[0] in "bc"


def test_a_source_without_captions_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no captions: name their column with columns={caption: ...}"):
        open_data(save_table(tmp_path / "s", title=["a"]))
    with pytest.raises(ValueError, match=r"no column 'titel' for caption: it has \['image', 'title'\]"):
        open_data(tmp_path / "s", columns={"caption": "titel"})
    assert captions(open_data(tmp_path / "s", columns={"caption": "title"}).train_set, [0]) == ["a"]
    make_images(tmp_path / "f", ["a.png"])
    with pytest.raises(ValueError, match=r"has no captions: .*give a folder a metadata.jsonl of lines"):
        open_data(tmp_path / "f")


def test_a_folder_with_metadata_jsonl(tmp_path, caplog):
    make_images(tmp_path, ["a.png", "deep/b.png", "c.png", "unlisted.png"])
    lines = [
        {"file_name": "c.png", "text": ["a third", "une troisième"], "label": 2},
        {"file_name": "deep/b.png", "text": "a second\nline", "label": 0},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    with caplog.at_level("INFO"):
        data = open_data(tmp_path)
    assert "2 images, 1 class; 2 files passed over (images not in metadata.jsonl 2)" in caplog.text
    batch = data.train_set.__getitems__([RowKey(0, 0), RowKey(0, 1)])
    assert batch["caption"][0] in ("a third", "une troisième") and batch["caption"][1] == "a second\nline"
    assert torch.equal(batch["image"], torch.stack([to_uint8_chw(picture(i)) for i in (2, 1)]))
    assert batch["label"].tolist() == [0, 0]
    classes = ImageData(str(tmp_path), 8, batch_size=1, num_workers=0, flip=False)
    assert classes.discover_classes() == 3
    classes.setup("fit")
    assert classes.num_classes == 3
    assert classes.train_set.__getitems__([RowKey(0, 0), RowKey(0, 1)])["label"].tolist() == [2, 0]


def test_a_folder_with_metadata_csv_and_class_names(tmp_path):
    make_images(tmp_path / "train", ["a.png", "b.png", "c.png"])
    make_images(tmp_path / "val", ["a.png"])
    head = "file_name,prompt,species\n"
    (tmp_path / "train" / "metadata.csv").write_text(f'\ufeff{head}b.png,"one, two",owl\na.png,x,cat\nc.png,,owl\n')
    (tmp_path / "val" / "metadata.csv").write_text(head + "a.png,y,owl\n")
    columns = {"caption": "prompt", "label": "species"}
    data = open_data(tmp_path, ImageData, columns=columns)
    batch = data.train_set.__getitems__([RowKey(0, i) for i in range(3)])
    assert batch["caption"] == ["one, two", "x", ""] and batch["label"].tolist() == [1, 0, 1]
    assert data.class_names == ["cat", "owl"] and data.discover_classes() == 2
    assert data.val_set.__getitems__([RowKey(0, 0)])["label"].tolist() == [1]
    (tmp_path / "train" / "metadata.csv").write_text(head + "a.png,x,7\nb.png,x,cat\n")
    (tmp_path / "val" / "metadata.csv").write_text(head + "a.png,y,7\n")
    names = open_data(tmp_path, ImageData, columns=columns)  # 7 is a name here, in both files
    assert names.class_names == ["7", "cat"] and names.val_set.__getitems__([RowKey(0, 0)])["label"].tolist() == [0]
    (tmp_path / "val" / "metadata.csv").write_text(head + "a.png,y,eel\n")
    with pytest.raises(ValueError, match=r"class 'eel' of '.*val/metadata.csv' is none of the 2 training classes"):
        open_data(tmp_path, ImageData, columns=columns)


def test_labels_of_a_csv_file_may_be_digits_or_missing(tmp_path, caplog):
    make_images(tmp_path, [f"{i}.png" for i in range(30)])
    labels = ["", *(str(i % 4) for i in range(1, 30))]
    (tmp_path / "metadata.csv").write_text(
        "file_name,label\n" + "".join(f"{i}.png,{v}\n" for i, v in enumerate(labels))
    )
    data = open_data(tmp_path, ImageData)
    assert data.num_classes == 4 and data.class_names is None
    with pytest.warns(UserWarning, match=r"0.png' has label -1: the split is not labelled"):
        batch = data.train_set.__getitems__([RowKey(0, i) for i in range(6)])
    assert batch["label"].tolist() == [1, 1, 2, 3, 0, 1]
    (tmp_path / "metadata.csv").write_text("file_name,title\n0.png,x\n")
    with caplog.at_level("INFO"):
        assert open_data(tmp_path, ImageData).num_classes == 1
    assert "has no label column among ['file_name', 'title']: every row gets label 0" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "name,text\na.png,x\n", r"row 1 of '.*metadata.csv' is .*: each needs a file_name"),
        ("metadata.jsonl", '{"file_name": "a.png"}\n["x"]\n', r"row 2 of '.*metadata.jsonl' is \['x'\]: each needs"),
        ("metadata.jsonl", '{"file_name": "a.png",\n', r"'.*metadata.jsonl' cannot be read: "),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": 5}',
            r"metadata.jsonl', 'a.png': its caption holds 5, which",
        ),
        (
            "metadata.jsonl",
            '{"file_name": "no.png", "text": "x"}',
            r"lists no image that is there: file_name is relative",
        ),
    ],
)
def test_metadata_that_cannot_be_used(tmp_path, name, text, message):
    make_images(tmp_path, ["a.png"])
    (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_data(tmp_path)


def test_metadata_lines_without_their_image_are_named(tmp_path):
    make_images(tmp_path, [f"{i}.png" for i in range(20)])
    names = [f"{i}.png" for i in range(20)] + ["gone.png"]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps({"file_name": n, "text": n}) + "\n" for n in names))
    with pytest.warns(UserWarning, match=r"1 image file left out, such as '.*gone.png' \(No such file or directory\)"):
        data = open_data(tmp_path)
    assert len(data.train_set) == 20 and captions(data.train_set, [19]) == ["19.png"]


def test_metadata_beside_split_folders_is_refused(tmp_path):
    make_images(tmp_path, ["train/a.png", "val/a.png"])
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "train/a.png", "text": "x"}')
    with pytest.raises(ValueError, match=r"metadata.jsonl' lies beside folders of splits \['train', 'val'\]: put one"):
        open_data(tmp_path)


def test_text_files_beside_the_images(tmp_path):
    make_images(tmp_path, ["a.png", "b/c.d.png", "b/e.png"])
    (tmp_path / "a.txt").write_text("first\n\nsecond\n")
    (tmp_path / "b" / "c.d.txt").write_text("\ufeffün", encoding="utf-8")
    (tmp_path / "b" / "e.txt").write_text("e")
    (tmp_path / "b" / "e.json").write_text("{}")
    data = open_data(tmp_path, columns={"caption": ".txt"}, val_split="train")
    assert data.train_set.store.scan.passed_over == {".json": 1}
    assert captions(data.val_set, [0, 1, 2]) == ["first", "ün", "e"]
    assert {captions(data.train_set, [0], epoch)[0] for epoch in range(20)} == {"first", "second"}
    assert data.discover_classes() == 1  # folders are no classes here
    (tmp_path / "b" / "e.txt").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 rows .* such as file '.*e.png' has no caption"):
        open_data(tmp_path, columns={"caption": ".txt"})
