"""Training of tokenizers that give ids: the loss of both conventions, the entropy that keeps codes alive, their use."""

from contextlib import chdir

import pytest
import torch

from experiments import export, recipes
from experiments.main import cli
from layers.tokenizers.base import from_uint8
from layers.tokenizers.maskgit_vq import MaskGITVQTokenizer
from lightning_modules.autoencoder import AutoencoderModule
from lightning_modules.tokenizer_weights import load_tokenizer_weights
from tests.lightning_modules.test_autoencoder import ARCH, SIZE, build, gradients, pictures, vq_tokenizer
from tests.smoke import call, shrunken


def maskgit_tokenizer() -> MaskGITVQTokenizer:
    arch = {name: value for name, value in ARCH.items() if name != "encoder_attention"}
    return MaskGITVQTokenizer(SIZE, arch=arch, num_codes=16, frozen=False)


def test_vq_loss_and_straight_through_gradient():
    module = build(vq_tokenizer(), disc_weight=0.0, reduction="mean", commitment_weight=0.7, codebook_weight=0.2)
    images, vae = pictures(), module.tokenizer.vae
    found = module.losses(images, None)
    encoded = vae.encode(from_uint8(images))
    codes = vae.quantize.latents(vae.quantize.nearest(encoded), 8)
    torch.testing.assert_close(found["commitment"], (encoded - codes).square().mean())
    torch.testing.assert_close(found["codebook"], found["commitment"])
    torch.testing.assert_close(found["loss"], found["rec"] + 0.9 * found["commitment"])

    grads = gradients(found["loss"], module.tokenizer.vae)
    latents = codes.detach().requires_grad_()
    rec = (vae.decode(latents) - from_uint8(images)).abs().mean()
    (at_codes,) = torch.autograd.grad(rec, latents)
    at_encoder = at_codes + 0.7 * 2 * (encoded - codes).detach() / encoded.numel()
    expected = torch.autograd.grad(encoded, vae.quant_conv.weight, at_encoder, retain_graph=True)[0]
    torch.testing.assert_close(grads["quant_conv.weight"], expected, atol=1e-6, rtol=1e-4)
    (expected,) = torch.autograd.grad(0.2 * (encoded.detach() - codes).square().mean(), vae.quantize.embedding.weight)
    torch.testing.assert_close(grads["quantize.embedding.weight"], expected)


def test_entropy_joins_the_loss_with_its_weight():
    images, tokenizer = pictures(), maskgit_tokenizer()
    same = {"disc_weight": 0.0, "reduction": "mean"}
    plain = build(tokenizer, **same).losses(images, None)
    found = build(tokenizer, **same, entropy_weight=0.3, entropy_temperature=0.5).losses(images, None)
    encoded, codes = tokenizer.vae.encode(from_uint8(images)), tokenizer.vae.quantize.embedding.weight
    rows = encoded.permute(0, 2, 3, 1).reshape(-1, 1, 4)
    probs = (-(rows - codes).square().sum(-1) / 0.5).softmax(-1)
    expected = torch.special.entr(probs).sum(-1).mean() - torch.special.entr(probs.mean(0)).sum()
    torch.testing.assert_close(found["entropy"], expected, atol=1e-3, rtol=1e-3)  # the official 1e-5 in the logarithm
    torch.testing.assert_close(found["loss"], plain["loss"] + 0.3 * found["entropy"])
    assert "entropy" not in plain
    grads = gradients(found["entropy"], tokenizer.vae)
    assert grads["quantize.embedding.weight"].any(1).all(), "codes that no latent is nearest to, too"
    assert grads["encoder.conv_in.weight"].any()


def test_use_of_the_codebook_is_logged():
    module, images = build(maskgit_tokenizer(), disc_weight=0.0), pictures()
    ids = module.tokenizer.vae.quantize.nearest(module.encode(images))
    for found in (module.losses(images, None), module.eval().losses(images, None)):
        assert found["usage"].item() == pytest.approx(len(ids.unique()) / 16)
        shares = ids.flatten().bincount(minlength=16) / ids.numel()
        assert found["perplexity"].item() == pytest.approx(torch.special.entr(shares).sum().exp().item(), rel=1e-5)


@pytest.mark.parametrize("entropy_weight", [0.0, 0.1])
def test_ids_of_one_batch_are_learnt(entropy_weight):
    module = build(
        maskgit_tokenizer(),
        disc_weight=0.0,
        l1_weight=0.0,
        l2_weight=1.0,
        reduction="mean",
        commitment_weight=0.25,
        codebook_weight=1.0,
        entropy_weight=entropy_weight,
        entropy_temperature=0.1,
    )
    images = (pictures(8) // 128 * 255)[..., :1, :1].repeat(1, 1, SIZE, SIZE)  # one colour each
    optimizer, first = torch.optim.AdamW(module.parameters(), lr=5e-3), None
    for _ in range(40):
        found = module.losses(images, None)
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        first = first or found["rec"].item()
    assert found["rec"].item() < 0.3 * first


def test_reconstruction_takes_the_codes():
    module, images = build(maskgit_tokenizer(), disc_weight=0.0), pictures()
    vae = module.tokenizer.vae
    ids = vae.quantize.nearest(vae.encode(from_uint8(images)))
    torch.testing.assert_close(module.reconstruct(images), vae.decode(vae.quantize.latents(ids, 8)))


def test_what_was_trained_becomes_a_frozen_tokenizer(tmp_path):
    """Trained by a recipe, exported under the released names, read as the weights of a tokenizer."""
    with chdir(tmp_path):
        cli(["fit", "--exp", "vq_digits", *shrunken("vq_digits")])
        last = recipes.find_checkpoint("vq_digits", "last")
        call(export.main, "--exp", "vq_digits", "--ckpt", str(last), "--out", "vq.safetensors")
        trained = AutoencoderModule.load_from_checkpoint(last).tokenizer
        frozen = MaskGITVQTokenizer(**trained.init_args() | {"weights": "vq.safetensors", "frozen": True})
        load_tokenizer_weights(frozen)
    images = pictures()
    ids = frozen.encode_image(images)
    assert torch.equal(ids, trained.encode_image(images)) and torch.equal(frozen.decode(ids), trained.decode(ids))
