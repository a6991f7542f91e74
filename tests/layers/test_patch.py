"""Pixels <-> tokens."""

import pytest
import torch

from layers.patch import channel_major_to_ours, ours_to_channel_major, patchify, unpatchify


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


@pytest.mark.parametrize(("patch", "channels"), [(2, 3), (3, 4), (1, 5), (4, 1)])
def test_channel_major_tokens_and_ours_are_permutations_of_each_other(patch, channels):
    images = torch.randn(2, channels, 2 * patch, 3 * patch)
    ours = patchify(images, patch)
    official = torch.nn.functional.unfold(images, patch, stride=patch).mT  # channel, row, column
    assert torch.equal(official[..., channel_major_to_ours(patch, channels)], ours)
    assert torch.equal(ours[..., ours_to_channel_major(patch, channels)], official)


def test_a_linear_map_on_official_tokens_is_permuted_once():
    patch, channels = 2, 3
    images, weight = torch.randn(1, channels, 4, 4).double(), torch.randn(5, patch**2 * channels).double()
    official = torch.nn.functional.unfold(images, patch, stride=patch).mT
    permuted = weight[:, channel_major_to_ours(patch, channels)]
    torch.testing.assert_close(patchify(images, patch) @ permuted.T, official @ weight.T)
