"""Gaussian-mixture head: likelihood by chunks, sampling that computes one component, guidance, the symmetry trap."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import LiveBytes
from layers.heads.gmm import GMMHead
from layers.samplers import gmm_cfg
from tests.layers.heads.oracles import randomise

R, D, E, K = 60, 3, 6, 4
NOTHING = torch.empty(0)
KINDS = [("diagonal", K), ("per_channel", K), ("per_channel", 1), ("full", 1)]
every_kind = pytest.mark.parametrize(("kind", "num_mixtures"), KINDS)
mixtures = pytest.mark.parametrize("kind", ["diagonal", "per_channel"])


def head_of(kind: str = "diagonal", num_mixtures: int = K, **options) -> GMMHead:
    return randomise(GMMHead(D, E, num_mixtures=num_mixtures, kind=kind, **options), std=1.0)


def noise_of(head: GMMHead, rows: int = R, solver: str = "closed_form") -> Tensor:
    count, dim = head.noise_shape(1, solver)
    return torch.randn(count, rows, dim)


# Likelihood


@every_kind
@pytest.mark.parametrize("scale", ["squareplus", "softplus"])
def test_nll_by_chunks_is_the_plain_form(kind, num_mixtures, scale):
    head = head_of(kind, num_mixtures, scale=scale)
    z, x = torch.randn(2, R // 2, E, requires_grad=True), torch.randn(2, R // 2, D, requires_grad=True)
    tensors = [z, x, *head.parameters()]
    plain, chunked = -head.log_prob(z, x), head.nll(z, x, chunk=7)
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-5)
    expected, found = (torch.autograd.grad(v.square().sum(), tensors) for v in (plain, chunked))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@every_kind
def test_loss_is_the_likelihood_per_token_or_channel(kind, num_mixtures):
    head, x, z = head_of(kind, num_mixtures), torch.randn(R, D), torch.randn(R, E)
    terms = head(x, z, NOTHING, NOTHING)
    torch.testing.assert_close(terms["nll"], -head.log_prob(z, x)[None])
    torch.testing.assert_close(terms["loss"], terms["nll"] / (D if kind == "per_channel" else 1))


@pytest.mark.parametrize(("kind", "num_mixtures"), KINDS[:3])
def test_zero_init_is_the_standard_normal(kind, num_mixtures):
    """The first loss is d/2 log 2 pi + |x|^2 / 2 per token."""
    head, x = GMMHead(D, E, num_mixtures=num_mixtures, kind=kind, init="zero"), torch.randn(R, D)
    expected = 0.5 * D * math.log(2 * math.pi) + 0.5 * x.square().sum(-1)
    torch.testing.assert_close(head.nll(torch.randn(R, E), x), expected)


def test_densities_integrate_to_one():
    grid = torch.linspace(-40, 40, 40_001)
    for kind in ("diagonal", "per_channel"):
        head = randomise(GMMHead(1, E, num_mixtures=K, kind=kind), std=1.0)
        mass = head.log_prob(torch.randn(E).expand(len(grid), E), grid[:, None]).exp().sum() * 80 / 40_000
        assert abs(mass.item() - 1) < 1e-4


def peak(head: GMMHead, rows: int, chunk: int) -> int:
    z, x = torch.randn(rows, E, requires_grad=True), torch.randn(rows, D, requires_grad=True)
    for parameter in head.parameters():
        parameter.grad = None
    with LiveBytes() as meter:
        head.nll(z, x, chunk=chunk).sum().backward()
    return meter.peak


@pytest.mark.parametrize(("kind", "num_mixtures"), [("diagonal", 16), ("per_channel", 16), ("full", 1)])
def test_memory_of_the_likelihood_grows_by_the_gradients_of_rows_alone(kind, num_mixtures):
    head, rows, chunk = head_of(kind, num_mixtures), 256, 32
    assert peak(head, 2 * rows, chunk) - peak(head, rows, chunk) <= rows * (E + D + 1) * 4
    assert peak(head, 2 * rows, 2 * rows) - peak(head, rows, rows) > rows * 2 * len(head.linear.bias) * 4  # plain


def test_the_products_precision_is_the_heads_not_autocasts():
    head, x, z = head_of(), torch.randn(R, D), torch.randn(R, E)
    half = GMMHead(D, E, num_mixtures=K, dtype="bfloat16")
    half.load_state_dict(head.state_dict())
    expected = head.nll(z, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head.nll(z, x), expected)
        rounded = half.nll(z, x)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, expected)
    outputs = torch.nn.functional.linear(z.bfloat16(), *(p.bfloat16() for p in half.parameters()))
    assert torch.equal(half.distribution(z).logits, outputs[:, :K].float())


# Sampling


def plain_sample(
    head: GMMHead, z: Tensor, noise: Tensor, uncond: Tensor | None, cfg_scale: float, **settings
) -> Tensor:
    """From the whole mixtures."""
    mixture = head.distribution(z).tempered(settings["temperature"], settings["inv_temperature"])
    if settings["top_p"] is not None:
        mixture = mixture.truncated(settings["top_p"])
    u, eps = torch.special.ndtr(noise[0, :, :-D].double()), noise[0, :, -D:]
    component = mixture.component(u[..., 0] if head.kind == "diagonal" else u)
    cond = mixture.gaussian(component)
    if uncond is None:
        return cond.sample(eps, clip=settings["clip_sigmas"])
    other = head.distribution(uncond).tempered(settings["temperature"]).gaussian(component)
    eps = eps if settings["clip_sigmas"] is None else eps.clamp(-settings["clip_sigmas"], settings["clip_sigmas"])
    return gmm_cfg.guided_closed_form(*cond, *other, cfg_scale - 1, eps)


@mixtures
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("top_p", "clip_sigmas"), [(None, None), (0.6, 1.0)])
def test_lazy_sampling_is_sampling_from_the_whole_mixture(kind, guided, top_p, clip_sigmas):
    head, z, uncond = head_of(kind), torch.randn(R, E), torch.randn(R, E) if guided else None
    noise, settings = noise_of(head), {"temperature": 0.9, "inv_temperature": 1.3, "top_p": top_p}
    settings["clip_sigmas"] = clip_sigmas
    found = head.sample(z, noise, uncond=uncond, cfg_scale=1.5, **settings)
    torch.testing.assert_close(found, plain_sample(head, z, noise, uncond, 1.5, **settings), rtol=1e-4, atol=1e-5)


@mixtures
@pytest.mark.parametrize("branches", [1, 2])
def test_sampling_computes_the_drawn_components_outputs_and_no_others(kind, branches):
    """Products: K logits (per choice) of the conditional rows, then 2D outputs of each row of each branch."""
    head = GMMHead(D, E, num_mixtures=64, kind=kind)
    z, choices = torch.randn(R, E), 1 if kind == "diagonal" else D
    uncond = torch.randn(R, E) if branches == 2 else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        head.sample(z, noise_of(head), uncond=uncond, cfg_scale=2.0)
    assert counter.get_total_flops() == 2 * R * E * (choices * 64 + branches * 2 * D)
    whole = 2 * branches * R * E * len(head.linear.bias)
    assert counter.get_total_flops() < whole / (2 if kind == "per_channel" else 5)


@mixtures
def test_tokens_follow_the_density(kind):
    """Each channel's distribution function is the mixture's, and the log-probability is the density's."""
    rows, head = 20_000, head_of(kind)
    z = torch.randn(E).expand(rows, E)
    drawn, log_prob = head.sample_with_log_prob(z, noise_of(head, rows))
    torch.testing.assert_close(log_prob, head.log_prob(z, drawn))
    grid = torch.linspace(-30, 30, 6001)[:, None].expand(-1, D)
    mixture = head.distribution(z[: len(grid)])
    weights, components = mixture.logits.softmax(-1), torch.distributions.Normal(mixture.loc, mixture.scale)
    if kind == "diagonal":
        cdf = (weights[..., None] * components.cdf(grid[:, None])).sum(-2)
    else:
        cdf = (weights * components.cdf(grid[..., None])).sum(-1)
    empirical = torch.stack([(drawn <= point).float().mean(0) for point in grid[::60]])
    assert (empirical - cdf[::60]).abs().max() < 1.8 / math.sqrt(rows)  # Kolmogorov's, once in 300 times per channel


@every_kind
def test_log_probability_is_of_the_tempered_mixture(kind, num_mixtures):
    head, z = head_of(kind, num_mixtures), torch.randn(R, E)
    tokens, log_prob = head.sample_with_log_prob(z, noise_of(head), temperature=0.8, inv_temperature=1.5)
    expected = head.distribution(z).tempered(0.8, 1.5).log_prob(tokens)
    torch.testing.assert_close(log_prob, expected.sum(-1) if kind == "per_channel" else expected)


@mixtures
@pytest.mark.parametrize("solver", GMMHead.SOLVERS)
def test_guided_log_probability_is_the_sum_over_channels_of_the_product(kind, solver):
    """At one component, where nothing hides which one was drawn."""
    head, z, uncond = head_of(kind, 1), torch.randn(R, E), torch.randn(R, E)
    settings = {"uncond": uncond, "cfg_scale": 1.4, "temperature": 0.9, "solver": solver}
    noise = noise_of(head, solver=solver)
    tokens, log_prob = head.sample_with_log_prob(z, noise, **settings)
    assert torch.equal(tokens, head.sample(z, noise, **settings))
    cond, other = (head.distribution(rows).tempered(0.9).log_prob(tokens) for rows in (z, uncond))
    guided = 1.4 * cond - 0.4 * other
    torch.testing.assert_close(log_prob, guided.sum(-1) if kind == "per_channel" else guided, rtol=1e-4, atol=1e-4)


@mixtures
def test_guidance_by_either_solver_draws_the_same_law(kind):
    """Two-sample test per channel, over rows of one condition: means within four of their standard errors."""
    head, rows = GMMHead(D, E, num_mixtures=K, kind=kind), 400
    z, uncond = (torch.randn(E).expand(rows, E) for _ in range(2))
    closed, rejected = (
        head.sample(z, noise_of(head, rows, solver), uncond=uncond, cfg_scale=2.0, solver=solver)
        for solver in GMMHead.SOLVERS
    )
    plain = head.sample(z, noise_of(head, rows))
    error = (closed.var(0) / rows + rejected.var(0) / rows).sqrt()
    assert ((closed.mean(0) - rejected.mean(0)) / error).abs().max() < 4
    assert (closed.std(0) / rejected.std(0) - 1).abs().max() < 4 / math.sqrt(rows)
    assert closed.shape == plain.shape == (rows, D)


@mixtures
def test_guidance_that_is_off_draws_from_the_condition(kind):
    head, z, uncond = head_of(kind), torch.randn(R, E), torch.randn(R, E)
    noise = noise_of(head)
    plain = head.sample(z, noise)
    assert torch.equal(head.sample(z, noise, uncond=uncond, cfg_scale=1.0), plain)
    torch.testing.assert_close(head.sample(z, noise, uncond=uncond, cfg_scale=torch.tensor(1.0)), plain)
    scales = torch.linspace(0, 3, R)[:, None]
    for row, scale in ((0, 0.0), (R - 1, 3.0)):
        alone = head.sample(z, noise, uncond=uncond, cfg_scale=scale)[row]
        torch.testing.assert_close(head.sample(z, noise, uncond=uncond, cfg_scale=scales)[row], alone)


def test_a_row_does_not_depend_on_its_batch():
    head, z, uncond = head_of(), torch.randn(R, E), torch.randn(R, E)
    noise = noise_of(head)
    whole = head.sample(z, noise, uncond=uncond, cfg_scale=1.5)
    part = head.sample(z[7:9], noise[:, 7:9], uncond=uncond[7:9], cfg_scale=1.5)
    torch.testing.assert_close(part, whole[7:9])


# The symmetry trap


def train_on_modes(init: str, steps: int = 300) -> tuple[GMMHead, float]:
    """A head alone on four equally likely modes at (+-2, +-2) with sigma 0.2, and its last losses' mean."""
    head = GMMHead(2, 1, num_mixtures=4, init=init)
    optimizer, z, losses = torch.optim.Adam(head.parameters(), lr=2e-2, betas=(0.9, 0.95)), torch.ones(64, 1), []
    for _ in range(steps):
        x = 4 * torch.randint(2, (64, 2)) - 2 + 0.2 * torch.randn(64, 2)
        loss = head.nll(z, x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return head, sum(losses[-50:]) / 50


SINGLE_GAUSSIAN = math.log(2 * math.pi * math.e * 4.04)  # entropy, variance 4 + 0.2^2 per channel: 4.23
OPTIMUM = math.log(4) + math.log(2 * math.pi * math.e * 0.04)  # 1.01


def test_zero_init_never_leaves_the_single_gaussian():
    head, loss = train_on_modes("zero")
    assert abs(loss - SINGLE_GAUSSIAN) < 0.1
    assert head.usage(torch.ones(1, 1))["component_spread"] < 0.1


def test_spread_init_leaves_it():
    """For three modes at least: one component over two of them (1.83) is a stop on the way, as for any such fit."""
    head, loss = train_on_modes("spread")
    assert OPTIMUM - 0.1 < loss < SINGLE_GAUSSIAN - 2
    usage = head.usage(torch.ones(1, 1))
    assert usage["component_spread"] > 1 and usage["component_entropy"] > math.log(2)
    assert 0.1 < usage["min_scale"] < 0.3


@mixtures
def test_equal_components_have_equal_gradients(kind):
    """Why they stay equal: nothing but rounding tells them apart."""
    head = GMMHead(D, E, num_mixtures=K, kind=kind, init="zero")
    head.nll(torch.randn(R, E), torch.randn(R, D)).mean().backward()
    grad = head._parse(head.linear.bias.grad)
    axis = -2 if kind == "diagonal" else -1
    assert grad.loc.abs().max() > 1e-3 and grad.loc.std(axis).max() < 1e-6


@mixtures
def test_spread_init_starts_near_the_standard_normal_with_components_apart(kind):
    head, z = GMMHead(D, E, num_mixtures=64, kind=kind), torch.randn(R, E)
    mixture = head.distribution(z)
    assert (mixture.scale - 1).abs().max() < 0.2 and mixture.logits.abs().max() < 0.3
    usage = head.usage(z)
    assert 0.35 < usage["component_spread"] < 0.65 and usage["component_entropy"] > 0.99 * math.log(64)


@every_kind
def test_usage_looks_at_some_rows_only(kind, num_mixtures, monkeypatch):
    monkeypatch.setattr("layers.heads.gmm.USAGE_ROWS", 8)
    head, z = head_of(kind, num_mixtures), torch.randn(3, 9, E, requires_grad=True)
    usage = head.usage(z)
    assert all(v.ndim == 0 and not v.requires_grad for v in usage.values())
    expected = head.usage(z.flatten(0, 1)[::4])
    assert usage == expected and ("component_spread" in usage) == (kind != "full")


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_mixtures": 0}, "num_mixtures is 0"),
        ({"num_mixtures": 2, "kind": "full"}, "num_mixtures is 2, but kind 'full' is one Gaussian"),
        ({"num_mixtures": 2, "kind": "ful"}, "kind is 'ful': use diagonal, per_channel, full"),
        ({"num_mixtures": 2, "scale": "exp"}, "scale is 'exp': use squareplus, softplus"),
        ({"num_mixtures": 2, "init": "xavier"}, "init is 'xavier': use spread, zero"),
        ({"num_mixtures": 2, "dtype": "float16"}, "dtype is 'float16': use float32, bfloat16"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GMMHead(D, E, **options)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("full", {"cfg_scale": 1.4}, r"cfg_scale is 1\.4, but guidance .* kind 'full' does not have"),
        ("diagonal", {"solver": "resampling"}, "solver is 'resampling', but GMMHead has closed_form, rejection"),
        ("diagonal", {"num_steps": 5}, "num_steps is 5"),
        ("diagonal", {"temperature": 0.0}, r"temperature is 0\.0"),
        ("diagonal", {"inv_temperature": -1.0}, r"inv_temperature is -1\.0"),
        ("diagonal", {"top_p": 0.0}, r"top_p is 0\.0"),
        ("full", {"cfg_scale": 1.0, "top_p": 0.9}, r"top_p is 0\.9, but there is one component"),
        ("diagonal", {"clip_sigmas": 0.0}, r"clip_sigmas is 0\.0"),
        ("diagonal", {"clip_sigmas": 2.0, "solver": "rejection"}, r"clip_sigmas is 2\.0, but .* 'rejection'"),
    ],
)
def test_wrong_settings_are_named(kind, settings, message):
    head, z = head_of(kind, 1 if kind == "full" else K), torch.randn(R, E)
    noise = noise_of(head, solver="rejection" if settings.get("solver") == "rejection" else "closed_form")
    with pytest.raises(ValueError, match=message):
        head.sample(z, noise, **{"uncond": z, "cfg_scale": 2.0} | settings)
