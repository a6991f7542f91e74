"""Flow-matching head: times, loss, and sampling against the plain solver."""

import pytest
import torch

from layers.heads import denoiser
from layers.heads.flow import FlowHead
from tests.layers.heads.oracles import randomise, sample_flow_plain

R, D, E = 5, 3, 6


def head_of() -> FlowHead:
    return randomise(FlowHead(D, E, width=16, depth=2)).eval()


def test_times_are_the_draws():
    u = torch.tensor([0.0, 0.15865525, 0.5, 0.84134475])
    assert torch.equal(head_of().draw_times(u), u)


def test_loss_is_the_squared_error_of_the_velocity_of_each_row():
    head, x, z, noise, t = head_of(), torch.randn(R, D), torch.randn(R, E), torch.randn(2, R, D), torch.rand(2, R)
    loss = head.loss(x, z, t, noise)["loss"]
    assert loss.shape == (2, R)
    for k in range(2):
        at = t[k][:, None]
        velocity = head.net(at * x + (1 - at) * noise[k], 1000 * t[k], z)
        torch.testing.assert_close(loss[k], (velocity - (x - noise[k])).square().mean(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("num_steps", [1, 11])
def test_sampling_equals_the_plain_solver(solver, guided, num_steps, monkeypatch):
    head, z, uncond, noise = head_of(), torch.randn(R, E), torch.randn(R, E), torch.randn(1, R, D)
    settings = {"temperature": 0.8, "num_steps": num_steps, "solver": solver}
    guidance = {"uncond": uncond, "cfg_scale": 2.5} if guided else {}
    with torch.no_grad():
        expected = sample_flow_plain(head, z, noise, **guidance, **settings)
        torch.testing.assert_close(head.sample(z, noise, **guidance, **settings), expected, atol=1e-5, rtol=1e-4)
        monkeypatch.setattr(denoiser, "MAX_MODULATIONS", 4 * (2 if guided else 1) * R * 8 * 16)
        torch.testing.assert_close(head.sample(z, noise, **guidance, **settings), expected, atol=1e-5, rtol=1e-4)


def test_modulations_of_a_run_of_times_are_made_once(monkeypatch):
    head, z, noise = head_of(), torch.randn(R, E), torch.randn(1, R, D)
    monkeypatch.setattr(denoiser, "MAX_MODULATIONS", 4 * R * 8 * 16)
    made, plain = [], head.net.modulations
    monkeypatch.setattr(head.net, "modulations", lambda y: made.append(len(y)) or plain(y))
    head.sample(z, noise, num_steps=11, solver="heun")
    assert made == [4, 4, 3]


def test_a_constant_velocity_carries_the_scaled_start_along():
    head, z, noise = FlowHead(D, E, width=16, depth=2), torch.randn(R, E), torch.randn(1, R, D)
    torch.nn.init.constant_(head.net.final_layer.linear.bias, 3.0)
    for solver in head.SOLVERS:
        out = head.sample(z, noise, temperature=0.5, num_steps=7, solver=solver)
        torch.testing.assert_close(out, 0.5 * noise[0] + 3)
