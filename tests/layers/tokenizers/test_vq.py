"""Discrete and continuous tokens of a vector-quantised autoencoder."""

import pytest
import torch

from layers.patch import patchify
from layers.tokenizers.vq import ContinuousVQTokenizer, VQTokenizer
from lightning_modules.config import as_tokenizer, tokenizer_config

ARCH = {
    "base_channels": 8,
    "multipliers": [1, 2],
    "num_res_blocks": 1,
    "z_channels": 4,
    "double_z": False,
    "resolution": 16,
    "encoder_attention": [8],
    "decoder_attention": [8],
    "norm_groups": 4,
}


def build(cls: type = VQTokenizer, **changes) -> VQTokenizer | ContinuousVQTokenizer:
    scale = {} if cls is VQTokenizer else {"latent_scale": 0.5, "latent_shift": 0.1}
    tokenizer = cls(16, **{"arch": ARCH, "num_codes": 32} | scale | changes)
    torch.nn.init.normal_(tokenizer.vae.quantize.embedding.weight)
    tokenizer.load_weights(tokenizer.vae.state_dict(), origin="itself")
    return tokenizer


def pictures(batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, 16, 16), dtype=torch.uint8)


def test_images_become_ids_and_ids_images():
    tokenizer = build()
    raw = tokenizer.encode_image(pictures())
    assert raw.shape == (2, tokenizer.seq_len) == (2, 64) and raw.dtype == torch.int64
    assert (tokenizer.vocab_size, tokenizer.token_dim, tokenizer.grid) == (32, 1, (8, 8))
    x, logdet = tokenizer.encode_raw(raw.to(torch.int32))  # a cache may be smaller
    assert torch.equal(x, raw) and x.dtype == torch.int64 and logdet is None
    codes = tokenizer.vae.quantize.embedding.weight[x].mT.unflatten(-1, (8, 8))
    torch.testing.assert_close(tokenizer.decode(x), tokenizer.vae.decode(codes))


@pytest.mark.parametrize("bad", [-1, 32])
def test_an_id_that_is_no_code_is_an_error(bad):
    with pytest.raises(ValueError, match=rf"ids lie in .*{bad}.* the codebook has 0\.\.31"):
        build().decode(torch.tensor([[bad, *[0] * 63]]))


@pytest.mark.parametrize(("quantize", "patch"), [(True, 1), (False, 1), (True, 2)])
def test_continuous_tokens_are_scaled_latents_before_quantisation(quantize, patch):
    tokenizer = build(ContinuousVQTokenizer, quantize_on_decode=quantize, patch_size=patch)
    raw = tokenizer.encode_image(pictures())
    assert raw.shape == (2, 4, 8, 8) and tokenizer.vocab_size is None
    x = tokenizer.encode_raw(raw).x
    torch.testing.assert_close(x, patchify((raw - 0.1) * 0.5, patch))
    book = tokenizer.vae.quantize
    seen = book.latents(book.nearest(raw), 8) if quantize else raw
    torch.testing.assert_close(tokenizer.decode(x), tokenizer.vae.decode(seen), atol=1e-5, rtol=1e-5)


def test_quantising_is_the_default_as_in_ldm():
    assert build(ContinuousVQTokenizer).quantize_on_decode


def test_both_kinds_see_the_same_latents():
    discrete, continuous = build(), build(ContinuousVQTokenizer)
    continuous.load_weights(discrete.vae.state_dict(), origin="the other")
    images = pictures()
    ids = continuous.vae.quantize.nearest(continuous.encode_image(images))
    assert torch.equal(ids, discrete.encode_image(images))


def test_codes_get_gradients_when_trained():
    tokenizer = VQTokenizer(16, arch=ARCH, num_codes=32, frozen=False)
    tokenizer.decode(tokenizer({"image": pictures()}).x).square().mean().backward()
    assert tokenizer.vae.quantize.embedding.weight.grad.any()


def test_frozen_without_weights_never_makes_images():
    tokenizer = VQTokenizer(16, arch=ARCH, num_codes=32)
    for use in (lambda: tokenizer.encode_image(pictures()), lambda: tokenizer.decode(torch.zeros(1, 64).long())):
        with pytest.raises(ValueError, match="VQTokenizer is frozen and has no weights yet"):
            use()


def test_released_names_and_sizes():
    with torch.device("meta"):
        tokenizer = VQTokenizer(256)
    state = tokenizer.vae.state_dict()
    assert state["quantize.embedding.weight"].shape == (16384, 8)
    assert state["quant_conv.weight"].shape == state["post_quant_conv.weight"].shape == (8, 8, 1, 1)
    assert state["encoder.conv_out.weight"].shape == (8, 512, 3, 3)
    assert {"encoder.down.4.attn.1.q.weight", "decoder.up.4.attn.2.q.weight"} <= set(state)
    assert tokenizer.seq_len == 256


def test_encoder_with_log_variance_is_an_error():
    with pytest.raises(ValueError, match="double_z False"):
        VQTokenizer(16, arch=ARCH | {"double_z": True})


@pytest.mark.parametrize("cls", [VQTokenizer, ContinuousVQTokenizer])
def test_config_rebuilds_the_tokenizer(cls):
    tokenizer = build(cls, weights="vq.ckpt")
    again = as_tokenizer(tokenizer_config(tokenizer))
    assert type(again) is cls and again.init_args() == tokenizer.init_args()
