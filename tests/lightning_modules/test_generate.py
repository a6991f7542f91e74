"""Numbered images: who draws which, and that batch and process do not matter."""

import pytest
import torch

from experiments.load import load_module
from lightning_modules.generate import class_major_labels, draw_images, rank_batches
from tests.methods.test_jit import TINY


@pytest.mark.parametrize(("images", "classes"), [(50_000, 1000), (256, 64), (10, 3), (2, 5), (7, 1)])
def test_labels_are_class_major_and_balanced(images, classes):
    labels = class_major_labels(images, classes)
    counts = labels.bincount(minlength=classes)
    assert labels.tolist() == sorted(labels.tolist()) and len(labels) == images and labels.max() < classes
    assert counts.max() - counts.min() <= 1


def test_protocol_of_50_per_class():
    labels = class_major_labels(50_000, 1000)
    assert torch.equal(labels, torch.arange(50_000) // 50)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_each_image_is_drawn_by_one_process_in_the_same_batch(world):
    one = [batch.tolist() for batch in rank_batches(50, 7)]
    shares = [rank_batches(50, 7, rank=rank, world_size=world) for rank in range(world)]
    dealt = [batch.tolist() for share in shares for batch in share]
    assert sorted(dealt) == sorted(one) and sum(map(len, dealt)) == 50


def test_pixels_do_not_depend_on_batch_or_process():
    torch.manual_seed(0)
    overrides = [f"{key}={value}" for key, value in TINY.items()]
    module = load_module("jit_digits", [*overrides, "model.init_args.sampling.num_steps=3"])
    for parameter in module.parameters():  # a fresh network returns zeros
        torch.nn.init.normal_(parameter, std=0.1)
    labels = class_major_labels(23, module.num_classes)

    def drawn(**how):
        parts = [p for share in how.pop("shares", [{}]) for p in draw_images(module, labels, seed=3, **how, **share)]
        images = torch.cat([part.images for part in parts])
        return images[torch.cat([part.index for part in parts]).argsort()].int()

    whole = drawn(batch_size=23)
    assert whole.float().std() > 5
    shares = [{"rank": rank, "world_size": 3} for rank in range(3)]
    assert torch.equal(drawn(batch_size=4, shares=shares), drawn(batch_size=4))
    for size in (1, 7):
        assert (drawn(batch_size=size) - whole).abs().max() <= 1
