"""Path, conversions and loss weights of flow matching."""

from itertools import product

import pytest
import torch

from layers.diffusion.flow_matching import convert, interpolate, logit_normal, target

SPACES = ("x", "eps", "v")
PAIRS = list(product(SPACES, SPACES))
T_EPS = 0.05


def triple(times):
    """x, e, z in float64 at the given times (B, 1)."""
    t = torch.as_tensor(times, dtype=torch.float64).view(-1, 1)
    x, noise = (torch.randn(len(t), 6, dtype=torch.float64) for _ in range(2))
    return x, noise, interpolate(x, noise, t), t


def test_path_runs_from_noise_to_data_in_a_straight_line():
    x, noise, _, _ = triple([0.0])
    assert torch.equal(interpolate(x, noise, torch.tensor(0.0)), noise)
    assert torch.equal(interpolate(x, noise, torch.tensor(1.0)), x)
    torch.testing.assert_close(interpolate(x, noise, torch.tensor(0.25)), 0.25 * x + 0.75 * noise)


def test_targets_are_data_noise_and_the_paths_derivative():
    x, noise, _, _ = triple([0.5])
    assert torch.equal(target("x", x, noise), x) and torch.equal(target("eps", x, noise), noise)
    step = 1e-3
    slope = (interpolate(x, noise, torch.tensor(0.5 + step)) - interpolate(x, noise, torch.tensor(0.5))) / step
    torch.testing.assert_close(target("v", x, noise), slope, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("source", "to"), PAIRS)
def test_true_quantities_convert_into_each_other_away_from_the_clamp(source, to):
    x, noise, z, t = triple([0.06, 0.3, 0.5, 0.94])
    converted = convert(target(source, x, noise), z, t, source=source, to=to, t_eps=T_EPS)
    torch.testing.assert_close(converted, target(to, x, noise), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("source", "to"), [(a, b) for a, b in PAIRS if a != b])
def test_any_prediction_survives_a_round_trip(source, to):
    _, _, z, t = triple([0.06, 0.3, 0.5, 0.94])
    value = torch.randn_like(z)  # not a true quantity: the conversions are maps, not identities of the path
    there = convert(value, z, t, source=source, to=to, t_eps=T_EPS)
    assert not torch.allclose(there, value)
    back = convert(there, z, t, source=to, to=source, t_eps=T_EPS)
    torch.testing.assert_close(back, value, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("t", [0.96, 0.99, 1.0])
def test_data_predictions_divide_by_no_less_than_t_eps(t):
    value, z = torch.randn(2, 3), torch.randn(2, 3)
    at = torch.tensor(t)
    torch.testing.assert_close(convert(value, z, at, source="x", to="v", t_eps=T_EPS), (value - z) / T_EPS)
    torch.testing.assert_close(convert(value, z, at, source="x", to="eps", t_eps=T_EPS), (z - at * value) / T_EPS)


@pytest.mark.parametrize("t", [0.04, 0.01, 0.0])
def test_noise_predictions_divide_by_no_less_than_t_eps(t):
    value, z = torch.randn(2, 3), torch.randn(2, 3)
    at = torch.tensor(t)
    torch.testing.assert_close(convert(value, z, at, source="eps", to="v", t_eps=T_EPS), (z - value) / T_EPS)
    torch.testing.assert_close(convert(value, z, at, source="eps", to="x", t_eps=T_EPS), (z - (1 - at) * value) / T_EPS)


def cl(u):
    return max(u, T_EPS)


WEIGHTS = {
    ("x", "x"): lambda t: 1,
    ("x", "eps"): lambda t: t**2 / cl(1 - t) ** 2,
    ("x", "v"): lambda t: 1 / cl(1 - t) ** 2,
    ("eps", "x"): lambda t: (1 - t) ** 2 / cl(t) ** 2,
    ("eps", "eps"): lambda t: 1,
    ("eps", "v"): lambda t: 1 / cl(t) ** 2,
    ("v", "x"): lambda t: (1 - t) ** 2,
    ("v", "eps"): lambda t: t**2,
    ("v", "v"): lambda t: 1,
}


@pytest.mark.parametrize(("prediction", "loss"), PAIRS)
@pytest.mark.parametrize("t", [0.0, 0.01, 0.05, 0.3, 0.7, 0.95, 0.99, 1.0])
def test_every_loss_is_a_weighted_error_of_the_prediction(prediction, loss, t):
    """Output and target converted alike: (difference)^2 = w(t) (output - target)^2, clamped times included."""
    x, noise, z, at = triple([t])
    output, wanted = torch.randn_like(x), target(prediction, x, noise)
    both = (convert(value, z, at, source=prediction, to=loss, t_eps=T_EPS) for value in (output, wanted))
    error = torch.sub(*both).square()
    torch.testing.assert_close(error, WEIGHTS[prediction, loss](t) * (output - wanted).square(), atol=1e-9, rtol=1e-9)


def test_logit_normal_times_have_the_stated_logits():
    normal = torch.tensor([-2.0, 0.0, 1.5], dtype=torch.float64)
    t = logit_normal(normal, mean=-0.8, std=0.5)
    torch.testing.assert_close(torch.log(t / (1 - t)), -0.8 + 0.5 * normal)


def test_default_time_law_of_jit_has_the_published_quantiles():
    """Median 0.31; 90 % of the times in [0.108, 0.626]."""
    quantiles = torch.tensor([-1.644854, 0.0, 1.644854])
    assert logit_normal(quantiles, mean=-0.8, std=0.8).tolist() == pytest.approx([0.108, 0.310, 0.626], abs=5e-4)
