"""MaskGIT's convolutional autoencoder: sizes, the short way that loses its input, initial weights, names, gradients."""

import pytest
import torch
import torch.nn.functional as F

from layers.checkpoint import to_official, to_ours
from layers.conv_autoencoder import Posterior
from layers.maskgit_autoencoder import MaskGITAutoencoder, MaskGITAutoencoderConfig, ResBlock, flax_rules

SMALL = {"base_channels": 8, "multipliers": (1, 2, 2), "num_res_blocks": 2, "z_channels": 3, "norm_groups": 4}


def small(**changes) -> MaskGITAutoencoderConfig:
    return MaskGITAutoencoderConfig(**SMALL | changes)


@pytest.mark.parametrize(("double_z", "channels"), [(True, 6), (False, 3)])
@pytest.mark.parametrize(("multipliers", "stride"), [((1,), 1), ((2, 1), 2), ((1, 2, 2), 4)])
def test_shapes_follow_the_config(double_z, channels, multipliers, stride):
    config = small(double_z=double_z, multipliers=multipliers)
    vae = MaskGITAutoencoder(config)
    assert config.stride == stride and config.latent_channels == 3
    assert vae.encode(torch.randn(2, 3, 8 * stride, 4 * stride)).shape == (2, channels, 8, 4)
    assert vae.decode(torch.randn(2, 3, 8, 4)).shape == (2, 3, 8 * stride, 4 * stride)


def test_sizes_that_cannot_be_built_are_errors():
    with pytest.raises(ValueError, match="8 channels cannot be normalised in 32 groups"):
        MaskGITAutoencoderConfig(base_channels=8)
    with pytest.raises(ValueError, match="must be at least 1"):
        small(num_res_blocks=0)


@pytest.mark.parametrize("out_channels", [4, 8])
def test_a_block_that_changes_the_channels_adds_its_result_and_not_its_input(out_channels):
    block, x = ResBlock(4, out_channels, groups=2).double(), torch.randn(2, 4, 5, 6).double()
    h = x
    for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
        h = F.group_norm(h, 2, norm.weight, norm.bias, eps=1e-6)
        h = F.conv2d(h * h.sigmoid(), conv.weight, padding=1)
    if out_channels == 4:
        expected = x + h
    else:
        expected = h + torch.einsum("oi,bihw->bohw", block.nin_shortcut.weight[..., 0, 0], h)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("unit_range", [True, False])
def test_pixels_in_0_to_1_inside_or_as_they_are(unit_range):
    vae = MaskGITAutoencoder(small(unit_range=unit_range))
    images, z = torch.rand(1, 3, 8, 8) * 2 - 1, torch.randn(1, 3, 2, 2)
    torch.testing.assert_close(vae.encode(images), vae.encoder((images + 1) / 2 if unit_range else images))
    torch.testing.assert_close(vae.decode(z), 2 * vae.decoder(z) - 1 if unit_range else vae.decoder(z))


def test_every_parameter_gets_a_gradient_also_where_pixels_are_out_of_range():
    vae = MaskGITAutoencoder(small())
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    torch.nn.init.constant_(vae.decoder.conv_out.bias, 30.0)  # all output far beyond 1
    posterior = Posterior(vae.encode(images))
    decoded = vae.decode(posterior.sample(torch.randn_like(posterior.mean)))
    assert decoded.min() > 1
    ((decoded - images).square().mean() + 1e-3 * posterior.kl().mean()).backward()
    assert [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_initial_weights_are_those_of_flax():
    vae = MaskGITAutoencoder(small(base_channels=64, norm_groups=32))
    vae.init_weights()
    weight = vae.encoder.down[1].block[0].conv2.weight
    assert weight.std().item() == pytest.approx((9 * 128) ** -0.5, rel=0.02)
    assert weight.abs().max().item() <= 2 * (9 * 128) ** -0.5 / 0.8796 + 1e-6
    assert not vae.decoder.conv_in.bias.any() and bool((vae.decoder.norm_out.weight == 1).all())


@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 1, 2)])
def test_names_of_flax_number_layers_in_the_order_in_which_they_run(multipliers):
    config = small(multipliers=multipliers)
    vae, order = MaskGITAutoencoder(config), []
    for name, module in vae.named_modules():
        if isinstance(module, ResBlock) or "conv_" in name or name.endswith("_conv"):
            module.register_forward_hook(lambda *_, name=name: order.append(name))
    vae.decode(vae.encode(torch.zeros(1, 3, 8, 8))[:, :3])
    for half in ("encoder", "decoder"):
        run = [name for name in order if name.startswith(half)]
        blocks = [name for name in run if "conv" not in name]
        convs = [name for name in run if "conv" in name]
        ours = {rule.official: rule.ours for rule in flax_rules(config)}
        assert [ours[f"cnn_{half}/ResBlock_{i}/Conv_0/kernel"] for i in range(len(blocks))] == [
            f"{name}.conv1.weight" for name in blocks
        ]
        assert [ours[f"cnn_{half}/Conv_{i}/kernel"] for i in range(len(convs))] == [f"{name}.weight" for name in convs]


def test_weights_go_to_the_layout_of_flax_and_back():
    config = small()
    state, rules = MaskGITAutoencoder(config).state_dict(), flax_rules(config)
    official = to_official(state, rules)
    assert official["cnn_encoder/ResBlock_2/Conv_2/kernel"].shape == (1, 1, 16, 16)
    assert official["cnn_decoder/Conv_3/kernel"].shape == (3, 3, 8, 3)
    back = to_ours(official, rules)
    assert back.keys() == state.keys() and all(torch.equal(back[name], tensor) for name, tensor in state.items())
