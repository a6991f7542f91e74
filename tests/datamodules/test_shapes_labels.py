"""Scenes with known objects: the maps say what was drawn, nearer things hide farther ones, rows are reproducible."""

import numpy as np
import pytest
import torch

from datamodules.shapes_labels import CLASSES, FAR, NEAR, STUFF, ShapesLabelMaps, draw_scene


def test_scene_is_a_function_of_its_arguments():
    first, again = draw_scene(3, 24), draw_scene(3, 24)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.image, draw_scene(3, 24, split="val").image)
    assert not np.array_equal(first.image, draw_scene(3, 24, seed=1).image)


@pytest.mark.parametrize("index", range(8))
def test_every_instance_has_one_class_one_distance_and_one_colour(index):
    scene = draw_scene(index, 64)
    classes, instances = scene.panoptic
    assert sorted(np.unique(instances)) == list(range(1, instances.max() + 1)), "ids are 1..N"
    for instance in np.unique(instances):
        own = instances == instance
        (found,) = np.unique(classes[own])
        inner = own & (scene.depth[0] > 0)
        if found in STUFF:
            assert scene.depth[0][inner].min() > FAR, "the floor is behind all objects"
            continue
        assert 1 <= found < min(STUFF)
        (distance,) = np.unique(scene.depth[0][inner]) if inner.any() else (NEAR,)
        assert NEAR <= distance <= FAR
        if inner.sum() > 20:
            assert scene.image[:, inner].std(axis=1).max() < 6, "a plain colour with a little noise"


def test_edges_have_no_depth_and_the_rest_has():
    shares = [(draw_scene(i, 64).depth == 0).mean() for i in range(8)]
    assert 0.005 < np.mean(shares) < 0.15


def test_batches_are_those_of_label_maps():
    data = ShapesLabelMaps(16, 4, length=8, val_length=4)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 16, 16) and batch["semantics"].shape == (4, 16, 16)
    assert int(batch["semantics"].max()) < len(CLASSES) and "truth" not in batch
    held_out = next(iter(data.val_dataloader()))
    assert torch.equal(held_out["truth"][1], torch.stack([held_out[n][1] for n in ("semantics", "instances")]))
    assert data.stuff_classes == [9, 10, 11, 12]


def test_depth_batches():
    data = ShapesLabelMaps(16, 4, task="depth", length=4, val_length=4)
    data.setup()
    batch = next(iter(data.val_dataloader()))
    assert batch["depth"].dtype == torch.float32 and batch["truth"][0].shape == (1, 16, 16)


@pytest.mark.parametrize(
    ("options", "message"), [({"max_objects": 0}, r"max_objects=0"), ({"task": "x"}, r"task='x' is unknown")]
)
def test_settings_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ShapesLabelMaps(**options)
