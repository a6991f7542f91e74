"""Shapes: the pictures byte for byte, captions and their inverse, rows, the cache file."""

import hashlib
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import shapes
from datamodules.sampler import RowKey
from datamodules.shapes import ShapesData, cache_folder, cached_table, draw_table
from datamodules.shapes_scene import ATTRIBUTES, BACKGROUNDS, NAMES, TEMPLATES, caption, coverage, parse_caption, render


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test writes outside its folder, and small splits are cached as large ones are."""
    monkeypatch.setenv("SOFTTOKENS_CACHE", str(tmp_path))
    monkeypatch.setattr(shapes, "CACHED_FROM", 8)
    monkeypatch.setattr(shapes, "WRITTEN_AT_ONCE", 5)
    return tmp_path / "shapes"


@pytest.fixture
def draws(monkeypatch):
    """Counts the pictures that are drawn."""
    counts = Counter()

    def counted(index, size, **options):
        counts["all"] += 1
        return render(index, size, **options)

    monkeypatch.setattr(shapes, "render", counted)
    return counts


def ready(*args, **options):
    data = ShapesData(*args, **{"length": 6, "val_length": 4} | options)
    data.prepare_data()
    data.setup("fit")
    return data


def read(rows, indices):
    return rows.__getitems__([RowKey(0, i) for i in indices])


def ids(**words):
    return tuple(NAMES[name].index(words[name]) for name in ATTRIBUTES)


ALL_IDS = list(itertools.product(*(range(len(names)) for names in NAMES.values())))


@pytest.mark.parametrize(
    ("size", "first_16", "first_300"),
    [(32, "9003b38e74a5cbad", "57a45a04f8b9fb5d"), (64, "507aef867763ba12", "a2a874640fd6bff1")],
)
def test_pictures_are_the_same_bytes_everywhere(size, first_16, first_300):
    images = [render(i, size)[0] for i in range(300)]
    assert images[0].shape == (3, size, size) and images[0].dtype == np.uint8
    pixels = [image.transpose(1, 2, 0).tobytes() for image in images]
    assert hashlib.sha256(b"".join(pixels[:16])).hexdigest()[:16] == first_16
    assert hashlib.sha256(b"".join(pixels)).hexdigest()[:16] == first_300


def test_attributes_describe_the_picture():
    assert render(0, 32)[1] == ids(shape="circle", colour="red", background="white", size="small", position="left")
    assert render(1, 32)[1] == ids(
        shape="ring", colour="yellow", background="black", size="medium", position="bottom left"
    )
    for index in range(20):
        image, attributes = render(index, 48, seed=3)
        corners = image[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(1)
        assert np.abs(corners - BACKGROUNDS[attributes[2]]).max() < 20
        assert render(index, 20, seed=3)[1] == attributes  # whatever the size
    assert len({render(i, 16)[1] for i in range(64)}) > 60


@pytest.mark.parametrize("other", [{"seed": 1}, {"split": "val"}, {"split": "test"}, {"seed": 2**64 - 1}])
def test_seed_and_split_give_other_pictures(other):
    assert not np.array_equal(render(0, 16)[0], render(0, 16, **other)[0])
    assert np.array_equal(render(5, 16, **other)[0], render(5, 16, **other)[0])


def area(shape):
    """In units of the squared radius."""
    radius = 60.0
    return coverage(shape, 160, centre_x=80.3, centre_y=79.6, radius=radius, angle=0.1).sum() / radius**2


def test_shapes_have_their_areas():
    square, cross = 1.6**2, 2 * 0.6 * 1.9 - 0.6**2
    wanted = {"circle": np.pi * 0.81, "square": square, "triangle": 0.95 * 1.75, "diamond": 2 * 1.05**2, "cross": cross}
    wanted["ring"] = np.pi * (0.94**2 - 0.5**2)
    wanted["star"] = 10 * 0.5 * 1.1 * 0.495 * np.sin(np.pi / 5)
    for name, value in wanted.items():
        assert area(NAMES["shape"].index(name)) == pytest.approx(value, rel=0.01), name
    # outer disc minus the common part of both discs (two circular segments)
    outer, inner, apart = 0.95, 0.75, np.hypot(0.45, 0.05)
    x = (apart**2 + outer**2 - inner**2) / (2 * apart)
    lens = outer**2 * np.arccos(x / outer) - x * np.sqrt(outer**2 - x**2)
    lens += inner**2 * np.arccos((apart - x) / inner) - (apart - x) * np.sqrt(inner**2 - (apart - x) ** 2)
    assert area(NAMES["shape"].index("crescent")) == pytest.approx(np.pi * outer**2 - lens, rel=0.01)


def test_coverage_of_several_poses_at_once():
    poses = np.array([[10.2, 9.0, 4.0, 0.1], [8.0, 11.5, 6.3, -0.2]])
    for shape in range(8):
        x, y, radius, angle = poses.T[:, :, None, None]
        both = coverage(shape, 20, centre_x=x, centre_y=y, radius=radius, angle=angle)
        assert both.shape == (2, 20, 20) and both.min() == 0 and both.max() == 1
        for one, (x, y, radius, angle) in zip(both, poses, strict=True):
            assert np.array_equal(one, coverage(shape, 20, centre_x=x, centre_y=y, radius=radius, angle=angle))


def test_captions_of_the_first_pictures():
    assert [caption(render(i, 16)[1], i % 4) for i in range(2)] == [
        "a small red circle at the left on a white background",
        "a yellow ring on black",
    ]
    middle = ids(shape="star", colour="pink", background="brown", size="large", position="center")
    assert [caption(middle, template) for template in range(4)] == [
        "a large pink star in the center on a brown background",
        "a pink star on brown",
        "large pink star, center, brown background",
        "a brown picture with a large pink star in the center",
    ]


@pytest.mark.parametrize("template", range(4))
def test_captions_are_short_and_can_be_read_back(template):
    named = [name for name in ATTRIBUTES if template != 1 or name not in ("size", "position")]
    for attributes in ALL_IDS:
        text = caption(attributes, template)
        assert text.isascii() and len(text) <= 66
        wanted = dict(zip(ATTRIBUTES, attributes, strict=True))
        assert parse_caption(text) == {name: wanted[name] for name in named}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "a red circle on white.",
        "A red circle on white",
        "a red circle on teal",
        "a small red circle at the center on a white background",
        "a small red circle in the top on a white background",
    ],
)
def test_texts_that_are_no_captions(text):
    with pytest.raises(ValueError, match=r"is no caption of the shapes: write it like 'a small red circle at the left"):
        parse_caption(text)


def test_rows_and_batches():
    data = ready(16, 4)
    assert (len(data.train_set), len(data.val_set), data.num_classes) == (6, 4, 64)
    batch = read(data.train_set, [5, 1])
    assert batch["image"].shape == (2, 3, 16, 16) and batch["image"].is_contiguous()
    for row, index in enumerate((5, 1)):
        image, attributes = render(index, 16)
        assert np.array_equal(batch["image"][row].numpy(), image)
        assert tuple(batch["attributes"][row].tolist()) == attributes
        assert batch["label"][row] == attributes[0] * 8 + attributes[1]
        assert batch["caption"][row] == caption(attributes, index % len(TEMPLATES))
        assert f" {data.class_names[batch['label'][row]]}" in f" {batch['caption'][row]}"
    assert batch["label"].dtype == batch["attributes"].dtype == torch.int64
    val = next(iter(data.val_dataloader()))
    assert np.array_equal(val["image"][0].numpy(), render(0, 16, split="val")[0])
    assert np.array_equal(data.rows("test", 3)[2]["image"][0].numpy(), render(2, 16, split="test")[0])
    limited = ready(16, 2, limit_n=3).train_set
    index = int(limited.rows[2])
    assert limited[2]["caption"] == read(data.train_set, [index])["caption"]  # by the row's own index


def test_labels_by_shape_and_by_seed():
    data = ready(16, 4, label_by="shape", seed=9)
    assert data.num_classes == 8 and data.class_names[5] == "ring"
    batch = read(data.train_set, range(6))
    assert torch.equal(batch["label"], batch["attributes"][:, 0])
    assert batch["attributes"].tolist() == [list(render(i, 16, seed=9)[1]) for i in range(6)]


def test_a_large_split_is_drawn_once(cache, draws):
    first = ready(16, 4, length=12)
    assert [path.name for path in cache.iterdir()] == ["train-12x16px-seed0.npy"]  # 4 rows are not worth a file
    assert draws["all"] == 12 + 3 + 4  # setup reads the file that prepare_data wrote, and looks at three of its rows
    again = ready(16, 4, length=12)
    assert draws["all"] == 19 + 3 + 3 + 4
    fresh = ready(16, 4, length=12, cache_dir=None)
    batches = [read(data.train_set, [11, 0, 7]) for data in (first, again, fresh)]
    assert all(torch.equal(batch["image"], batches[0]["image"]) for batch in batches)
    assert isinstance(again.train_set.table, np.memmap) and not isinstance(fresh.train_set.table, np.memmap)
    batches[1]["image"].zero_()  # a batch belongs to its reader
    assert torch.equal(read(again.train_set, [11])["image"], batches[0]["image"][:1])


def test_without_a_cache_nothing_is_written(cache, draws):
    data = ShapesData(16, 4, length=12, val_length=9, cache_dir=None)
    data.prepare_data()
    assert draws["all"] == 0
    data.setup()
    assert draws["all"] == 21 and not cache.exists()


def test_the_file_name_tells_contents_apart(cache):
    variants = [{}, {"length": 13}, {"image_size": 18}, {"seed": 4}]
    tables = [ready(**{"image_size": 16, "length": 12} | change).train_set.table for change in variants]
    assert len(list(cache.iterdir())) == 4
    assert len({table.tobytes() for table in tables}) == 4
    ready(16, val_length=12)
    assert (cache / "val-12x16px-seed0.npy").exists()


def swap_rows(path):
    table = np.load(path)
    np.save(path, table[::-1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no array" * 100),
        lambda path: path.write_bytes(path.read_bytes()[:-3000] + bytes(3000)),
        lambda path: np.save(path, np.load(path)[:11]),
        lambda path: np.save(path, np.zeros((12, 3, 16, 16), dtype=np.uint8)),
        swap_rows,
    ],
    ids=["short", "empty", "garbage", "zeros at the end", "fewer rows", "other type", "other rows"],
)
def test_a_damaged_cache_file_is_drawn_again(cache, damage):
    ready(16, 4, length=12)
    path = cache / "train-12x16px-seed0.npy"
    whole = path.read_bytes()
    damage(path)
    assert path.read_bytes() != whole
    with pytest.warns(UserWarning, match=r"train-12x16px-seed0.npy' is damaged or by another version"):
        data = ready(16, 4, length=12)
    assert path.read_bytes() == whole and len(list(cache.iterdir())) == 1
    assert data.train_set.table.tobytes() == draw_table(range(12), 16, seed=0, split="train").tobytes()


def test_an_unfinished_file_is_not_seen(cache, monkeypatch):
    def stops(index, size, **options):
        if index == 7:
            raise KeyboardInterrupt
        return render(index, size, **options)

    monkeypatch.setattr(shapes, "render", stops)
    with pytest.raises(KeyboardInterrupt):
        cached_table(cache, 12, 16, seed=0, split="train")
    assert list(cache.iterdir()) == []


def test_where_the_cache_lies(tmp_path, monkeypatch):
    assert cache_folder("auto") == tmp_path / "shapes"
    assert cache_folder("~/x") == Path.home() / "x"
    monkeypatch.delenv("SOFTTOKENS_CACHE")
    assert cache_folder("auto") == Path.home() / ".cache" / "softtokens" / "shapes"
    data = ready(16, 4, length=12, cache_dir=str(tmp_path / "mine"))
    assert len(data.train_set) == 12 and (tmp_path / "mine" / "train-12x16px-seed0.npy").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache_dir='.*file' cannot be written to .*another folder, or to null"):
        ready(16, 4, length=12, cache_dir=str(tmp_path / "file"))


def test_workers_give_the_same_batches():
    alone = list(ready(16, 4, length=12).train_dataloader())
    workers = list(ready(16, 4, length=12, num_workers=2).train_dataloader())
    assert len(alone) == len(workers) == 3
    for a, b in zip(alone, workers, strict=True):
        assert torch.equal(a["image"], b["image"]) and a["caption"] == b["caption"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length=0 must be at least 1"),
        ({"val_length": -1}, "val_length=-1 must be at least 1"),
        ({"label_by": "colour"}, "label_by='colour' is unknown: use shape_colour or shape"),
        ({"seed": -1}, r"seed=-1 must lie in 0\.\.2\^64-1"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
    ],
)
def test_errors_before_any_work(options, message):
    with pytest.raises(ValueError, match=message):
        ShapesData(**options)


def test_unknown_split():
    with pytest.raises(ValueError, match="split='valid' is unknown: use train, val, test"):
        ShapesData(16).rows("valid", 3)
