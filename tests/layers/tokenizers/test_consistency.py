"""The consistency decoder's wiring, against its published equations and a network made here."""

import math

import pytest
import torch
from torch import Tensor, nn

from layers.tokenizers import consistency
from layers.tokenizers.consistency import ConsistencyTokenizer, consistency_decode, signal_power, timestep_of
from lightning_modules.config import as_tokenizer, tokenizer_config

ARCH = {
    "base_channels": 4,
    "multipliers": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "z_channels": 4,
    "encoder_attention": [],
    "norm_groups": 2,
}


class Network(nn.Module):
    """Any function of all three inputs, called as the published file is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(7, 6, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        features = nn.functional.interpolate(features, scale_factor=8.0, mode="nearest")
        return self.conv(torch.cat([x, features], dim=1)) * (t.float() / 1024).view(-1, 1, 1, 1)


def build(size: int = 32, **changes) -> ConsistencyTokenizer:
    return ConsistencyTokenizer(size, **{"arch": ARCH, "latent_scale": 0.5, "decoder": "decoder.pt"} | changes)


def published(network: nn.Module, latents: Tensor, noise: list[Tensor]) -> Tensor:
    """The published sampler, step by step in float64: tables of 1024 betas, distilled steps of 16."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - alpha_bar((i + 1) / 1024) / alpha_bar(i / 1024), 0.999) for i in range(1024)]
    cumulative = (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)
    sigmas = (1 / cumulative - 1).sqrt()
    mean = torch.tensor([0.38862467, 0.02253063, 0.07381133, -0.0171294]).view(1, 4, 1, 1)
    std = torch.tensor([0.9654121, 1.0440036, 0.76147926, 0.77022034]).view(1, 4, 1, 1)
    features = (latents * 0.18215 - mean) / std
    x = torch.zeros(())
    for t, unit in zip((1008, 512), noise, strict=True):
        sigma, power = sigmas[t], cumulative[t]
        x = power.sqrt().float() * x + (1 - power).sqrt().float() * unit
        scaled = ((1 / power).sqrt() / (sigma**2 + 0.25).sqrt()).float() * x
        output = network(scaled, torch.full((len(latents),), t), features=features)[:, :3]
        skip = ((1 / power).sqrt() * 0.25 / (sigma**2 + 0.25)).float()
        x = ((sigma * 0.5 / (sigma**2 + 0.25).sqrt()).float() * output + skip * x).clamp(-1, 1)
    return x


def test_images_are_those_of_the_published_sampler():
    network, latents = Network(), torch.randn(2, 4, 3, 3) * 5
    noise = [torch.randn(2, 3, 24, 24) for _ in range(2)]
    with torch.no_grad():
        images, expected = consistency_decode(network, latents, noise), published(network, latents, noise)
    assert (expected.abs() < 1).float().mean() > 0.01  # not all of it is clamped
    torch.testing.assert_close(images, expected, atol=2e-5, rtol=0)


def test_default_schedule_has_the_published_timesteps():
    assert [timestep_of(position) for position in consistency.SCHEDULE] == [1008, 512]
    assert [timestep_of(0.0), timestep_of(15 / 1023), timestep_of(16 / 1023)] == [16, 16, 32]


def test_signal_vanishes_towards_noise():
    powers = [signal_power(t) for t in range(1023)]
    assert powers == sorted(powers, reverse=True) and powers[0] > 0.999 and powers[-1] < 1e-5


def test_tokenizer_decodes_the_unscaled_latent():
    tokenizer, latents = build(), torch.randn(2, 4, 4, 4)
    tokenizer.set_network(Network())
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    images = tokenizer.decode(tokenizer.to_tokens(latents), generators[0])
    noise = [torch.randn(2, 3, 32, 32, generator=generators[1]) for _ in range(2)]
    torch.testing.assert_close(images, consistency_decode(tokenizer.network, latents, noise), atol=1e-5, rtol=0)
    assert images.shape == (2, 3, 32, 32) and images.abs().max() <= 1


def test_an_image_does_not_depend_on_its_batch_or_on_the_call():
    tokenizer, x = build(), torch.randn(3, 4, 16)
    tokenizer.set_network(Network())
    images = tokenizer.decode(x)
    torch.testing.assert_close(tokenizer.decode(x[1:2]), images[1:2])
    assert torch.equal(tokenizer.decode(x), images)
    tokenizer.noise_seed = 1
    assert not torch.equal(tokenizer.decode(x), images)


def test_without_its_network_it_is_an_error_that_names_the_file():
    with pytest.raises(ValueError, match=r"'decoder\.pt' was not loaded"):
        build().decode(torch.zeros(1, 4, 16))


def test_network_is_frozen():
    tokenizer = build()
    tokenizer.set_network(Network())
    assert tokenizer.train().frozen and not tokenizer.network.training
    assert not any(p.requires_grad for p in tokenizer.parameters())


@pytest.mark.parametrize("arch", [ARCH | {"z_channels": 3}, ARCH | {"multipliers": [1, 1, 1]}])
def test_another_autoencoder_than_kl8_is_an_error(arch):
    with pytest.raises(ValueError, match="made for 4 latent channels and stride 8"):
        build(arch=arch)


def test_kl8_gives_256_tokens_of_16():
    with torch.device("meta"):
        tokenizer = ConsistencyTokenizer(256, decoder="decoder.pt")
    assert (tokenizer.seq_len, tokenizer.token_dim) == (256, 16)


def test_config_rebuilds_the_tokenizer():
    tokenizer = build(decoder_sha256="ab", noise_seed=3, weights="kl8.ckpt")
    again = as_tokenizer(tokenizer_config(tokenizer))
    assert type(again) is ConsistencyTokenizer and again.init_args() == tokenizer.init_args()
