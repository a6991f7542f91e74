"""A tokenizer at half the size: its grid, its weights, and pictures of four pixels made one."""

import pytest
import torch

from layers.conv_autoencoder import AutoencoderConfig
from layers.tokenizers.half import half_size, halved
from layers.tokenizers.kl_vae import KLVAETokenizer
from layers.tokenizers.pixels import PixelTokenizer

SMALL = AutoencoderConfig(base_channels=8, multipliers=(1, 1), num_res_blocks=1, z_channels=4, norm_groups=4)


def test_pixels_at_half_the_size_are_those_of_a_smaller_tokenizer():
    tokenizer = PixelTokenizer(16, 4)
    coarse, images = half_size(tokenizer), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert coarse.grid == (2, 2) and coarse.seq_len == 4 and tokenizer.grid == (4, 4)
    small = {"image": halved(images)}
    x = coarse(small).x
    assert torch.equal(x, PixelTokenizer(8, 4)(small).x) and coarse.decode(x).shape == (2, 3, 8, 8)


def test_latents_at_half_the_size_have_the_same_weights():
    tokenizer = KLVAETokenizer(16, 2, arch=SMALL, latent_scale=0.5, frozen=False)
    coarse = half_size(tokenizer)
    assert coarse.vae is tokenizer.vae and coarse.latent_size == 4 and coarse.grid == (2, 2)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    alone = KLVAETokenizer(8, 2, arch=SMALL, latent_scale=0.5, frozen=False)
    alone.vae.load_state_dict(tokenizer.vae.state_dict())
    found, expected = (t({"image": images}, torch.Generator().manual_seed(0)).x for t in (coarse, alone))
    assert torch.equal(found, expected)


def test_four_pixels_become_their_mean():
    image = torch.tensor([[0, 10], [20, 31]], dtype=torch.uint8).expand(1, 3, 2, 2)
    assert halved(image).flatten().tolist() == [15] * 3 and halved(image).dtype == torch.uint8


def test_an_odd_grid_has_no_half():
    with pytest.raises(ValueError, match="3x3, which has no half"):
        half_size(PixelTokenizer(12, 4))
