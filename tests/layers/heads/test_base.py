"""What every head keeps to, and what sets them apart: two tokens that are equally likely."""

import pytest
import torch
from torch import Tensor

from layers.heads.base import Head, OneShotHead
from layers.heads.categorical import CategoricalHead
from layers.heads.diffusion import DiffusionHead
from layers.heads.flow import FlowHead
from layers.heads.gmm import GMMHead
from layers.heads.regression import RegressionHead

R, D, E, V = 4, 3, 6, 9
HEADS = {
    "diffusion": lambda: DiffusionHead(D, E, width=16, depth=1),
    "flow": lambda: FlowHead(D, E, width=16, depth=1),
    "categorical": lambda: CategoricalHead(V, E),
    "regression": lambda: RegressionHead(D, E),
    "gmm": lambda: GMMHead(D, E, num_mixtures=2),
}
every_head = pytest.mark.parametrize("name", HEADS)


def steps_of(head: Head) -> int:
    return 1 if isinstance(head, OneShotHead) else 6


def draw(head: Head, solver: str, rows: int) -> Tensor:
    count, dim = head.noise_shape(steps_of(head), solver)
    return torch.randn(count, rows, dim)


@every_head
def test_a_head_trains_and_samples_by_one_interface(name):
    head = HEADS[name]()
    x = torch.randint(V, (R,)) if name == "categorical" else torch.randn(R, D)
    z, time, noise = torch.randn(R, E, requires_grad=True), head.draw_times(torch.rand(2, R)), torch.randn(2, R, D)
    terms = head.loss(x, z, time, noise)
    assert terms["loss"].shape in ((2, R), (1, R)) and all(v.dtype == torch.float32 for v in terms.values())
    terms["loss"].mean().backward()
    for solver in head.SOLVERS:
        out = head.sample(z, draw(head, solver, R), num_steps=steps_of(head), solver=solver)
        assert out.shape == x.shape and out.dtype == x.dtype


@every_head
def test_wrong_settings_are_named(name):
    head = HEADS[name]()
    with pytest.raises(ValueError, match=r"solver is 'rk9', but \w+Head has " + ", ".join(head.SOLVERS)):
        head.noise_shape(steps_of(head), "rk9")
    with pytest.raises(ValueError, match="num_steps is 0"):
        head.noise_shape(0, head.SOLVERS[0])
    count, dim = head.noise_shape(steps_of(head), head.SOLVERS[0])
    with pytest.raises(ValueError, match=rf"noise has shape .*need \({count}, {R}, {dim}\)"):
        head.sample(torch.randn(R, E), torch.randn(count + 1, R, dim), num_steps=steps_of(head), solver=head.SOLVERS[0])


@pytest.mark.parametrize("name", ["categorical", "regression", "gmm"])
def test_heads_without_steps_take_no_other_number(name):
    head = HEADS[name]()
    with pytest.raises(ValueError, match=r"num_steps is 25, but \w+Head answers at once"):
        head.noise_shape(25, head.SOLVERS[0])


def trained(head: Head) -> tuple[Head, list[float]]:
    """Fitted to tokens (s, s) with a random sign s, whatever the condition; and its losses."""
    x, z = torch.tensor([[-1.0], [1.0]]).repeat(32, 2), torch.ones(64, 1)
    optimizer, losses = torch.optim.Adam(head.parameters(), lr=1e-2), []
    for _ in range(150):
        loss = head.loss(x, z, head.draw_times(torch.rand(4, 64)), torch.randn(4, 64, 2))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return head, losses


@pytest.mark.slow
def test_flow_head_learns_both_of_two_tokens():
    head, _ = trained(FlowHead(2, 1, width=32, depth=1))
    with torch.no_grad():
        out = head.sample(torch.ones(256, 1), torch.randn(1, 256, 2), num_steps=50, solver="euler")
    assert ((out - out.sign()).abs().amax(1) < 0.3).float().mean() > 0.9
    assert ((out[:, 0] > 0) == (out[:, 1] > 0)).float().mean() > 0.9
    assert 0.35 < (out[:, 0] > 0).float().mean() < 0.65


@pytest.mark.slow
def test_diffusion_head_learns_the_noise():
    """Samples need a longer fit: the first reverse step multiplies an error by hundreds."""
    _, losses = trained(DiffusionHead(2, 1, width=32, depth=1))
    assert losses[0] > 0.9 and sum(losses[-10:]) / 10 < 0.35


def test_regression_answers_between_them():
    head, _ = trained(RegressionHead(2, 1))
    assert head.sample(torch.ones(3, 1), torch.empty(0, 3, 2)).abs().max() < 0.1
