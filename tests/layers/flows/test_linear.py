"""Linear maps in a flow's place: golden values of the official PCA, inverses, volumes, and a fit."""

import math
import re

import pytest
import torch
from einops import rearrange
from torch import Tensor

from layers.flows.linear import PCA, LearnedLinear
from layers.patch import patchify, unpatchify
from tests.golden_cases import Golden, case_id, golden_paths, read_json

GOLDEN_CASES = pytest.mark.parametrize("path", golden_paths("jetformer", "**/patch_pca*.safetensors"), ids=case_id)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


# Golden


@GOLDEN_CASES
@torch.no_grad()
def test_golden_pca_and_learned_linear(path):
    patch = read_json(path.with_suffix(".json"))["patch"]
    with Golden(path) as g:
        images = rearrange(g["in/image"], "b h w c -> b c h w")
        for name in g.names():
            if match := re.fullmatch(r"out/whiten([01])_depth(\d+)/codes", name):
                pca = official_pca(g, whiten=match[1] == "1", depth_to_seq=int(match[2]))
                check_codes(pca, images, patch, g[name], g[name.replace("codes", "decoded")])
            elif match := re.fullmatch(r"out/logvar_noise_std_([\d.]+)", name):
                check_noise(official_pca(g, noise_std=float(match[1])), g[name])
        check_volume(g, patchify(images, patch))
        check_learned(g)


def official_pca(g: Golden, **options) -> PCA:
    components = g["in/components"]
    pca = PCA(components.shape[1], num_components=len(components), **options)
    names = ("mean", "components", "explained_variance")
    pca.load_state_dict({name: g[f"in/{name}"] for name in names})
    return pca


def check_codes(pca: PCA, images: Tensor, patch: int, codes: Tensor, decoded: Tensor) -> None:
    grid = tuple(side // patch for side in images.shape[2:])
    close(pca.encode(patchify(images, patch)), codes)
    close(unpatchify(pca.decode(codes), patch, grid).clamp(-1, 1), rearrange(decoded, "b h w c -> b c h w"))


def check_noise(pca: PCA, logvar: Tensor) -> None:
    normal, codes = torch.randn(1, *logvar.shape[1:]), torch.zeros(1, *logvar.shape[1:])
    close(pca.noised(codes, lambda shape: normal), torch.exp(0.5 * logvar) * normal)


def check_volume(g: Golden, patches: Tensor) -> None:
    pca = official_pca(g)
    if len(pca.components) == patches.shape[-1]:
        codes, logdet = pca(patches)
        torch.testing.assert_close(logdet, g["derived/logdet_per_image_whiten"].expand(len(patches)))
        close(pca.inverse(codes)[0], patches)


def check_learned(g: Golden) -> None:
    x = g["learned_linear/in/patches"]
    linear = LearnedLinear(x.shape[-1])
    linear.weight.copy_(g["learned_linear/in/W"])
    y, logdet = linear(x)
    close(y, g["learned_linear/out/tokens"])
    torch.testing.assert_close(logdet, g["learned_linear/out/logdet_per_image"].expand(len(x)))


# Both


def maps() -> dict[str, torch.nn.Module]:
    linear = LearnedLinear(6)
    torch.nn.init.normal_(linear.weight)
    whitened, turned = PCA(6, depth_to_seq=2), PCA(6, whiten=False)
    for pca in (whitened, turned):
        pca.fit([torch.randn(50, 6) @ torch.randn(6, 6)])
    return {"learned": linear, "whitened": whitened, "turned": turned}


@pytest.mark.parametrize("name", maps())
def test_inverse_and_volume(name):
    flow, x = maps()[name].double().requires_grad_(False), torch.randn(2, 3, 6, dtype=torch.float64)
    y, logdet = flow(x)
    back, minus = flow.inverse(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -logdet)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v)[0], x[:1]).view(18, 18)
    torch.testing.assert_close(logdet, torch.linalg.slogdet(jacobian).logabsdet.expand(2))


@pytest.mark.parametrize("name", maps())
@torch.no_grad()
def test_autocast_does_not_reach_them(name):
    flow, x = maps()[name], torch.randn(2, 3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = flow(x)
        back, _ = flow.inverse(y)
    assert y.dtype == torch.float32 and torch.equal(y, flow(x)[0])
    torch.testing.assert_close(back, x, atol=1e-4, rtol=1e-4)


# Learned


def test_learned_map_is_the_identity_at_first_and_learns_the_likelihood_of_a_gaussian():
    """The optimum whitens the data, and its volume is then known: -ln of the data's deviations."""
    linear, x = LearnedLinear(2), torch.randn(500, 1, 2) * torch.tensor([0.2, 3.0])
    assert torch.equal(linear(x)[0], x) and linear(x)[1].abs().max() == 0
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.1)
    for _ in range(200):
        y, logdet = linear(x)
        optimizer.zero_grad()
        (0.5 * y.square().sum((1, 2)) - logdet).mean().backward()
        optimizer.step()
    expected = -0.5 * torch.logdet(torch.cov(x[:, 0].T, correction=0))
    assert logdet[0].item() == pytest.approx(expected.item(), abs=0.05)


# PCA


def test_fit_finds_mean_directions_and_variances():
    torch.manual_seed(1)
    turn = torch.linalg.qr(torch.randn(4, 4)).Q
    data = torch.randn(2000, 5, 4) * torch.tensor([0.1, 3.0, 1.0, 0.3]) @ turn + 2
    pca = PCA(4)
    pca.fit(data.split(300))
    flat = data.flatten(0, 1).double()
    torch.testing.assert_close(pca.mean.double(), flat.mean(0), atol=1e-5, rtol=1e-5)
    cov = torch.cov(flat.T)
    rebuilt = pca.components.T @ torch.diag(pca.explained_variance) @ pca.components
    torch.testing.assert_close(rebuilt.double(), cov, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(4), atol=1e-5, rtol=0)
    assert pca.explained_variance.tolist() == sorted(pca.explained_variance.tolist(), reverse=True)
    assert (pca.components.gather(1, pca.components.abs().argmax(1, keepdim=True)) > 0).all()
    codes, _ = pca(data)
    torch.testing.assert_close(torch.cov(codes.flatten(0, 1).T), torch.eye(4), atol=1e-3, rtol=0)


def test_bits_after_pca_are_those_of_the_gaussian_with_the_datas_moments():
    data = torch.randn(4000, 1, 3) * torch.tensor([0.5, 2.0, 1.0])
    pca = PCA(3)
    pca.fit([data])
    codes, logdet = pca(data)
    nats = (0.5 * codes.square() + 0.5 * math.log(2 * math.pi)).sum((1, 2)) - logdet
    gaussian = torch.distributions.MultivariateNormal(data.mean((0, 1)), torch.cov(data[:, 0].T))
    torch.testing.assert_close(nats, -gaussian.log_prob(data[:, 0]), atol=1e-3, rtol=1e-4)


def test_components_without_variance_stay_finite():
    pca = PCA(3)
    pca.fit([torch.randn(20, 3) * torch.tensor([1.0, 1.0, 0.0])])
    codes, logdet = pca(torch.zeros(1, 2, 3))
    assert codes.isfinite().all() and logdet.isfinite().all()


def test_fewer_components_are_codes_without_a_density():
    pca, x = PCA(4, num_components=2), torch.randn(1, 3, 4)
    pca.fit([torch.randn(30, 4)])
    assert pca.encode(x).shape == (1, 3, 2) and pca.decode(pca.encode(x)).shape == x.shape
    with pytest.raises(ValueError, match="2 of 4 components were kept"):
        pca(x)


def test_refusals():
    with pytest.raises(ValueError, match="num_components is 5: it must be at most 4"):
        PCA(4, num_components=5)
    with pytest.raises(ValueError, match=r"num_components is 4: .* multiple of depth_to_seq 3"):
        PCA(4, depth_to_seq=3)
    with pytest.raises(ValueError, match="need two tokens or more, not 1"):
        PCA(4).fit([torch.randn(1, 4)])
