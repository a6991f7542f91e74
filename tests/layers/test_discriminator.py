"""The patch discriminator: official names and shapes, its losses, and the weight between the two sides."""

import pytest
import torch
from torch import nn

from layers.discriminator import (
    DiscriminatorConfig,
    PatchDiscriminator,
    adaptive_weight,
    frozen_call,
    hinge_discriminator,
    hinge_generator,
)

# LDM's and taming's `loss.discriminator.*`: 3 layers of stride 2 from 64 channels on
OFFICIAL = {
    "main.0.weight": (64, 3, 4, 4),
    "main.0.bias": (64,),
    "main.2.weight": (128, 64, 4, 4),
    "main.3.weight": (128,),
    "main.3.bias": (128,),
    "main.5.weight": (256, 128, 4, 4),
    "main.6.weight": (256,),
    "main.6.bias": (256,),
    "main.8.weight": (512, 256, 4, 4),
    "main.9.weight": (512,),
    "main.9.bias": (512,),
    "main.11.weight": (1, 512, 4, 4),
    "main.11.bias": (1,),
}
SMALL = DiscriminatorConfig(channels=4, num_layers=2)


def test_default_has_the_official_names_shapes_and_initial_weights():
    discriminator = PatchDiscriminator(DiscriminatorConfig())
    assert {name: tuple(tensor.shape) for name, tensor in discriminator.state_dict().items()} == OFFICIAL
    strides = [layer.stride[0] for layer in discriminator.main if isinstance(layer, nn.Conv2d)]
    assert strides == [2, 2, 2, 1, 1]
    state = discriminator.state_dict()
    assert state["main.8.weight"].std().item() == pytest.approx(0.02, rel=0.01)
    assert state["main.9.weight"].mean().item() == pytest.approx(1, abs=0.01)
    assert state["main.9.weight"].std().item() == pytest.approx(0.02, rel=0.2) and not state["main.9.bias"].any()


def test_widths_stop_growing_at_eight_times():
    deep = PatchDiscriminator(DiscriminatorConfig(channels=2, num_layers=5))
    assert [layer.out_channels for layer in deep.main if isinstance(layer, nn.Conv2d)] == [2, 4, 8, 16, 16, 16, 1]


@pytest.mark.parametrize(("layers", "size", "logits"), [(3, 256, 30), (3, 24, 1), (1, 6, 1), (2, 16, 2)])
def test_one_logit_per_patch_down_to_the_smallest_image(layers, size, logits):
    config = DiscriminatorConfig(channels=2, num_layers=layers)
    discriminator = PatchDiscriminator(config)
    with torch.no_grad():
        assert discriminator(torch.randn(2, 3, size, size)).shape == (2, 1, logits, logits)
        assert config.smallest_image <= size
        with pytest.raises(RuntimeError):
            discriminator(torch.randn(2, 3, config.smallest_image - 2**layers, config.smallest_image - 2**layers))


def test_a_call_leaves_no_trace_and_eval_mode_changes_nothing():
    discriminator, images = PatchDiscriminator(SMALL), torch.randn(3, 3, 16, 16)
    before = {name: tensor.clone() for name, tensor in discriminator.state_dict().items()}
    first = discriminator(images)
    assert torch.equal(discriminator.eval()(images), first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in discriminator.state_dict().items())


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge_discriminator(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    assert hinge_generator(fake).item() == pytest.approx(2 / 3)


def test_frozen_call_gives_gradients_to_the_images_alone():
    discriminator, images = PatchDiscriminator(SMALL), torch.randn(2, 3, 16, 16, requires_grad=True)
    logits = frozen_call(discriminator, images)
    assert torch.equal(logits, discriminator(images))
    logits.sum().backward()
    assert images.grad.any() and all(p.grad is None for p in discriminator.parameters())


def test_adaptive_weight_is_the_ratio_of_gradient_norms_at_the_last_weight():
    last = nn.Parameter(torch.tensor([1.0, 2.0]))
    first, second = (3 * last).sum() * last.detach().new_tensor(2.0), last.square().sum()  # gradients (6, 6) and (2, 4)
    weight = adaptive_weight(first, second, last)
    assert weight.item() == pytest.approx(72**0.5 / (20**0.5 + 1e-4)) and not weight.requires_grad
    (first + second).backward()  # the graphs are kept
    assert last.grad.tolist() == [8, 10]
    assert adaptive_weight(last.sum() * 1e6, (last * 1e-6).sum(), last).item() == 1e4  # official limit


@pytest.mark.parametrize("sizes", [{"channels": 0}, {"num_layers": 0}])
def test_sizes_below_one_are_an_error(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        DiscriminatorConfig(**sizes)
