"""Tokens of GIVT's beta-VAE: geometry and order, no scale, clipping, freezing, and what must be an error."""

import copy

import pytest
import torch

from layers.checkpoint import to_official
from layers.maskgit_autoencoder import flax_rules
from layers.patch import channel_major_to_ours, patchify
from layers.tokenizers.base import from_uint8
from layers.tokenizers.beta_vae import BetaVAETokenizer
from lightning_modules.config import as_tokenizer, tokenizer_config

ARCH = {"base_channels": 8, "multipliers": [1, 2], "num_res_blocks": 1, "z_channels": 4, "norm_groups": 4}


def build(size: int = 16, patch=1, *, load: bool = True, **changes) -> BetaVAETokenizer:
    tokenizer = BetaVAETokenizer(size, patch, **{"arch": ARCH} | changes)
    if load:
        tokenizer.load_weights(tokenizer.vae.state_dict(), origin="itself")
    return tokenizer


def pictures(batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, 16, 16), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("patch", "grid", "dim"), [(1, (8, 8), 4), (2, (4, 4), 16), ((1, 2), (8, 4), 8), ([4, 1], (2, 8), 16)]
)
def test_tokens_are_samples_as_they_are_cut_into_patches(patch, grid, dim):
    tokenizer = build(patch=patch)
    assert (tokenizer.grid, tokenizer.seq_len, tokenizer.token_dim) == (grid, grid[0] * grid[1], dim)
    raw = tokenizer.encode_image(pictures())
    assert raw.shape == (2, 8, 8, 8)
    x, logdet = tokenizer.encode_raw(raw, torch.Generator().manual_seed(0))
    mean, logvar = raw.chunk(2, 1)
    latents = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    assert x.shape == (2, tokenizer.seq_len, dim) and logdet is None
    torch.testing.assert_close(tokenizer.join(x), latents)
    torch.testing.assert_close(tokenizer.from_tokens(x), latents)
    torch.testing.assert_close(tokenizer.decode(x), tokenizer.vae.decode(latents).clamp(-1, 1))


def test_inside_a_token_the_channel_is_the_slowest():
    latents = torch.arange(4 * 8 * 8.0).view(1, 4, 8, 8)
    token = build(patch=(1, 2)).cut(latents)[0, 5]  # second row of positions, second pair
    assert token.tolist() == [latents[0, c, 1, 2 + q] for c in range(4) for q in range(2)]
    square = build(patch=2).cut(latents)
    assert torch.equal(square[..., channel_major_to_ours(2, 4)], patchify(latents, 2))


def test_at_512_pixels_pairs_of_positions_give_32_by_16_tokens():
    with torch.device("meta"):
        tokenizers = [BetaVAETokenizer(256), BetaVAETokenizer(512), BetaVAETokenizer(512, (1, 2))]
    assert [(t.grid, t.token_dim) for t in tokenizers] == [((16, 16), 16), ((32, 32), 16), ((32, 16), 32)]


def test_scale_is_1_unless_one_is_given():
    plain, scaled = build(), build(latent_scale=0.5, latent_shift=0.25)
    latents = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(scaled.to_tokens(latents), (plain.to_tokens(latents) - 0.25) * 0.5)
    torch.testing.assert_close(scaled.from_tokens(scaled.to_tokens(latents)), latents)


@pytest.mark.parametrize("unit_range", [True, False])
def test_the_log_variance_is_clamped_as_in_the_released_models_alone(unit_range):
    raw = torch.zeros(1, 8, 8, 8)
    raw[:, 4:6], raw[:, 6:] = -40.0, 30.0
    logvar = build(arch=ARCH | {"unit_range": unit_range}).posterior(raw).logvar
    expected = [-30.0, 20.0] if unit_range else [-40.0, 30.0]
    assert logvar.unique().tolist() == expected


def test_images_are_clipped_and_the_autoencoder_s_are_not():
    tokenizer = build()
    torch.nn.init.constant_(tokenizer.vae.decoder.conv_out.bias, 30.0)
    assert bool((tokenizer.decode(torch.randn(1, 64, 4)) == 1).all())
    assert tokenizer.vae.decode(torch.randn(1, 4, 8, 8)).min() > 1


def test_encoding_is_float32_and_the_same_under_autocast():
    tokenizer, images = build(), pictures()
    plain = tokenizer.encode_image(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert tokenizer.vae.encode(from_uint8(images)).dtype == torch.bfloat16  # else the island shows nothing
        assert torch.equal(tokenizer.encode_image(images), plain)


def test_frozen_is_not_trained_and_trainable_has_gradients_everywhere():
    frozen = build()
    assert not torch.nn.Sequential(frozen).train()[0].training and not any(p.requires_grad for p in frozen.parameters())
    tokenizer = build(frozen=False, load=False)
    assert not tokenizer.vae.decoder.conv_in.bias.any(), "it starts as flax does"
    images = tokenizer.vae.decode(tokenizer.from_tokens(tokenizer({"image": pictures()}).x))
    images.square().mean().backward()
    assert [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_frozen_without_weights_makes_no_images_but_reads_a_cache():
    tokenizer = build(load=False)
    for use in (lambda: tokenizer.encode_image(pictures()), lambda: tokenizer.decode(torch.zeros(1, 64, 4))):
        with pytest.raises(ValueError, match="BetaVAETokenizer is frozen and has no weights yet"):
            use()
    assert tokenizer({"raw": torch.randn(2, 8, 8, 8)}).x.shape == (2, 64, 4)


def test_weights_by_names_of_flax_and_by_ours():
    source, first, second = build(), build(load=False), build(load=False)
    official = to_official(source.vae.state_dict(), flax_rules(source.arch))
    first.load_weights(official, origin="flax")
    second.load_weights(source.vae.state_dict(), origin="ours")
    images = pictures()
    assert torch.equal(first.encode_image(images), source.encode_image(images))
    assert torch.equal(second.encode_image(images), source.encode_image(images))


def test_weights_that_do_not_fit_are_an_error_that_changes_nothing():
    tokenizer = build(load=False)
    before = copy.deepcopy(tokenizer.vae.state_dict())
    official = to_official({name: t + 1 for name, t in before.items()}, flax_rules(tokenizer.arch))
    kernel = "cnn_encoder/Conv_0/kernel"
    for name, value, message in (
        ("cnn_encoder/ResBlock_9/Conv_0/kernel", torch.zeros(1), r"does not fit .*\.arch: .*unknown .*ResBlock_9"),
        (kernel, torch.zeros(3, 3, 3, 5), r"of another shape \(encoder\.conv_in\.weight \(5, 3, 3, 3\)"),
        (kernel, torch.zeros(3), r"does not fit .*\.arch: .*dim"),
    ):
        with pytest.raises(ValueError, match=rf"^some_params .*{message}"):
            tokenizer.load_weights(official | {name: value}, origin="some_params")
    del official[kernel]
    with pytest.raises(ValueError, match=r"1 missing \(encoder\.conv_in\.weight\)"):
        tokenizer.load_weights(official, origin="some_params")
    assert not tokenizer.loaded
    assert all(torch.equal(tensor, before[name]) for name, tensor in tokenizer.vae.state_dict().items())


@pytest.mark.parametrize(
    ("size", "patch", "message"),
    [
        (17, 1, "image_size 17 .*stride 2 times patch_size 1"),
        (20, (1, 4), r"image_size 20 .*times patch_size \(1, 4\)"),
        (16, (1, 0), r"times patch_size \(1, 0\)"),
        (16, (1, 2, 2), r"patch_size is \(1, 2, 2\): set .*one number, or to height and width"),
    ],
)
def test_sizes_that_do_not_divide_are_an_error_naming_both(size, patch, message):
    with pytest.raises(ValueError, match=message):
        build(size, patch)


def test_encoder_without_log_variance_is_an_error():
    with pytest.raises(ValueError, match="double_z True"):
        build(arch=ARCH | {"double_z": False})


@pytest.mark.parametrize("patch", [2, [1, 2]])
def test_config_rebuilds_the_tokenizer(patch):
    tokenizer = build(patch=patch, latent_scale=0.5, latent_shift=0.1, weights="some_params", frozen=False)
    again = as_tokenizer(tokenizer_config(tokenizer))
    assert isinstance(again, BetaVAETokenizer) and again.init_args() == tokenizer.init_args()
    names = ("grid", "token_dim", "seq_len", "image_size", "frozen", "weights", "arch", "patch_size")
    assert [getattr(again, n) for n in names] == [getattr(tokenizer, n) for n in names]
