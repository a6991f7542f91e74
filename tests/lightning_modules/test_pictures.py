"""Grids and PNG files."""

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.sample import write
from lightning_modules.pictures import enlarge, labels_in_turn, make_grid, save_png, spread_rows


def images(count: int) -> torch.Tensor:
    return torch.randint(0, 255, (count, 3, 4, 5), dtype=torch.uint8)  # 255 is left to the frame


@pytest.mark.parametrize(("count", "columns", "rows"), [(6, 3, 2), (5, 3, 2), (1, 4, 1), (4, 1, 4)])
@pytest.mark.parametrize("pad", [0, 2])
def test_grid_holds_every_image_row_by_row_on_white(count, columns, rows, pad):
    cells = images(count)
    grid = make_grid(cells, columns=columns, pad=pad)
    assert grid.dtype == torch.uint8
    assert grid.shape == (3, rows * (4 + pad) + pad, columns * (5 + pad) + pad)
    for i, cell in enumerate(cells):
        top, left = pad + i // columns * (4 + pad), pad + i % columns * (5 + pad)
        place = grid[:, top : top + 4, left : left + 5]
        assert torch.equal(place, cell)
        place.fill_(255)
    assert (grid == 255).all()


@pytest.mark.parametrize(
    ("width", "size", "factor"), [(16, 0, 3), (48, 0, 1), (47, 0, 2), (100, 16, 3), (300, 64, 1), (1, 0, 48)]
)
def test_enlarging_repeats_pixels_until_wide_enough(width, size, factor):
    image = torch.randint(0, 256, (3, 2, width), dtype=torch.uint8)
    large = enlarge(image, size=size)
    assert large.shape == (3, 2 * factor, width * factor)
    for dy in range(factor):
        assert torch.equal(large[:, dy::factor, factor - 1 :: factor], image)


def test_png_gives_back_the_pixels_and_folders_are_made(tmp_path):
    image = images(1)[0]
    save_png(image, tmp_path / "a" / "b" / "image.png")
    read = np.asarray(Image.open(tmp_path / "a" / "b" / "image.png"))
    assert np.array_equal(read, image.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("labels", "count", "expected"), [([4, 7], 5, [4, 7, 4, 7, 4]), ([1, 2, 3], 2, [1, 2]), ([0], 3, [0, 0, 0])]
)
def test_labels_go_round(labels, count, expected):
    turn = labels_in_turn(labels, count)
    assert turn.dtype == torch.int64 and turn.tolist() == expected


def test_images_are_spread_over_the_rows():
    rows = [{"image": i} for i in range(7)]
    assert [row["image"] for row in spread_rows(rows, 3)] == [0, 2, 4]
    assert [row["image"] for row in spread_rows(rows, 9)] == list(range(7))


@pytest.mark.parametrize(("labels", "count", "columns"), [([0, 1, 2], 7, 3), ([4], 7, 7), (list(range(40)), 40, 10)])
def test_samples_stand_in_one_column_per_label_that_was_asked_for(tmp_path, labels, count, columns):
    images = torch.zeros(count, 3, 48, 48, dtype=torch.uint8)
    write(images, labels_in_turn(labels, count), {}, tmp_path)
    assert Image.open(tmp_path / "grid.png").width == columns * (48 + 2) + 2
