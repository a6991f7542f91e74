"""Fixed-grid solvers: closed forms, orders of convergence, evaluations."""

import math
from itertools import pairwise

import pytest
import torch

from layers.diffusion.flow_matching import convert
from layers.samplers.ode import SOLVERS, euler, heun, solve, uniform_times


@pytest.mark.parametrize("n", [1, 2, 7, 50])
@pytest.mark.parametrize("rate", [-1.3, 0.7])
def test_linear_equation_gives_the_closed_form(n, rate):
    """dx/dt = a x: factors 1 + ah for Euler; 1 + ah + (ah)^2/2 for Heun, whose last interval is Euler."""
    x, times, ah = torch.tensor([2.0, -1.0], dtype=torch.float64), uniform_times(n).double(), rate / n
    path = {name: solve(solver(lambda x, t: rate * x, x, times)) for name, solver in SOLVERS.items()}
    torch.testing.assert_close(path["euler"], x * (1 + ah) ** n, atol=0, rtol=1e-6)
    torch.testing.assert_close(path["heun"], x * (1 + ah + ah**2 / 2) ** (n - 1) * (1 + ah), atol=0, rtol=1e-6)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_error_falls_with_the_order_before_the_last_interval(solver, order):
    """dx/dt = x cos(5t): x = exp(sin(5t)/5); errors at t = 0.5 on halved grids."""
    errors = []
    for n in (40, 80, 160):
        times = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        states = list(solver(lambda x, t: x * torch.cos(5 * t), torch.ones(1, dtype=torch.float64), times))
        errors.append(abs(states[n // 2 - 1].item() - math.exp(math.sin(2.5) / 5)))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(
    ("method", "n", "count"), [("euler", 50, 50), ("heun", 50, 99), ("heun", 1, 1), ("euler", 1, 1)]
)
def test_number_of_evaluations_and_no_evaluation_at_the_end(method, n, count):
    seen = []

    def velocity(x, t):
        seen.append(float(t))
        return torch.zeros_like(x)

    states = list(SOLVERS[method](velocity, torch.zeros(1), uniform_times(n)))
    assert len(seen) == count and len(states) == n
    assert max(seen) < 1
    expected = uniform_times(n)[:-1].tolist()
    assert sorted(set(seen)) == expected
    assert all(seen.count(t) == (2 if method == "heun" and t > 0 else 1) for t in expected)


def test_last_interval_of_heun_is_one_euler_step():
    def velocity(x, t):
        return x**2 + t

    x, times = torch.tensor([0.3]), uniform_times(5)
    states = list(heun(velocity, x, times))
    t, t_next = times[-2:]
    assert torch.equal(states[-1], states[-2] + (t_next - t) * velocity(states[-2], t))


def test_heun_interval_is_the_mean_of_both_slopes():
    def velocity(x, t):
        return x**2 + t

    x, h = torch.tensor([0.3]), 0.25
    first = next(heun(velocity, x, uniform_times(4)))
    k1 = x**2
    k2 = (x + h * k1) ** 2 + h
    torch.testing.assert_close(first, x + h * (k1 + k2) / 2)


@pytest.mark.parametrize(
    ("method", "n", "residual"),
    [
        ("heun", 50, 0.0171360),
        ("euler", 50, 0.0144),
        ("heun", 25, 0.0087999),
        ("heun", 100, 0.0180849),
        ("heun", 10, 0.0),
        ("heun", 18, 0.0),
        ("euler", 10, 0.0),
    ],
)
def test_a_perfect_predictor_leaves_the_known_share_of_the_noise(method, n, residual):
    """x_pred = x* whatever the input: the clamp of 1 - t at 0.05 leaves r (z0 - x*), r as in the official code."""
    x, noise = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)

    def velocity(z, t):
        return convert(x, z, t, source="x", to="v", t_eps=0.05)

    result = solve(SOLVERS[method](velocity, noise, uniform_times(n)))
    torch.testing.assert_close(result, x + residual * (noise - x), atol=3e-6, rtol=0)


def test_state_keeps_its_dtype_and_the_start_is_not_changed():
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(2, dtype=dtype)
        for solver in SOLVERS.values():
            assert solve(solver(lambda x, t: x, x, uniform_times(3))).dtype == dtype
            assert torch.equal(x, torch.ones(2, dtype=dtype))


def test_times_go_from_exactly_zero_to_exactly_one():
    times = uniform_times(7)
    assert times.dtype == torch.float32 and (times[0], times[-1]) == (0, 1)
    torch.testing.assert_close(times.diff(), torch.full((7,), 1 / 7))


@pytest.mark.parametrize("n", [0, -3])
def test_fewer_than_one_step_is_an_error_naming_the_number(n):
    with pytest.raises(ValueError, match=f"num_steps is {n}"):
        uniform_times(n)
