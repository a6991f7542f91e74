"""Mixtures, head and guidance against the official GIVT code.

Cases are discovered. Which law an array belongs to is read from its group's name, sizes from the json and the arrays,
temperatures from the json or the array's name. Tolerances are those of the golden README.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from layers.heads.gmm import GMMHead
from layers.heads.mixtures import SCALE_MIN, DiagonalMixture, FullGaussian, squareplus, squareplus_unfixed
from layers.samplers.gmm_cfg import guided_closed_form, guided_log_density, guided_rejection, product
from tests.golden_cases import Golden, case_id, golden_paths, read_json

LOG_FLOAT32 = 87.0  # exp of more, or of less than its negative, leaves float32's normal numbers
DECIDED = 1e-3  # log margin above which a decision of the rejection rule must be the official one


def golden(name: str):
    """Parametrise over every file whose name begins so, at any depth."""
    return pytest.mark.parametrize("path", golden_paths("givt", f"**/{name}*.safetensors"), ids=case_id)


def close(actual: Tensor, expected: Tensor, *, atol: float, rtol: float) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol, check_dtype=False, equal_nan=True)


def kind_of(group: str) -> str:
    return next(
        (kind for name, kind in (("per_channel", "per_channel"), ("multi", "full")) if name in group), "diagonal"
    )


def head_of(group: str, logits: Tensor, token_dim: int, config: dict) -> GMMHead:
    """A head that hands its conditions through: the recorded outputs go in as h."""
    kind, outputs = kind_of(group), logits.shape[-1]
    num_mixtures = {"per_channel": outputs // (3 * token_dim), "full": 1}.get(kind, outputs // (1 + 2 * token_dim))
    sizes = {"num_mixtures": num_mixtures, "scale_min": config.get("scale_tol", SCALE_MIN)}
    scale = "squareplus_unfixed" if "unfixed" in group else "squareplus"
    head = GMMHead(token_dim, outputs, kind=kind, init="zero", scale=scale, **sizes)
    assert head.linear.out_features == outputs
    with torch.no_grad():
        head.linear.weight.copy_(torch.eye(outputs))
    return head


def suffix_temperatures(name: str) -> tuple[float, float]:
    """(temperature, inv_temperature) of an array's name: "logprob_t0.85_p1.5"."""
    t, p = (re.search(rf"_{letter}(\d+\.?\d*)", name) for letter in "tp")
    return float(t[1]) if t else 1.0, float(p[1]) if p else 1.0


def check_group(g: Golden, group: str, config: dict) -> None:
    """Every array of a group against the head's mixture."""
    settings = re.fullmatch(r"(.*)_t(\d+)", group)  # "gmm_t1": the group "gmm" at the json's temperatures number 1
    source = settings[1] if settings else re.sub("_unfixed.*", "", group)
    names = [name.removeprefix(f"{group}/") for name in g.names() if name.startswith(f"{group}/")]
    rows = len(g[f"{group}/logprob"])
    logits, z = g[f"{source}/logits"][:rows], g[f"{source}/z"][:rows]
    head = head_of(group, logits, z.shape[-1], config)
    for name in names:
        if name in ("logits", "z"):
            continue
        temperatures = config["temperatures"][int(settings[2])] if settings else suffix_temperatures(name)
        temperature, inverse = (1.0 if value is None else value for value in temperatures)
        mixture = head.distribution(logits).tempered(temperature, inverse)
        check_array(re.sub(r"_t\d.*", "", name), g[f"{group}/{name}"], mixture, head, logits, z)


def check_array(name: str, expected: Tensor, mixture, head: GMMHead, logits: Tensor, z: Tensor) -> None:
    loose = {"atol": 1e-3, "rtol": 1e-3} if isinstance(mixture, FullGaussian) else {"atol": 1e-4, "rtol": 1e-4}
    if name == "mix_logits_norm":
        close(mixture.logits.log_softmax(-1), expected, atol=1e-4, rtol=1e-4)
    elif name in ("loc", "scale", "scale_tri"):
        close(getattr(mixture, "scale_tril" if name == "scale_tri" else name), expected, atol=1e-6, rtol=1e-5)
    elif name == "logprob":
        close(mixture.log_prob(z), expected, **loose)
    elif name == "prob":
        log_prob = mixture.log_prob(z)
        normal = log_prob.abs() < LOG_FLOAT32
        close(log_prob[normal], expected[normal].log(), **loose)
        assert torch.equal(log_prob[~normal] > 0, expected[~normal] > 1)
    elif name == "logprob_f64":
        close(type(mixture)(*(t.double() for t in mixture)).log_prob(z.double()), expected, atol=1e-6, rtol=1e-6)
    elif name == "grad_nll_sum":
        check_head_gradient(head, logits, z, expected)
    else:
        raise AssertionError(f"nothing is known of an array called {name}")


def check_head_gradient(head: GMMHead, logits: Tensor, z: Tensor, expected: Tensor) -> None:
    """Of the sum of -log p, by the head in one piece and in chunks of two rows."""
    for chunk in (None, 2):
        h = logits.clone().requires_grad_()
        nll = head.nll(h, z, chunk=chunk)
        close(torch.autograd.grad(nll.sum(), h)[0], expected, atol=1e-3, rtol=1e-3)
        close(nll, -head.log_prob(logits, z), atol=1e-4, rtol=1e-4)


@golden("gmm")
def test_golden_mixtures(path: Path):
    config = read_json(path.with_suffix(".json"))
    with Golden(path) as g:
        for group in sorted({name.split("/")[0] for name in g.names()} - {"squareplus"}):
            check_group(g, group, config)
        if "squareplus/x" in g:
            x = g["squareplus/x"]
            close(squareplus(x), g["squareplus/y"], atol=1e-6, rtol=1e-5)
            close(squareplus_unfixed(x), g["squareplus/y_unfixed"], atol=1e-6, rtol=1e-5)


GAUSSIANS = ("loc_c", "scale_c", "loc_u", "scale_u")
NOISE = ("prop_eps", "prop_u", "fallback_eps")


def check_rejection(
    g: Golden, prefix: str, gaussians: list[Tensor], noise: list[Tensor], w: float, grid: Tensor
) -> None:
    """What the official code recorded below a prefix: the decisions wherever rounding cannot turn them."""
    result = guided_rejection(*gaussians, w, *noise, offsets=grid)
    close(result.scale_prop, g[f"{prefix}scale_prop"], atol=0, rtol=1e-6)
    close(result.log_fac.exp(), g[f"{prefix}fac"], atol=1e-6, rtol=1e-3)
    decided = g[f"{prefix}min_log_margin"] > DECIDED
    assert torch.equal(result.first_accepted[decided], g[f"{prefix}first_accepted"][decided].long())
    close(result.sample[decided], g[f"{prefix}sample"][decided], atol=1e-6, rtol=1e-5)
    # the margin is recorded up to the first that is accepted, so that one of the others may turn
    assert (result.num_accepted - g[f"{prefix}num_accepted"]).abs().max() <= 1


@golden("dbcfg")
def test_golden_guidance(path: Path):
    config = read_json(path.with_suffix(".json"))
    with Golden(path) as g:
        gaussians, noise = [g[name] for name in GAUSSIANS], [g[name] for name in NOISE]
        points = g["loc_c"] + g["rel_points"][:, None] * g["scale_c"]
        for i, w in enumerate(config["w"]):
            check_rejection(g, f"w{i}/", gaussians, noise, w, g["grid_offsets"])
            close(guided_log_density(points, *gaussians, w), g[f"w{i}/logp_at_points"], atol=1e-3, rtol=1e-3)
            check_closed_form(g, f"w{i}/closed_form_", gaussians, w, g["fallback_eps"], g[f"w{i}/fac"])
        if "mixture/z" in g:
            check_mixture(g, config["mixture_w"])


def check_closed_form(g: Golden, prefix: str, gaussians: list[Tensor], w: float, eps: Tensor, fac: Tensor) -> None:
    """Each channel has the product's draw or the conditional's: the latter wherever there is no product, the former
    wherever the proposals, of 2 max(scale), reach it well."""
    mean, precision = g[f"{prefix}mean_f64"], g[f"{prefix}precision_f64"]
    loc, scale, _, scale_u = gaussians
    found = product(*(t.double() for t in gaussians), w)  # in units of the conditional's scale
    close(loc + scale * found.mean.where(found.precision > 0, torch.nan), mean, atol=1e-6, rtol=1e-9)
    close(found.precision / scale.double().square(), precision, atol=1e-6, rtol=1e-9)
    found, width = guided_closed_form(*gaussians, w, eps), 2 * torch.maximum(scale, scale_u)
    conditional, exact = loc + scale * eps, mean + eps / precision.sqrt()
    fell_back, is_exact = ((found - t).abs() <= 1e-5 + 1e-4 * t.abs() for t in (conditional, exact))
    assert (fell_back | is_exact).all() and fell_back[~(precision > 0)].all()
    reached = (1 / precision.sqrt() < 0.99 * width) & ((mean - loc).abs() < width) & (fac < 1e30)
    assert is_exact[reached].all() and reached.any()


def check_mixture(g: Golden, w: float) -> None:
    """One component, the conditional mixture's, taken in both."""
    branches = [[g[f"mixture/{name}_{b}"] for name in ("mix_logits", "all_loc", "all_scale")] for b in "cu"]
    component = g["mixture/component"].long()
    gaussians = [t for branch in branches for t in DiagonalMixture(*branch).gaussian(component)]
    for found, name in zip(gaussians, GAUSSIANS, strict=True):
        assert torch.equal(found, g[f"mixture/{name}"])
    check_rejection(g, "mixture/", gaussians, [g[f"mixture/{name}"] for name in NOISE], w, g["grid_offsets"])
    log_prob = guided_log_density(g["mixture/z"], *gaussians, w)
    close(log_prob, g["mixture/logp_per_channel"], atol=1e-3, rtol=1e-3)
    accepted = (g["mixture/first_accepted"] >= 0).float().mean()
    close(100 * accepted, g["mixture/ok_percent"].squeeze(), atol=1e-3, rtol=1e-5)
