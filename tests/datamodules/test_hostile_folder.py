"""A folder of 10,000 files as users have them, of every mode and damage: all is read, or counted and named."""

import functools
import io
import os
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.decode import MAX_PIXELS
from datamodules.folders import FolderStore
from datamodules.image_rows import ImageRows
from datamodules.images import ImageData
from datamodules.sampler import RowKey

SIZE = 8
CLASSES = [f"n{i:02d}" for i in range(20)]
RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated():
    """A JPEG whose upper half is red once it is turned upright."""
    image = Image.new("RGB", (32, 32), "blue")
    image.paste("red", (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image.rotate(90), "JPEG", exif=exif, quality=100, subsampling=0)


def palette():
    image = Image.new("P", (24, 24), 1)
    image.putpalette([0, 0, 255, *GREEN])
    return encoded(image, "PNG", transparency=0)


@functools.cache
def images():
    """kind -> (bytes, suffix, how many files, what the crop shows; None: noise)."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    frames = [Image.new("RGB", (24, 24), colour) for colour in ("red", "blue")]
    return {
        "photo": (encoded(noise, "JPEG"), ".JPEG", 4029, None),
        "drawing": (encoded(noise, "PNG"), ".png", 3300, None),
        "grey": (encoded(Image.new("L", (24, 32), 128), "PNG"), ".PNG", 300, GREY),
        "deep": (encoded(Image.fromarray(np.full((24, 24), 32896, np.uint16)), "PNG"), ".png", 300, GREY),
        "cmyk": (encoded(Image.new("CMYK", (24, 24), (0, 255, 255, 0)), "JPEG", quality=100), ".jpg", 300, RED),
        "palette": (palette(), ".png", 300, GREEN),
        "alpha": (encoded(Image.new("RGBA", (24, 24), (0, 0, 255, 0)), "PNG"), ".png", 300, (255, 255, 255)),
        "glass": (encoded(Image.new("RGBA", (24, 24), (0, 0, 0, 127)), "WEBP", lossless=True), ".webp", 200, GREY),
        "moving": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), ".gif", 200, RED),
        "rotated": (rotated(), ".jpeg", 300, "upright"),
        "torn": (encoded(noise, "PNG")[:900], ".png", 90, "damaged"),
        "text": (b"404 not found", ".jpg", 80, "damaged"),
        "bomb": (encoded(Image.new("1", (9999, MAX_PIXELS // 9999 + 1)), "PNG"), ".png", 2, "damaged"),
        "empty": (b"", ".png", 70, "left out"),
        "notes": (b"not by its name", ".txt", 150, "passed over"),
        "Thumbs": (b"\0", ".db", 20, "passed over"),
        ".hidden": (b"\0", ".png", 48, "not looked at"),
    }


NOT_LISTED = ("left out", "passed over", "not looked at")
REASONS = {"torn": "truncated", "text": "its header is none of", "bomb": "more than the limit of 89,478,485"}
ODD_NAMES = ["two words", "line\nbreak", "雪-ñ", "it's", 'say "x"', "%20", "-rf", "🦊"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty classes, some nested; names as they come; 10,000 files and, besides, links that lead nowhere and back."""
    root = tmp_path_factory.mktemp("hostile")
    for name in CLASSES:
        (root / name / "more" / "deep").mkdir(parents=True)
    for kind, (data, suffix, count, _) in images().items():
        for i in range(count):
            where = root / CLASSES[i % 20] / ("more/deep" if i % 7 == 0 else "")
            (where / f"{kind}-{i}{suffix}").write_bytes(data)
    for i, name in enumerate(ODD_NAMES):
        (root / CLASSES[i] / f"grey-{name}.png").write_bytes(images()["grey"][0])
    odd = os.fsencode(root / CLASSES[0]) + b"/grey-\xff\xfe.png"
    with open(odd, "wb") as file:
        file.write(images()["grey"][0])
    (root / "README.md").write_text("beside the classes")
    (root / "__MACOSX" / "n00").mkdir(parents=True)
    (root / "__MACOSX" / "n00" / "._photo.png").write_bytes(b"\0")
    (root / CLASSES[1] / "back").symlink_to(root)
    (root / CLASSES[2] / "more" / "back").symlink_to(root / CLASSES[2])
    (root / "again").symlink_to(root.parent)
    (root / CLASSES[3] / "gone.png").symlink_to(root / "nowhere.png")
    (root / CLASSES[3] / "self.png").symlink_to(root / CLASSES[3] / "self.png")
    os.mkfifo(root / CLASSES[4] / "pipe.png")
    return root


def kinds(verdict):
    return {kind: count for kind, (_, _, count, shown) in images().items() if shown == verdict}


def close(pixels, colour):
    return (pixels.float() - torch.tensor(colour)[:, None, None]).abs().max() <= 3  # JPEG's rounding


def kind_of(path):
    return os.path.basename(path).split("-")[0]


def opened(folder):
    """Its rows in the folder's order: the training split serves as validation split."""
    data = ImageData(str(folder), SIZE, batch_size=100, val_split="train", num_workers=0)
    with pytest.warns(UserWarning, match="73 image files left out"):
        data.setup("fit")
    return data


def read_all(data):
    """All images (N, 3, S, S), labels (N,), and the warnings met on the way."""
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        batches = list(data.val_dataloader())
    images, labels = (torch.cat([batch[name] for batch in batches]) for name in ("image", "label"))
    return images, labels, [str(warning.message) for warning in met if warning.category is UserWarning]


def test_there_are_10_000_files(folder):
    assert sum(len(names) for _, _, names in os.walk(folder)) == 10_000 + 3  # two broken links, one pipe


def test_what_is_no_image_is_counted_and_named_at_the_start(folder, caplog):
    with caplog.at_level("INFO"), pytest.warns(UserWarning) as warned:
        data = ImageData(str(folder), SIZE, num_workers=0)
        data.setup("fit")
    store = data.train_set.store
    assert data.num_classes == 20 and data.class_names == CLASSES and data.val_set is None
    assert store.scan.passed_over == {".txt": 150, ".db": 20, ".md": 1}
    assert Counter(store.scan.unusable.values()) == {"empty": 70, "broken link": 2, "no regular file": 1}
    listed = Counter(kind_of(store.paths[i]) for i in range(len(store)))
    wanted = {kind: count for kind, (_, _, count, shown) in images().items() if shown not in NOT_LISTED}
    assert listed == Counter(wanted) + Counter(grey=len(ODD_NAMES) + 1)
    (line,) = [str(warning.message) for warning in warned if "left out" in str(warning.message)]
    assert f"{len(store):,} images, 20 classes; 171 files passed over (.txt 150, .db 20, .md 1)" in line
    assert "73 image files left out, such as '" in line and ".png' (empty)" in line and "\n" not in line


@pytest.mark.filterwarnings("ignore:.*The next row takes its place", "ignore::PIL.Image.DecompressionBombWarning")
def test_everything_is_read_by_its_rule_and_what_cannot_be_is_named(folder):
    data = opened(folder)
    images_read, labels, met = read_all(data)
    rows, store = data.val_set, data.val_set.store
    assert len(images_read) == len(store)
    shown = {kind: value[3] for kind, value in images().items()}
    damaged, checked = [], Counter()
    for i in range(len(store)):
        path = store.paths[i]
        kind = kind_of(path)
        if shown[kind] == "damaged":
            damaged.append(i)
            continue
        assert labels[i] == CLASSES.index(path.split("/")[0]), path
        if shown[kind] == "upright":
            checked[kind] += bool(close(images_read[i, :, :3], RED) and close(images_read[i, :, 5:], BLUE))
        elif shown[kind] is not None:
            checked[kind] += bool(close(images_read[i], shown[kind]))
    assert checked == {**{k: v[2] for k, v in images().items() if k in checked}, "grey": 300 + len(ODD_NAMES) + 1}
    assert {"grey", "deep", "cmyk", "palette", "alpha", "glass", "moving", "rotated"} == set(checked)

    # each damaged file is named once, with its reason, and shows the next one that is whole
    assert list(rows.bad) == damaged and len(damaged) == sum(kinds("damaged").values())
    names = [text for text in met if "The next row takes its place" in text]
    assert len(names) == len(damaged)
    assert all(repr(store.fetch([i])[0].data) in text for i, text in zip(damaged, names, strict=True))
    reasons = Counter(kind_of(store.paths[i]) for i in damaged if REASONS[kind_of(store.paths[i])] in rows.bad[i])
    assert reasons == kinds("damaged")
    for i in damaged:
        whole = next(j % len(store) for j in range(i, i + 100) if j % len(store) not in rows.bad)
        assert torch.equal(images_read[i], images_read[whole]) and labels[i] == labels[whole]

    # met in another order, as other processes would: the same rows
    others = ImageRows(store, SIZE, on_bad="skip")
    for i in [*reversed(damaged), 0, 1]:
        assert torch.equal(others.__getitems__([RowKey(3, i)])["image"][0], images_read[i])


def test_the_run_stops_where_that_is_asked_for(folder):
    with pytest.raises(ValueError, match=r"73 image files left out, such as '.*' \(empty\).*: replace or remove them"):
        ImageData(str(folder), SIZE, num_workers=0, on_bad="error").setup("fit")


def test_a_bomb_is_refused(folder):
    store = FolderStore(folder)
    index = next(i for i in range(len(store)) if kind_of(store.paths[i]) == "bomb")
    rows = ImageRows(store, SIZE)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ValueError, match=r"bomb-.* is no readable image \(9999 x 8949 = 89,481,051 pixels, more than"),
    ):
        rows.__getitems__([RowKey(0, index)])
