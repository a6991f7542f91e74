"""The convolutional autoencoder: sizes, padding, attention, gradients, and the posterior."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from layers.conv_autoencoder import AttnBlock, AutoencoderConfig, ConvAutoencoder, Downsample, Posterior

SMALL = {"base_channels": 8, "multipliers": (1, 2), "num_res_blocks": 1, "z_channels": 3, "norm_groups": 4}


def small(**changes) -> AutoencoderConfig:
    return AutoencoderConfig(**SMALL | {"resolution": 32, "encoder_attention": ()} | changes)


@pytest.mark.parametrize(("double_z", "embed", "channels"), [(True, None, 6), (False, None, 3), (True, 5, 10)])
def test_shapes_follow_the_config(double_z, embed, channels):
    config = small(double_z=double_z, embed_channels=embed, multipliers=(1, 1, 2))
    vae = ConvAutoencoder(config)
    out = vae.encode(torch.randn(2, 3, 16, 24))
    assert out.shape == (2, channels, 4, 6) and config.stride == 4
    assert vae.decode(torch.randn(2, config.latent_channels, 4, 6)).shape == (2, 3, 16, 24)


@pytest.mark.parametrize(
    ("resolution", "encoder", "decoder", "down", "up"),
    [
        (32, (16,), (), [0, 1, 0], [0, 0, 0]),
        (32, (8, 32), (16,), [1, 0, 1], [0, 2, 0]),
        (64, (16,), (16,), [0, 0, 1], [0, 0, 2]),
    ],
)
def test_attention_sits_in_the_levels_of_the_nominal_resolution(resolution, encoder, decoder, down, up):
    config = small(multipliers=(1, 1, 1), resolution=resolution, encoder_attention=encoder, decoder_attention=decoder)
    vae = ConvAutoencoder(config)
    assert [len(level.attn) for level in vae.encoder.down] == down
    assert [len(level.attn) for level in vae.decoder.up] == up
    assert vae.encode(torch.randn(1, 3, 8, 8)).shape[2:] == (2, 2)  # another size than the nominal one


def test_every_parameter_gets_a_gradient():
    vae = ConvAutoencoder(small(encoder_attention=(16,), decoder_attention=(16,)))
    images = torch.randn(2, 3, 8, 8)
    posterior = Posterior(vae.encode(images))
    decoded = vae.decode(posterior.sample(torch.randn_like(posterior.mean)))
    ((decoded - images).square().mean() + 1e-3 * posterior.kl().mean()).backward()
    without = [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.any()]
    # softmax ignores a constant added to all scores, which is all that the bias of k does
    assert [name for name in without if not name.endswith(".k.bias")] == []


def test_attention_is_the_plain_formula():
    block, x = AttnBlock(8, groups=4).double(), torch.randn(2, 8, 3, 5).double()
    q, k, v = (conv(block.norm(x)).flatten(2) for conv in (block.q, block.k, block.v))  # (B, C, h*w)
    weights = (q.mT @ k / 8**0.5).softmax(-1)
    expected = x + block.proj_out((v @ weights.mT).view_as(x))
    torch.testing.assert_close(block(x), expected)


def test_downsampling_pads_at_the_bottom_and_the_right_only():
    layer = Downsample(1)
    torch.nn.init.ones_(layer.conv.weight)
    torch.nn.init.zeros_(layer.conv.bias)
    out = layer(torch.ones(1, 1, 4, 4))[0, 0].tolist()
    assert out == [[9, 6], [6, 4]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_channels": 6}, "6 channels .* 4 groups"),
        ({"multipliers": ()}, "at least 1"),
        ({"num_res_blocks": 0}, "at least 1"),
        ({"z_channels": 0}, "at least 1"),
        ({"norm_groups": 0}, "at least 1"),
    ],
)
def test_sizes_that_cannot_be_built_are_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_lists_of_a_yaml_file_are_equal_to_tuples():
    assert small(multipliers=[1, 2], encoder_attention=[16]) == small(multipliers=(1, 2), encoder_attention=(16,))


def test_posterior_is_the_normal_distribution_of_its_moments():
    moments = torch.randn(2, 6, 4, 4)
    posterior, noise = Posterior(moments), torch.randn(2, 3, 4, 4)
    normal = Normal(moments[:, :3], (moments[:, 3:] / 2).exp())
    torch.testing.assert_close(posterior.sample(noise), normal.mean + normal.stddev * noise)
    expected = kl_divergence(normal, Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(posterior.kl(), expected)


def test_posterior_is_float32_and_clamps_the_log_variance():
    moments = torch.tensor([0.0, -100.0, 0.0, 100.0]).view(2, 2, 1, 1)
    posterior = Posterior(moments.half())
    assert posterior.mean.dtype == posterior.std.dtype == torch.float32
    assert posterior.logvar.flatten().tolist() == [-30, 20]
