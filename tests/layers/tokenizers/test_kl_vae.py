"""Tokens of a KL autoencoder: geometry, scale, freezing, weights, and what must be an error."""

import copy
import math

import pytest
import torch

from layers.conv_autoencoder import KL8Config
from layers.patch import patchify
from layers.tokenizers.base import from_uint8
from layers.tokenizers.conv import latent_statistics
from layers.tokenizers.kl_vae import KLVAETokenizer
from lightning_modules.config import as_tokenizer, tokenizer_config

ARCH = {
    "base_channels": 8,
    "multipliers": [1, 2],
    "num_res_blocks": 1,
    "z_channels": 4,
    "resolution": 16,
    "encoder_attention": [8],
    "norm_groups": 4,
}


def build(size: int = 16, patch: int = 1, *, load: bool = True, **changes) -> KLVAETokenizer:
    tokenizer = KLVAETokenizer(size, patch, **{"arch": ARCH, "latent_scale": 0.5} | changes)
    if load:
        tokenizer.load_weights(tokenizer.vae.state_dict(), origin="itself")
    return tokenizer


def pictures(size: int = 16, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)


@pytest.mark.parametrize(("patch", "length", "dim"), [(1, 64, 4), (2, 16, 16), (4, 4, 64)])
def test_tokens_are_patches_of_the_scaled_latent(patch, length, dim):
    tokenizer = build(patch=patch, latent_shift=0.25)
    assert (tokenizer.seq_len, tokenizer.token_dim, tokenizer.grid) == (length, dim, (8 // patch, 8 // patch))
    raw = tokenizer.encode_image(pictures())
    assert raw.shape == (2, 8, 8, 8)
    x, logdet = tokenizer.encode_raw(raw, torch.Generator().manual_seed(0))
    mean, logvar = raw.chunk(2, 1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    latents = mean + (logvar / 2).exp() * noise
    torch.testing.assert_close(x, patchify((latents - 0.25) * 0.5, patch))
    assert x.shape == (2, length, dim) and logdet is None
    torch.testing.assert_close(tokenizer.from_tokens(x), latents)
    torch.testing.assert_close(tokenizer.decode(x), tokenizer.vae.decode(latents), atol=1e-5, rtol=1e-5)


def test_released_kl16_and_kl8_give_256_tokens():
    with torch.device("meta"):
        kl16 = KLVAETokenizer(256)
        kl8 = KLVAETokenizer(256, 2, arch=KL8Config())
        large = KLVAETokenizer(512)
    assert (kl16.seq_len, kl16.token_dim) == (kl8.seq_len, kl8.token_dim) == (256, 16)
    assert large.grid == (32, 32)


def test_posterior_is_sampled_anew_and_the_generator_fixes_it():
    tokenizer = build()
    raw = tokenizer.encode_image(pictures())
    assert not torch.equal(tokenizer.encode_raw(raw).x, tokenizer.encode_raw(raw).x)
    draws = [tokenizer.encode_raw(raw, torch.Generator().manual_seed(1)).x for _ in range(2)]
    assert torch.equal(*draws)


def test_encoding_is_float32_and_the_same_under_autocast():
    tokenizer, images = build(), pictures()
    plain = tokenizer.encode_image(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert tokenizer.vae.encode(from_uint8(images)).dtype == torch.bfloat16  # else the island shows nothing
        assert torch.equal(tokenizer.encode_image(images), plain)
    assert plain.dtype == torch.float32


def test_frozen_stays_in_eval_mode_and_untrained_whatever_its_owner_does():
    tokenizer = build()
    owner = torch.nn.Sequential(tokenizer).train()
    assert owner.training and not any(module.training for module in tokenizer.modules())
    assert not any(p.requires_grad for p in tokenizer.parameters())
    assert not tokenizer(batch={"image": pictures()}).x.requires_grad


def test_trainable_trains_and_needs_no_file():
    tokenizer = build(frozen=False, load=False)
    assert tokenizer.training and all(p.requires_grad for p in tokenizer.parameters())
    tokenizer.decode(tokenizer({"image": pictures()}).x).square().mean().backward()
    without = [n for n, p in tokenizer.named_parameters() if p.grad is None and not n.endswith(".k.bias")]
    assert without == []
    assert not tokenizer.eval().training


@pytest.mark.parametrize("path", [None, "kl16.ckpt"])
def test_frozen_without_weights_never_makes_images(path):
    tokenizer = build(load=False, weights=path)
    for use in (lambda: tokenizer.encode_image(pictures()), lambda: tokenizer.decode(torch.zeros(1, 64, 4))):
        with pytest.raises(ValueError, match=rf"no weights yet .*{path or 'no file'}.*load_tokenizer_weights"):
            use()
    cached = torch.randn(2, 8, 8, 8)
    assert tokenizer({"raw": cached}).x.shape == (2, 64, 4)  # moments of a cache need no autoencoder


def test_weights_that_do_not_fit_are_an_error_that_changes_nothing():
    tokenizer = build(load=False)
    before = copy.deepcopy(tokenizer.vae.state_dict())
    state = {n: t + 1 for n, t in before.items()}
    state["extra"] = state.pop("quant_conv.bias")
    state["decoder.conv_in.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"^some\.ckpt .*missing \(quant_conv\.bias\).*extra.*decoder\.conv_in\.bias"):
        tokenizer.load_weights(state, origin="some.ckpt")
    assert not tokenizer.loaded
    assert all(torch.equal(t, before[n]) for n, t in tokenizer.vae.state_dict().items())


def test_scale_is_measured_and_never_assumed():
    tokenizer = build(latent_scale=None)
    raw = tokenizer.encode_image(pictures())
    for use in (lambda: tokenizer.encode_raw(raw), lambda: tokenizer.decode(torch.zeros(1, 64, 4))):
        with pytest.raises(ValueError, match=r"no latent_scale: make latents EXP=.* measures and prints it"):
            use()
    measured = latent_statistics(tokenizer, [{"image": pictures()}])
    assert measured.count == 2 * 4 * 64 and math.isfinite(measured.mean) and measured.std > 0


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_scale_must_be_positive_and_finite(scale):
    with pytest.raises(ValueError, match="latent_scale is"):
        build(latent_scale=scale)


def test_statistics_are_those_of_all_sampled_latents():
    tokenizer = build(latent_scale=None)
    batches = [{"raw": torch.randn(n, 8, 8, 8) * 2 + 100} for n in (3, 1)]
    measured = latent_statistics(tokenizer, batches, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    latents = torch.cat([tokenizer.latents(batch["raw"], generator) for batch in batches]).double()
    assert measured.mean == pytest.approx(latents.mean().item(), rel=1e-12)
    assert measured.std == pytest.approx(latents.std(correction=0).item(), rel=1e-9)
    with pytest.raises(ValueError, match="at least one batch"):
        latent_statistics(tokenizer, [])


@pytest.mark.parametrize(("size", "patch"), [(17, 1), (18, 2), (0, 1), (16, 0)])
def test_sizes_that_do_not_divide_are_an_error_naming_both(size, patch):
    with pytest.raises(ValueError, match=f"image_size {size} .*stride 2 times patch_size {patch}"):
        build(size, patch)


def test_images_and_cached_rows_of_another_size_are_errors():
    with pytest.raises(ValueError, match="images are 32x32, the tokenizer expects 16"):
        build().encode_image(pictures(32))
    with pytest.raises(ValueError, match=r"latents are \(4, 4, 4\), this tokenizer's are \(4, 8, 8\)"):
        build()({"raw": torch.randn(1, 8, 4, 4)})


def test_encoder_without_log_variance_is_an_error():
    with pytest.raises(ValueError, match="double_z True"):
        build(load=False, arch=ARCH | {"double_z": False})


def test_config_rebuilds_the_tokenizer():
    tokenizer = build(patch=2, latent_shift=0.1, weights="some.ckpt", frozen=False)
    again = as_tokenizer(tokenizer_config(tokenizer))
    assert isinstance(again, KLVAETokenizer) and again.init_args() == tokenizer.init_args()
    names = ("grid", "token_dim", "seq_len", "image_size", "frozen", "weights", "arch")
    assert [getattr(again, n) for n in names] == [getattr(tokenizer, n) for n in names]
