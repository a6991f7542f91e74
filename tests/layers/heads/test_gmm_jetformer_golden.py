"""Mixtures of a thousand components, their gradients in chunks, and guidance, against the official JetFormer code.

Cases are discovered; sizes, rows and temperatures come from the json and the arrays' names. Tolerances are those of the
golden README, which gives them by row.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from layers.heads.gmm import GMMHead
from layers.heads.mixtures import SCALE_MIN, DiagonalMixture, Gaussian, squareplus
from layers.samplers.gmm_cfg import (
    envelope,
    guided_closed_form,
    guided_log_density,
    guided_rejection,
    normal_log_prob,
    product,
    proposal_scale,
)
from tests.golden_cases import Golden, case_id, golden_paths, read_json

# atol of a row's log-probability in float32: its scales are near the floor, or its value is -2e6
LOOSE_ROWS = {"narrow_scales": 0.02, "x_far_away": 1.0}
DECIDED = 1e-3  # log margin above which a decision of the rejection rule must be the official one
CHUNKS = (None, 3)  # rows at a time: all, and a few


def golden(name: str):
    """Parametrise over every file whose name begins so, at any depth."""
    return pytest.mark.parametrize("path", golden_paths("jetformer", f"**/{name}*.safetensors"), ids=case_id)


def close(actual: Tensor, expected: Tensor, *, atol: float = 2e-5, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=atol, rtol=rtol)


def check_rows(actual: Tensor, expected: Tensor) -> None:
    """Gradients, row by row: (R, ...)."""
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= 1e-4 * e.abs().max() + 1e-5


def head_of(logits: Tensor, config: dict) -> tuple[GMMHead, Tensor]:
    """A head whose outputs for the rows of an identity matrix are the recorded ones (R, P), and that matrix."""
    sizes = {"num_mixtures": config["num_mixtures"], "scale_min": config.get("scale_tol", SCALE_MIN)}
    head = GMMHead(config["out_dim"], len(logits), init="zero", **sizes)
    with torch.no_grad():
        head.linear.weight.copy_(logits.T)
    return head, torch.eye(len(logits))


def exact_mixture(logits: Tensor, config: dict) -> DiagonalMixture:
    """In float64, where square-plus loses nothing."""
    count, dim = config["num_mixtures"], config["out_dim"]
    weights, rest = logits.double().split([count, 2 * count * dim], dim=-1)
    loc, raw = rest.unflatten(-1, (count, 2, dim)).unbind(-2)
    return DiagonalMixture(weights, loc, squareplus(raw).clamp_min(config.get("scale_tol", SCALE_MIN)))


def gradients(logits: Tensor, x: Tensor, config: dict, chunk: int | None) -> tuple[Tensor, Tensor]:
    """Of the sum of log p in the outputs (R, P) and in x, by the head."""
    (head, h), x = head_of(logits, config), x.clone().requires_grad_()
    grad_weight, grad_x = torch.autograd.grad(-head.nll(h, x, chunk=chunk).sum(), (head.linear.weight, x))
    return grad_weight.T, grad_x


@golden("gmm_")
def test_golden_densities(path: Path):
    config = read_json(path.with_suffix(".json"))
    with Golden(path) as g:
        logits, x = g["in/logits"].flatten(0, -2), g["in/x"].flatten(0, -2)
        (head, h), exact = head_of(logits, config), exact_mixture(logits, config)
        mixture = head.distribution(h)
        assert torch.equal(mixture.logits, logits[:, : config["num_mixtures"]])
        close(exact.log_prob(x.double()), g["out/log_prob_float64_exact"].flatten(), atol=1e-6, rtol=1e-6)
        loose = [LOOSE_ROWS.get(next((n for n in LOOSE_ROWS if n in row), ""), 1e-3) for row in rows_of(config, x)]
        for name in (n for n in g.names() if n.startswith("out/log_prob") and "exact" not in n):
            tempered = mixture.tempered(*(number(name, f"_{kind}_temp_") for kind in ("scale", "prob")))
            for found, expected, atol in zip(tempered.log_prob(x), g[name].flatten(), loose, strict=True):
                close(found, expected, atol=atol, rtol=0)
        for chunk in CHUNKS:
            torch.testing.assert_close(-head.nll(h, x, chunk=chunk), mixture.log_prob(x), atol=1e-3, rtol=1e-5)
        check_moments(g, mixture)
        check_gradients(g, logits, x, config)


def rows_of(config: dict, x: Tensor) -> list[str]:
    return config.get("rows", [""] * len(x))


def number(name: str, before: str) -> float:
    """The number in a name behind some text; 1 where there is none."""
    found = re.search(rf"{before}([\d.]+)", name)
    return float(found[1]) if found else 1.0


def check_moments(g: Golden, mixture: DiagonalMixture) -> None:
    """Weights, and components, mean and variance of the rows that the names say."""
    if "out/mixture_log_weights" in g:
        close(mixture.logits.log_softmax(-1), g["out/mixture_log_weights"].flatten(0, -2))
    for name in g.names():
        if found := re.fullmatch(r"out/(loc|scale)_row(\d+)_first(\d+)", name):
            close(getattr(mixture, found[1])[int(found[2]), : int(found[3])], g[name])
        elif found := re.fullmatch(r"out/(mean|variance)_row(\d+)", name):
            weights, loc, scale = (t[int(found[2])] for t in mixture)
            mean = weights.softmax(-1) @ loc
            variance = weights.softmax(-1) @ (scale.square() + loc.square()) - mean.square()
            close(mean if found[1] == "mean" else variance, g[name])


def check_gradients(g: Golden, logits: Tensor, x: Tensor, config: dict) -> None:
    for chunk in CHUNKS:
        grad, grad_x = gradients(logits, x, config, chunk)
        weights, rest = grad.split([config["num_mixtures"], grad.shape[1] - config["num_mixtures"]], dim=-1)
        loc, raw = rest.unflatten(-1, (config["num_mixtures"], 2, config["out_dim"])).unbind(-2)
        parts = {"loc": loc[0], "raw_scale": raw[0], "mixture_logits": weights[0]}  # (K, D), of a case of one row
        for name in (n for n in g.names() if n.startswith("grad/")):
            expected = g[name]
            if found := re.fullmatch(r"grad/logits_rows((?:_\d+)+)", name):
                check_rows(grad[[int(row) for row in found[1].split("_")[1:]]], expected.flatten(0, -2))
            elif name == "grad/x":
                check_rows(grad_x, expected.flatten(0, -2))
            elif found := re.fullmatch(r"grad/(\w+)_first(\d+)", name):
                check_rows(parts[found[1]][: int(found[2])], expected)
            elif found := re.fullmatch(r"grad/(\w+)_sum_over_mixtures", name):
                check_rows(parts[found[1]].sum(0)[None], expected[None])
            else:
                check_rows(parts[name.removeprefix("grad/")][None], expected[None])


# Guidance


@golden("cfg_density")
def test_golden_guidance(path: Path):
    """One component of both mixtures, then the rule with the recorded draws, and what it draws exactly."""
    config = read_json(path.with_suffix(".json"))
    w = config["w"]
    with Golden(path) as g:
        gaussians = check_components(g, config)
        loc, scale, _, scale_u = gaussians
        width = proposal_scale(scale, scale_u)
        close(width, g["mid/proposal_scale"])
        eps = ((g["in/proposals"].double() - loc) / width).float()
        fallback = ((g["in/fallback_sample"].double() - loc) / scale).float()
        result = guided_rejection(*gaussians, w, eps, g["in/uniform01"], fallback)
        close(result.log_fac.exp(), g["mid/fac"], atol=1e-6, rtol=1e-3)
        decided = margins(g, gaussians, w, result.log_fac, result.first_accepted) > DECIDED
        assert decided.float().mean() > 0.8
        close(result.sample[decided], g["out/sample"][decided])
        log_prob = guided_log_density(g["out/sample"], *gaussians, w)
        close(log_prob, g["out/unnormalised_log_prob_of_sample"], atol=1e-4)
        accepted = 100 * (result.first_accepted >= 0).float().mean()
        assert abs(accepted - g["out/accepted_percent"].item()) <= 100 * (~decided).float().mean() + 1e-3
        check_exact(g, gaussians, w, result.num_accepted)


def check_components(g: Golden, config: dict) -> tuple[Tensor, ...]:
    """loc and scale of the drawn component, with and without the condition; temperatures act on both."""
    chosen, gaussians = g["in/mixture_one_hot"].argmax(-1), list[Gaussian]()
    for branch in ("cond", "uncond"):
        parsed = DiagonalMixture.parse(g[f"in/logits_{branch}"], config["out_dim"])
        tempered = parsed.tempered(config["temperature_scales"], config["temperature_probs"])
        gaussians.append(tempered.gaussian(chosen))
        for name, tensor in gaussians[-1]._asdict().items():
            close(tensor, g[f"mid/{name}_{branch}"])
    return *gaussians[0], *gaussians[1]


def margins(g: Golden, gaussians: tuple[Tensor, ...], w: float, log_fac: Tensor, first: Tensor) -> Tensor:
    """How far the nearest decision up to the first accepted proposal was from the other, in logarithms, per channel."""
    x, loc, width = g["in/proposals"], gaussians[0], proposal_scale(gaussians[1], gaussians[3])
    log_u = g["in/uniform01"].log()
    margin = (guided_log_density(x, *gaussians, w) - log_u - log_fac - normal_log_prob(x, loc, width)).abs()
    index = torch.arange(len(x)).view(-1, *[1] * first.ndim)
    return margin.where((index <= first) | (first < 0), torch.inf).amin(0)


def check_exact(g: Golden, gaussians: tuple[Tensor, ...], w: float, num_accepted: Tensor) -> None:
    """The product, the moments of what is accepted by integration, and the share that was."""
    doubles, valid = [t.double() for t in gaussians], g["exact/valid"].bool()
    loc, scale, found = *doubles[:2], product(*doubles, w)  # in units of the conditional's scale
    mean, precision = loc + scale * found.mean, found.precision / scale.square()
    close(precision, g["exact/gaussian_precision"], atol=1e-6)
    proper = precision > 0
    close(mean[proper], g["exact/gaussian_mean"][proper], atol=1e-6)
    rate, accepted_mean, variance = integrated(doubles, w)
    for found, name in ((rate, "acceptance_rate"), (accepted_mean, "sampler_mean"), (variance, "sampler_variance")):
        close(found[valid], g[f"exact/{name}"][valid], atol=1e-4, rtol=1e-3)
    proposals = len(g["in/proposals"])
    error = 5 * (rate * (1 - rate) / proposals).sqrt() + 5 / proposals
    assert ((num_accepted / proposals - rate).abs() <= error)[valid].all()
    check_closed_form(g, gaussians, w, valid)


def integrated(gaussians: list[Tensor], w: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of min(p, fac q) / fac over all proposals: mass, mean and variance."""
    loc, width = gaussians[0], proposal_scale(gaussians[1], gaussians[3])
    steps = torch.linspace(-12, 12, 12_001, dtype=torch.float64).view(-1, *[1] * loc.ndim)
    x = loc + width * steps
    log_p = guided_log_density(x, *gaussians, w) - envelope(*gaussians, w)
    accepted = torch.minimum(log_p, normal_log_prob(x, loc, width)).exp() * width * (steps[1] - steps[0])
    mass = accepted.sum(0)
    mean = (accepted * x).sum(0) / mass
    return mass, mean, (accepted * (x - mean).square()).sum(0) / mass


def check_closed_form(g: Golden, gaussians: tuple[Tensor, ...], w: float, valid: Tensor) -> None:
    """Exactly the product where the official sampler draws it, the conditional where there is none, else either."""
    mean, std = g["exact/gaussian_mean"], g["exact/gaussian_precision"].rsqrt()
    loc, scale = gaussians[:2]
    drawn = [guided_closed_form(*gaussians, w, torch.full_like(loc, eps)).double() for eps in (0.0, 1.0)]
    exact, conditional = (
        torch.stack([(d - m - eps * s).abs() <= 1e-4 for d, eps in zip(drawn, (0, 1), strict=True)]).all(0)
        for m, s in ((mean, std), (loc, scale))
    )
    assert (exact | conditional).all() and conditional[~valid].all()
    official = valid & ((g["exact/sampler_mean"] - mean).abs() < 0.01 * std)
    official &= (g["exact/sampler_variance"] / std.square() - 1).abs() < 0.01
    assert exact[official].all() and official.any()
