"""Editing with MAR: what stays, what is drawn anew, what it is drawn from, and the mistakes."""

import json
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import recipes, sample
from layers.gather import put, take
from layers.random import row_generators
from layers.tokenizers.base import to_uint8
from lightning_modules.editing import groups, partition, unknown_tokens
from lightning_modules.mar import MARSampling
from tests.methods.test_mar_variants import build
from tests.smoke import call, train

SAMPLING = MARSampling(num_iter=4, num_steps=4, cfg_scale=2.0)
EDITABLE = [("bidirectional", "random"), ("bidirectional", "raster"), ("causal", "random")]


def images(size=3):
    return torch.randint(0, 256, (size, 3, 8, 8), dtype=torch.uint8)


def hole() -> torch.Tensor:
    """(8, 8): 3 x 4 pixels, which 2-pixel patches make into 2 x 2 or 2 x 3 tokens."""
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 3:7] = True
    return mask


def test_a_token_is_unknown_where_any_of_its_pixels_is_masked():
    mask = torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[0, 1, 2] = mask[1, 2:, 4:] = True
    expected = [[0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]
    assert unknown_tokens(mask, (2, 3)).int().tolist() == expected


def test_partition_keeps_both_orders():
    orders, last = torch.tensor([[3, 0, 2, 1]]), torch.tensor([[True, False, False, True]])
    assert partition(orders, last).tolist() == [[2, 1, 3, 0]]


def test_groups_have_equal_counts():
    assert [g.tolist() for g in groups(torch.tensor([4, 2, 4, 4]))] == [[1], [0, 2, 3]]


@pytest.mark.parametrize(("attention", "order"), EDITABLE)
def test_pixels_outside_the_mask_stay_and_those_inside_follow_seed_and_class(attention, order):
    module, given, mask = build(attention, order, "flow"), images(), hole()

    def edited(seed, labels):
        return module.edit(given, mask, labels, SAMPLING, torch.Generator().manual_seed(seed))

    first, again, other, relabelled = (edited(*s) for s in ((0, [1] * 3), (0, [1] * 3), (1, [1] * 3), (0, [2] * 3)))
    assert first.shape == (3, 3, 8, 8) and torch.equal(first, again)
    assert torch.equal(to_uint8(first)[:, :, ~mask], given[:, :, ~mask])
    for changed in (other, relabelled):
        assert (changed != first)[:, :, mask].float().mean() > 0.9
        assert torch.equal(changed[:, :, ~mask], first[:, :, ~mask])


@pytest.mark.parametrize(("attention", "order"), EDITABLE)
@torch.no_grad()
def test_every_known_token_matters_and_no_old_one_does(attention, order):
    """What lies under the mask is never read; each token that stays is."""
    module, mask = build(attention, order, "flow"), hole()
    x, unknown = torch.randn(2, 16, 12), unknown_tokens(mask.expand(2, 8, 8), (4, 4))
    labels = torch.tensor([0, 4])

    def redrawn(x):
        return module.redraw(x, unknown, labels, SAMPLING, torch.Generator().manual_seed(0))

    before = redrawn(x)
    assert torch.equal(before[~unknown], x[~unknown])
    for position in range(16):
        moved = x.clone()
        moved[:, position] += 1
        change = (redrawn(moved) - before).abs().amax(-1)  # (B, L)
        if unknown[0, position]:
            assert change.max() == 0
        else:
            assert change[unknown].min() > 1e-7


@torch.no_grad()
def test_a_causal_trunk_takes_known_tokens_first_as_if_it_had_drawn_them():
    """The plain form: at each position the whole sequence so far goes through the trunk, without a cache."""
    module = build("causal", "random", "flow")
    x, orders, labels = torch.randn(2, 16, 12), torch.rand(2, 16).argsort(1), torch.tensor([0, 4])
    noise = list(torch.randn(6, 1, 2, 12))
    drawn = iter(noise)
    fast = module._generate_causal(x, labels, orders, lambda *_: next(drawn), SAMPLING, num_known=10)
    for j in range(10, 16):
        z = [module.conditions(x, y, orders, orders[:, :0])[:, j] for y in (labels, torch.full_like(labels, 5))]
        scale = module._scale(SAMPLING, max(1, 15 - j))
        token = module.head.sample(
            z[0], noise[j - 10], uncond=z[1], cfg_scale=scale, num_steps=SAMPLING.num_steps, solver="euler"
        )
        x = put(x, orders[:, j : j + 1], token[:, None])
    torch.testing.assert_close(fast, x, atol=1e-4, rtol=1e-4)
    assert take(fast, orders[:, :10]).shape == (2, 10, 12)


def test_images_with_masks_of_their_own_are_as_if_edited_alone():
    """Three masks with 4, 1 and 4 unknown tokens: the batch is split, and each image keeps its generator."""
    module, given = build(kind="flow"), images()
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[0, :4, :4] = masks[1, 0, 0] = masks[2, 4:, 4:] = True
    together = module.edit(given, masks, [0, 1, 2], SAMPLING, row_generators(7, [0, 1, 2], device="cpu"))
    for i in range(3):
        alone = module.edit(given[i : i + 1], masks[i], [i], SAMPLING, row_generators(7, [i], device="cpu"))
        torch.testing.assert_close(together[i], alone[0], atol=1e-5, rtol=0)


def test_a_mask_of_everything_is_sampling():
    module = build(kind="flow")
    everything = torch.ones(8, 8, dtype=torch.bool)
    edited = module.edit(images(2), everything, [1, 2], SAMPLING, torch.Generator().manual_seed(3))
    assert torch.equal(edited, module.sample([1, 2], SAMPLING, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 3, 8, 9, dtype=torch.uint8)}, r"\(2, 3, 8, 9\).*resize them to 8x8"),
        ({"images": torch.zeros(2, 3, 8, 8)}, "torch.float32"),
        ({"labels": [1]}, "one image per label"),
        ({"labels": [1, 5]}, "label 5 is out of range"),
        ({"mask": torch.ones(8, 9, dtype=torch.bool)}, r"mask is torch.bool \(8, 9\)"),
        ({"mask": torch.ones(8, 8)}, "mask is torch.float32"),
        ({"mask": torch.zeros(8, 8, dtype=torch.bool)}, "marks nothing"),
        ({"mask": torch.stack([hole(), hole() & False])}, "marks nothing"),
    ],
)
def test_mistakes(change, message):
    arguments = {"images": images(2), "mask": hole(), "labels": [1, 2]} | change
    with pytest.raises(ValueError, match=message):
        build(kind="flow").edit(*arguments.values(), SAMPLING)


def test_a_causal_raster_trunk_says_why_it_cannot():
    with pytest.raises(ValueError, match=r"causal trunk of raster order cannot edit.*net\.order=random"):
        build("causal", "raster", "flow").edit(images(2), hole(), [1, 2], SAMPLING)


def test_make_sample_edits_an_image(tmp_path):
    """Through the command line, from a checkpoint: four drawings of the masked half; a wrong size is refused."""
    with chdir(tmp_path):
        train("mar_digits")
        recipes.find_checkpoint("mar_digits", "last")
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save("in.png")
        mask = np.zeros((16, 16), np.uint8)
        mask[:, 8:] = 255
        Image.fromarray(mask).save("mask.png")
        edit = ("--exp", "mar_digits", "--ckpt", "last", "--image", "in.png", "--mask", "mask.png", "--num", "4")
        call(sample.main, *edit, "--labels", "3", "--out", "out")
        drawn = np.load("out/samples.npz")
        assert drawn["arr_0"].shape == (4, 16, 16, 3) and drawn["labels"].tolist() == [3] * 4
        assert (drawn["arr_0"][:, :, :8] == pixels[:, :8]).all()
        assert len({image.tobytes() for image in drawn["arr_0"]}) == 4
        assert json.loads(Path("out/settings.json").read_text())["mask"] == "mask.png"
        for name in ("in.png", "mask.png"):
            Image.open(name).resize((20, 20)).save(name)
        with pytest.raises(SystemExit):
            call(sample.main, *edit, "--labels", "3", "--out", "none")
        assert not Path("none").exists()
