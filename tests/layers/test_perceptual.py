"""LPIPS against its formula written with torch's own layers, under the names of the published files."""

import pytest
import torch
from torch import Tensor, nn

from layers.perceptual import EPS, SCALE, SHIFT, VGG16, FixedConv, PerceptualDistance, unit

STAGES = ((4, 5), (6,), (7, 8, 9))
VGG16_LAYERS = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # convolutions of torchvision's `features`


def plain_vgg(stages) -> tuple[nn.Sequential, list[int]]:
    """torchvision's layout, and the index of each stage's last ReLU."""
    layers, ends, before = [], [], 3
    for widths in stages:
        for width in widths:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
        ends.append(len(layers) - 1)
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers), ends


def weights(stages=STAGES) -> tuple[dict[str, Tensor], nn.Sequential, list[int]]:
    vgg, ends = plain_vgg(stages)
    state = {f"features.{name}": tensor for name, tensor in vgg.state_dict().items()}
    state |= {f"lin{i}.model.1.weight": torch.rand(1, widths[-1], 1, 1) for i, widths in enumerate(stages)}
    return state, vgg, ends


def loaded() -> tuple[PerceptualDistance, dict[str, Tensor], nn.Sequential, list[int]]:
    state, vgg, ends = weights()
    distance = PerceptualDistance(STAGES)
    distance.load_weights(state | {"classifier.0.weight": torch.zeros(1)}, origin="test")
    return distance, state, vgg, ends


def test_distance_is_the_published_formula():
    distance, state, vgg, ends = loaded()
    images, others = torch.rand(2, 2, 3, 16, 24) * 2 - 1
    expected = torch.zeros(2)
    a, b = ((x - torch.tensor(SHIFT).view(3, 1, 1)) / torch.tensor(SCALE).view(3, 1, 1) for x in (images, others))
    for index, layer in enumerate(vgg):
        a, b = layer(a), layer(b)
        if index in ends:
            unit_a, unit_b = (x / (x.square().sum(1, keepdim=True).sqrt() + EPS) for x in (a, b))
            head = state[f"lin{ends.index(index)}.model.1.weight"]
            expected = expected + ((unit_a - unit_b) ** 2 * head.view(1, -1, 1, 1)).sum(1).mean((1, 2))
    torch.testing.assert_close(distance(images, others), expected)
    assert not distance(images, images).any()


def test_names_and_shapes_are_those_of_the_published_files():
    with torch.device("meta"):
        named = PerceptualDistance().named_weights()
    convs = [name.split(".")[1] for name in named if name.startswith("features.") and name.endswith(".weight")]
    assert convs == [str(i) for i in VGG16_LAYERS]
    heads = {name: tuple(t.shape) for name, t in named.items() if name.startswith("lin")}
    assert heads == {f"lin{i}.model.1.weight": (1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    features = sum(t.numel() for name, t in named.items() if name.startswith("features."))
    assert features == 14_714_688 and len(VGG16) == 5  # VGG-16 without its classifier


def test_nothing_is_trained_or_stored_and_it_moves_with_its_owner():
    distance, *_ = loaded()
    assert list(distance.parameters()) == [] and distance.state_dict() == {}
    assert {t.dtype for t in distance.double().named_weights().values()} == {torch.float64}


def test_gradient_reaches_the_images_and_is_finite_where_all_features_vanish():
    distance, *_ = loaded()
    for conv in distance.modules():
        if isinstance(conv, FixedConv) and conv.bias is not None:
            conv.bias.fill_(-100)  # every ReLU is shut
    images = torch.rand(1, 3, 8, 8, requires_grad=True)
    distance(images, torch.rand(1, 3, 8, 8)).sum().backward()
    assert images.grad.isfinite().all()
    distance, *_ = loaded()
    distance(images, torch.rand(1, 3, 8, 8)).sum().backward()
    assert images.grad.any()


def test_unit_length_under_autocast_is_float32():
    x = torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(unit(x).norm(dim=1), torch.ones(2, 3, 3))
    assert unit(x.bfloat16()).dtype == torch.float32


def test_without_weights_the_distance_is_nan():
    distance = PerceptualDistance(STAGES)
    assert distance(torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)).isnan().all()


def test_a_file_that_does_not_fit_is_named_and_changes_nothing():
    distance, (state, *_) = PerceptualDistance(STAGES), weights()
    missing = {name: tensor for name, tensor in state.items() if name != "lin1.model.1.weight"}
    with pytest.raises(ValueError, match=r"some\.pth does not fit.*1 missing \(lin1\.model\.1\.weight\)"):
        distance.load_weights(missing, origin="some.pth")
    with pytest.raises(ValueError, match=r"features\.0\.bias \(5,\) instead of \(4,\)"):
        distance.load_weights(state | {"features.0.bias": torch.zeros(5)}, origin="some.pth")
    assert all(tensor.isnan().all() for tensor in distance.named_weights().values())
