"""Pixels <-> tokens."""

import pytest
import torch

from layers.patch import patchify, unpatchify


@pytest.mark.parametrize(("shape", "patch"), [((2, 3, 8, 8), 4), ((1, 1, 6, 9), 3), ((2, 4, 4, 8), 1)])
def test_unpatchify_inverts_patchify(shape, patch):
    images = torch.randn(shape)
    tokens = patchify(images, patch)
    grid = (shape[2] // patch, shape[3] // patch)
    assert tokens.shape == (shape[0], grid[0] * grid[1], patch * patch * shape[1])
    assert torch.equal(unpatchify(tokens, patch, grid), images)


def test_tokens_are_in_raster_order_and_row_column_channel_inside():
    images, patch = torch.arange(2 * 3 * 6 * 9.0).view(2, 3, 6, 9), 3
    tokens = patchify(images, patch)
    for row in range(2):
        for col in range(3):
            for p in range(patch):
                for q in range(patch):
                    for c in range(3):
                        pixel = images[:, c, row * patch + p, col * patch + q]
                        assert torch.equal(tokens[:, row * 3 + col, (p * patch + q) * 3 + c], pixel)


@pytest.mark.parametrize(("height", "width"), [(9, 8), (8, 9)])
def test_a_side_that_is_no_multiple_is_an_error_naming_the_sizes(height, width):
    with pytest.raises(ValueError, match=rf"{height}x{width} pixels .* patches of 4"):
        patchify(torch.zeros(1, 3, height, width), 4)
