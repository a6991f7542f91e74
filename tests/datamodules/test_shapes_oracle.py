"""The oracle reads its own set, also when damaged, guesses on noise, and what is scored with it."""

from functools import cache

import numpy as np
import pytest
import torch

from datamodules.shapes import ShapesData
from datamodules.shapes_oracle import caption_accuracy, read_attributes
from datamodules.shapes_scene import ATTRIBUTES, NAMES, caption, render


@cache
def val_rows(count, size):
    """Images uint8 (count, 3, size, size) and attributes (count, 5)."""
    rows = [render(i, size, split="val") for i in range(count)]
    return torch.from_numpy(np.stack([image for image, _ in rows])), torch.tensor([ids for _, ids in rows])


def rates(images, attributes):
    """Share read correctly, by attribute."""
    right = (read_attributes(images) == attributes).float().mean(0)
    return dict(zip(ATTRIBUTES, right.tolist(), strict=True))


def damaged(images, *, noise_sd=0.0, blurs=0, seed=0):
    """Binomial 3 x 3 blur, then Gaussian noise in grey levels, independent for each channel."""
    weights = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (weights[:, None] * weights).expand(3, 1, 3, 3)
    pixels = images.float()
    for _ in range(blurs):
        padded = torch.nn.functional.pad(pixels, [1] * 4, mode="replicate")
        pixels = torch.nn.functional.conv2d(padded, kernel, groups=3)
    noise = noise_sd * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
    return (pixels + noise).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(
    ("size", "count", "least"),
    [(16, 150, 147), (32, 300, 299), (48, 40, 40), (64, 40, 40), (100, 20, 20), (128, 20, 20)],
)
def test_reads_all_five_attributes(size, count, least):
    images, attributes = val_rows(count, size)
    read = read_attributes(images)
    assert read.shape == (count, 5) and read.dtype == torch.int64
    assert int((read == attributes).all(1).sum()) >= least


def test_pictures_do_not_influence_each_other():
    images, _ = val_rows(300, 32)
    read = read_attributes(images)  # more than are read at once
    assert torch.equal(torch.cat([read_attributes(images[i : i + 1]) for i in (0, 17, 299)]), read[[0, 17, 299]])
    assert read_attributes(images[:0]).shape == (0, 5)


@pytest.mark.parametrize(("size", "blurs", "least"), [(16, 0, 0.95), (32, 0, 0.98), (32, 1, 0.97), (64, 2, 0.97)])
def test_noise_and_blur(size, blurs, least):
    images, attributes = val_rows(150, size)
    found = rates(damaged(images, noise_sd=8, blurs=blurs), attributes)
    assert min(found.values()) >= least, found


def test_uniform_noise_is_read_by_chance():
    noise = torch.randint(0, 256, (1000, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    _, attributes = val_rows(300, 32)
    found = rates(noise, attributes.repeat(4, 1)[:1000])
    for name, share in found.items():
        chance = 1 / len(NAMES[name])
        assert abs(share - chance) < 0.08, (name, share)
    read = read_attributes(noise)
    assert int(read.min()) >= 0


@pytest.mark.parametrize("size", [16, 17, 32, 128])
@pytest.mark.parametrize("value", [0, 16, 120, 200, 255])
def test_nothing_is_there_in_a_blank_picture(size, value):
    read = read_attributes(torch.full((2, 3, size, size), value, dtype=torch.uint8))
    background = {0: "black", 16: "black", 120: "gray", 200: "white", 255: "white"}[value]
    assert read.tolist() == [[-1, -1, NAMES["background"].index(background), -1, -1]] * 2


def test_nothing_is_there_on_a_background_with_its_gradient_and_noise():
    slope = torch.linspace(-14, 14, 32)
    pixels = (
        120 + slope[:, None] / 2 + slope / 2 + 2.5 * torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    )
    read = read_attributes(pixels.to(torch.uint8).expand(1, 3, 32, 32))
    assert read.tolist() == [[-1, -1, 1, -1, -1]]


def test_odd_pictures_give_ids():
    odd = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    odd[0, :, :, 16:] = 255  # two halves
    odd[1, :, ::2, ::2] = 255  # a grid
    odd[2, :] = torch.linspace(0, 255, 32).to(torch.uint8)  # a ramp
    odd[3, :, 3, 4] = 255  # one pixel, fewer than tell a colour
    read = read_attributes(odd)
    limits = torch.tensor([len(NAMES[name]) for name in ATTRIBUTES])
    assert bool(((read[:3] >= 0) & (read[:3] < limits)).all())
    assert read[3].tolist() == [-1, -1, 0, -1, -1]


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 32, 32), torch.zeros(2, 32, 32, 3).byte(), torch.zeros(3, 32, 32).byte()]
)
def test_other_arrays_are_refused(images):
    with pytest.raises(ValueError, match=r"are no uint8 \(N, 3, S, S\): convert them"):
        read_attributes(images)


def test_scores_of_samples_by_label():
    images, attributes = val_rows(40, 32)
    shape, colour = attributes[:, 0], attributes[:, 1]
    data = ShapesData(32)
    assert data.score_samples(images, shape * 8 + colour) == {"shape_acc": 1, "colour_acc": 1, "attr_acc": 1}
    labels = shape * 8 + colour
    labels[:10] = (shape[:10] + 1) % 8 * 8 + colour[:10]  # asked for another shape
    labels[5:20] = labels[5:20] // 8 * 8 + (colour[5:20] + 1) % 8  # asked for another colour
    scores = data.score_samples(images, labels)
    assert scores == pytest.approx({"shape_acc": 0.75, "colour_acc": 0.625, "attr_acc": 0.5})
    assert ShapesData(32, label_by="shape").score_samples(images, labels // 8) == {"shape_acc": 0.75}
    blank = torch.zeros_like(images)
    assert data.score_samples(blank, torch.zeros(40, dtype=torch.int64)) == {
        "shape_acc": 0,
        "colour_acc": 0,
        "attr_acc": 0,
    }


def test_scores_of_samples_by_caption():
    images, attributes = val_rows(8, 32)
    captions = [caption(ids, i % 4) for i, ids in enumerate(attributes.tolist())]  # rows 1 and 5 leave attributes open
    assert caption_accuracy(images, captions) == {f"{name}_acc": 1 for name in ATTRIBUTES} | {"attr_acc": 1}
    wrong = attributes.clone()
    wrong[1, 3:] = (wrong[1, 3:] + 1) % 3  # not named
    wrong[2, 3] = (wrong[2, 3] + 1) % 3
    wrong[3, 0] = (wrong[3, 0] + 1) % 8
    scores = caption_accuracy(images, [caption(ids, i % 4) for i, ids in enumerate(wrong.tolist())])
    wanted = {"shape_acc": 7 / 8, "colour_acc": 1, "background_acc": 1, "size_acc": 5 / 6, "position_acc": 1}
    assert scores == pytest.approx(wanted | {"attr_acc": 6 / 8})
    assert set(caption_accuracy(images[1:2], captions[1:2])) == {
        "shape_acc",
        "colour_acc",
        "background_acc",
        "attr_acc",
    }
    blank = caption_accuracy(torch.zeros_like(images), captions)  # "nothing" is no answer to what was not asked
    assert (blank["shape_acc"], blank["size_acc"], blank["attr_acc"]) == (0, 0, 0)


def test_captions_that_do_not_fit():
    images, _ = val_rows(8, 32)
    with pytest.raises(ValueError, match="8 images and 1 captions: give one caption for each image"):
        caption_accuracy(images, ["a red circle on white"])
    with pytest.raises(ValueError, match="0 images and 0 captions"):
        caption_accuracy(images[:0], [])
    with pytest.raises(ValueError, match="'a cat' is no caption of the shapes"):
        caption_accuracy(images[:1], ["a cat"])
