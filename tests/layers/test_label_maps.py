"""Label maps as numbers: what ids that are no class do, what logits mean, bins and their middles."""

import pytest
import torch

from layers.label_maps import (
    bins_of_depth,
    cross_entropy,
    depth_of_bins,
    depth_picture,
    one_hot,
    panoptic_map,
    panoptic_picture,
)


def test_one_hot_puts_maps_side_by_side_and_leaves_what_is_no_class_empty():
    maps = torch.tensor([[[[0, 2]], [[1, -1]]], [[[3, -1]], [[0, 2]]]])  # two rows of two maps of 1x2 pixels
    hot = one_hot(maps, [3, 2], dtype=torch.float32)
    assert hot.shape == (2, 5, 1, 2)
    assert hot[0, :, 0].T.tolist() == [[1, 0, 0, 0, 1], [0, 0, 1, 0, 0]]
    assert hot[1, :, 0].T.tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]


def test_cross_entropy_counts_pixels_without_a_class_but_not_those_it_ignores():
    logits = torch.randn(2, 3, 4)
    losses = -logits.log_softmax(-1)
    ids = torch.tensor([[1, -1, 4], [0, 2, 0]])
    torch.testing.assert_close(
        cross_entropy(logits, ids, ignore_zero=False),
        torch.stack([losses[0, 0, 1] / 3, (losses[1, 0, 0] + losses[1, 1, 2] + losses[1, 2, 0]) / 3]),
    )
    torch.testing.assert_close(
        cross_entropy(logits, ids, ignore_zero=True), torch.stack([losses[0, 0, 1] / 3, losses[1, 1, 2]])
    )


def test_an_image_without_measured_pixels_has_no_loss_and_no_gradient():
    logits = torch.randn(1, 3, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(1, 3, dtype=torch.int64), ignore_zero=True)
    loss.sum().backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_an_instance_has_the_class_of_its_largest_sum_even_where_single_pixels_differ():
    instances = torch.zeros(1, 1, 4, 3)
    instances[0, 0, :3, 2] = 1  # three pixels of instance 2, one of instance 0
    semantics = torch.tensor([[[[0.0, 3.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 2.0], [5.0, 0.0, 0.0]]]])
    maps = panoptic_map(semantics, instances)
    assert maps["instances"].tolist() == [[[2, 2, 2, 0]]] and maps["semantics"].tolist() == [[[2, 2, 2, 0]]]


@pytest.mark.parametrize(("fraction", "kept"), [(0.0, True), (0.24, True), (0.25, False)])
def test_small_instances_are_dropped_at_the_fraction_itself(fraction, kept):
    instances = torch.zeros(1, 2, 2, 2)
    instances[0, 0, 0, 1] = 1  # a quarter of the pixels
    semantics = torch.zeros(1, 2, 2, 3)
    semantics[..., 1] = 1
    maps = panoptic_map(semantics, instances, min_fraction=fraction)
    assert maps["instances"][0, 0, 0] == maps["semantics"][0, 0, 0] == int(kept)
    assert maps["semantics"][0, 1].tolist() == [1, 1]


def test_bins_are_equal_and_their_middles_come_back():
    depth = torch.tensor([-1.0, 0.0, 0.9, 1.0, 3.99, 4.0, 99.0])
    bins = bins_of_depth(depth, 4, low=0.0, high=4.0)
    assert bins.tolist() == [0, 0, 0, 1, 3, 3, 3]
    assert depth_of_bins(bins, 4, low=0.0, high=4.0).unique().tolist() == [0.5, 1.5, 3.5]


def test_pictures_are_black_where_nothing_is_known_and_tell_instances_apart():
    semantics, instances = torch.tensor([[[0, 1, 1, 2]]]), torch.tensor([[[0, 1, 2, 1]]])
    picture = panoptic_picture(semantics, instances)
    assert picture.shape == (1, 3, 1, 4) and picture.min() >= -1 and picture.max() <= 1
    assert picture[0, :, 0, 0].tolist() == [-1, -1, -1]
    assert len({tuple(pixel) for pixel in picture[0, :, 0].T.tolist()}) == 4
    depth = depth_picture(torch.tensor([[[0, 1, 7]]]), 8)
    assert depth[0, :, 0, 0].tolist() == [-1, -1, -1]
    assert depth[0, 0, 0, 1] > depth[0, 2, 0, 1] and depth[0, 2, 0, 2] > depth[0, 0, 0, 2]  # red is near, blue far
