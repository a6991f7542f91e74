"""Images with label maps from folders, COCO's format and tables: what is read, what is drawn, what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.label_maps import LabelMapData
from datamodules.label_ops import (
    AREA,
    ASPECT,
    Box,
    canonical_ids,
    crop_maps,
    inception_box,
    resize_image,
    resize_maps,
    segment_maps,
)


def quadrants(height: int = 20, width: int = 30) -> np.ndarray:
    """Classes 1..4 of the four quarters, each an instance of its own, numbered against the reading order."""
    down, right = np.indices((height, width)) // np.array([height // 2, width // 2])[:, None, None]
    classes = (1 + 2 * down + right).astype(np.uint8)
    return np.stack([classes, 9 - classes])


def write(folder, stem: str, *, maps: np.ndarray | None = None, depth: np.ndarray | None = None) -> None:
    """An image whose red and green are its maps, and the label."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if maps is not None:
        colours = np.concatenate([maps, np.zeros_like(maps[:1])]).transpose(1, 2, 0)
        Image.fromarray(colours * 20).save(folder / "images" / f"{stem}.png")
        Image.fromarray(colours).save(folder / "labels" / f"{stem}.png")
    if depth is not None:
        grey = np.repeat((depth // 40).astype(np.uint8)[..., None], 3, axis=2)
        Image.fromarray(grey).save(folder / "images" / f"{stem}.png")
        Image.fromarray(depth.astype(np.uint16)).save(folder / "labels" / f"{stem}.png")


@pytest.fixture
def panoptic(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            write(tmp_path / split, f"{i}", maps=quadrants())
    return tmp_path


def data(source, **options) -> LabelMapData:
    made = LabelMapData(str(source), 16, **{"task": "panoptic", "batch_size": 2, "num_workers": 0} | options)
    made.setup()
    return made


def test_validation_rows_are_the_whole_image_as_a_square_with_canonical_ids_and_their_truth(panoptic):
    batch = next(iter(data(panoptic).val_dataloader()))
    assert {name: (tuple(batch[name].shape), batch[name].dtype) for name in ("image", "semantics", "instances")} == {
        "image": ((2, 3, 16, 16), torch.uint8),
        "semantics": ((2, 16, 16), torch.int16),
        "instances": ((2, 16, 16), torch.int16),
    }
    small = torch.from_numpy(quadrants(16, 16))
    assert torch.equal(batch["semantics"][0], small[0].to(torch.int16))
    assert torch.equal(batch["instances"][0], small[0].to(torch.int16))  # 8, 7, 6, 5 in reading order become 1, 2, 3, 4
    assert torch.equal(batch["truth"][0], torch.from_numpy(quadrants()).to(torch.int16))
    assert batch["label"].tolist() == [0, 0]


def test_training_rows_are_mirrored_and_cropped_alike_by_seed_epoch_and_row(panoptic):
    loader = data(panoptic).train_dataloader()
    first, second = [b["semantics"] for b in loader], [b["semantics"] for b in loader]
    again = [b["semantics"] for b in data(panoptic).train_dataloader()]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "each epoch draws anew"
    batch = next(iter(loader))
    assert "truth" not in batch
    # the picture's red is 20 x the class: where it is not between two, the map says the same
    inner = (batch["image"][:, 0] % 20 == 0) & (batch["image"][:, 1] % 20 == 0)
    agree = batch["image"][:, 0] // 20 == batch["semantics"]
    assert inner.float().mean() > 0.5 and agree[inner].float().mean() > 0.95


def test_mirrored_training_rows_exist(panoptic):
    def columns(batch):  # classes 1 and 3 lie left of 2 and 4, unless mirrored
        return [m.float().mean(0)[-1] > m.float().mean(0)[0] for m in batch["semantics"]]

    loader = data(panoptic).train_dataloader()
    found = {bool(c) for _ in range(6) for batch in loader for c in columns(batch)}
    assert found == {True, False}


def test_depth_in_millimetres_with_an_evaluation_crop(tmp_path):
    depth = np.arange(20 * 30).reshape(20, 30) * 10
    for split in ("train", "val"):
        write(tmp_path / split, "a", depth=depth)
    made = data(tmp_path, task="depth", batch_size=1, eval_crop=[4, 20, 6, 22])
    batch = next(iter(made.val_dataloader()))
    expected = torch.from_numpy(depth[4:20, 6:22] / 1000).float()
    torch.testing.assert_close(batch["depth"][0], expected)
    torch.testing.assert_close(batch["truth"][0][0], expected)
    assert next(iter(made.train_dataloader()))["depth"].dtype == torch.float32


def test_depth_as_floating_point_numbers(tmp_path):
    write(tmp_path, "a", depth=np.full((8, 8), 4000))
    (tmp_path / "labels" / "a.png").unlink()
    Image.fromarray(np.full((8, 8), 2.5, np.float32)).save(tmp_path / "labels" / "a.tiff")
    made = data(tmp_path, task="depth", batch_size=1, depth_unit=2.0)
    assert made.val_set is None and next(iter(made.train_dataloader()))["depth"].unique().tolist() == [5.0]


def coco(folder, ids: np.ndarray, *, crowd: bool = False) -> None:
    """One image in COCO's format: segments of `ids`, alternately of categories 7 (a thing) and 40 (stuff)."""
    write(folder, "a", maps=quadrants())
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], axis=-1).astype(np.uint8)
    Image.fromarray(colours).save(folder / "labels" / "a.png")
    segments = [
        {"id": int(s), "category_id": (7, 40)[i % 2], "iscrowd": int(crowd and i == 0)}
        for i, s in enumerate(np.unique(ids[ids > 0]))
    ]
    categories = [{"id": 7, "name": "cat", "isthing": 1}, {"id": 40, "name": "sky", "isthing": 0}]
    content = {"categories": categories, "annotations": [{"file_name": "a.png", "segments_info": segments}]}
    (folder / "panoptic.json").write_text(json.dumps(content))


@pytest.mark.parametrize("crowd", [False, True])
def test_coco_ids_become_classes_and_instances_and_crowds_are_not_scored(tmp_path, crowd):
    ids = np.zeros((20, 30), np.int64)
    ids[:10], ids[10:, :15] = 70_000, 80_000
    for split in ("train", "val"):
        coco(tmp_path / split, ids, crowd=crowd)
    made = data(tmp_path, batch_size=1)
    batch = next(iter(made.val_dataloader()))
    assert batch["semantics"][0, 0, 0] == 1 and batch["semantics"][0, 15, 0] == 2 and batch["semantics"][0, 15, 15] == 0
    assert batch["instances"][0, 0, 0] == 1 and batch["instances"][0, 15, 0] == 2 and batch["instances"][0, 15, 15] == 0
    assert batch["truth"][0][0, 0, 0] == (0 if crowd else 1)
    assert made.stuff_classes == [2]


def test_a_label_that_coco_s_file_does_not_name_is_an_error(tmp_path):
    coco(tmp_path, np.full((20, 30), 5))
    content = json.loads((tmp_path / "panoptic.json").read_text())
    content["annotations"][0]["file_name"] = "b.png"
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"panoptic\.json does not name file .*a\.png"):
        next(iter(data(tmp_path, batch_size=1).train_dataloader()))


def test_table_of_two_image_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    write(tmp_path, "a", maps=quadrants())
    paths = {"photo": [str(tmp_path / "images" / "a.png")] * 2, "map": [str(tmp_path / "labels" / "a.png")] * 2}
    features = datasets.Features({name: datasets.Image() for name in paths})
    datasets.DatasetDict(
        {"validation": datasets.Dataset.from_dict(paths, features=features)}
        | {"train": datasets.Dataset.from_dict(paths, features=features)}
    ).save_to_disk(str(tmp_path / "saved"))
    made = data(tmp_path / "saved", columns={"image": "photo", "label": "map"})
    assert torch.equal(next(iter(made.val_dataloader()))["truth"][1], torch.from_numpy(quadrants()).to(torch.int16))
    with pytest.raises(ValueError, match=r"no column 'image' of images .* it has \['photo', 'map'\]"):
        data(tmp_path / "saved")


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lambda f: (f / "labels" / "0.png").unlink(), {}, r"1 of 4 images in .* have no label, such as .*0\.png"),
        (lambda f: (f / "labels" / "0.png").write_bytes(b"x"), {}, r"labels/0\.png' is no readable label"),
        (lambda f: Image.new("RGB", (3, 4)).save(f / "labels" / "0.png"), {}, r"label has 3x4 pixels, its image 30x20"),
        (lambda f: Image.new("L", (30, 20)).save(f / "labels" / "0.png"), {}, r"is no colour image, as a panoptic"),
        (lambda f: None, {"task": "depth"}, r"is a colour image, but a depth label is grey"),
        (lambda f: (f / "panoptic.json").write_text("{}"), {}, r"panoptic\.json' is not of COCO's panoptic format"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(panoptic, spoil, options, message):
    spoil(panoptic / "train")
    with pytest.raises(ValueError, match=message):
        list(data(panoptic, batch_size=4, **options).train_dataloader())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: data(p / "train" / "images"), r"no folder '.*images/images': a source of label maps holds images/"),
        (lambda p: LabelMapData("x", task="colours"), r"task='colours' is unknown: use panoptic or depth"),
        (lambda p: LabelMapData("x", task="depth", eval_crop=[4, 2, 0, 1]), r"eval_crop=\[4, 2, 0, 1\] must be"),
        (
            lambda p: next(iter(data(p, eval_crop=[0, 99, 0, 9]).val_dataloader())),
            r"has 30x20 pixels, fewer than eval_crop",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(panoptic, make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make(panoptic)


# The operations alone


def test_canonical_ids_follow_the_centres_of_mass():
    """x + height y is 0.5 for id 5, 4.5 for 9, 6 for 7 and 8 for 2."""
    instances = np.array([[5, 5, 0, 7], [9, -3, 0, 7], [9, -1, 2, 7]])
    assert canonical_ids(instances).tolist() == [[1, 1, 0, 3], [2, -1, 0, 3], [2, -1, 4, 3]]


def test_segments_without_a_class_are_void():
    maps = segment_maps(np.array([[10, 30], [20, 0]]), {20: 3, 10: 5})
    assert maps.tolist() == [[[5, 0], [3, 0]], [[2, 0], [1, 0]]]


def test_random_boxes_keep_to_area_aspect_and_image():
    draw = np.random.default_rng(0)
    boxes = [inception_box(60, 90, draw) for _ in range(200)]
    for box in boxes:
        assert 0 <= box.top <= 60 - box.height and 0 <= box.left <= 90 - box.width
        assert AREA[0] <= box.height * box.width / 5400 <= AREA[1]
        assert ASPECT[0] - 0.1 < box.width / box.height < ASPECT[1] + 0.1
    assert len(set(boxes)) > 190


def test_an_image_in_which_no_box_fits_is_taken_whole():
    assert inception_box(2, 1000, np.random.default_rng(0)) == Box(0, 0, 2, 1000)


def test_resized_maps_take_the_nearest_pixel_and_images_the_same_part():
    maps = np.arange(16).reshape(1, 4, 4)
    part = crop_maps(maps, Box(1, 0, 2, 4))
    assert resize_maps(part, (2, 2)).tolist() == [[[5, 7], [9, 11]]]
    image = Image.fromarray(np.repeat(np.arange(16, dtype=np.uint8).reshape(4, 4, 1) * 10, 3, axis=2))
    assert np.array_equal(resize_image(image, Box(1, 0, 2, 2), 2)[0], maps[0, 1:3, :2] * 10)


def test_images_are_resized_without_antialiasing_and_fractions_cut_off():
    """8 pixels to 2: between the second and third of each four, (10 + 20) / 2 and (5 + 40) / 2 = 22.5."""
    row = np.array([90, 10, 20, 90, 90, 5, 40, 90], np.uint8)
    image = Image.fromarray(np.repeat(np.repeat(row[None, :, None], 2, axis=0), 3, axis=2))
    assert resize_image(image, Box(0, 0, 2, 8), 2)[0].tolist() == [[15, 22]] * 2
