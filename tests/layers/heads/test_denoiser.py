"""The small AdaLN MLP: its formula, its start, and the hoisted form against the plain one."""

import math

import pytest
import torch
import torch.nn.functional as F

from layers.embed import timestep_features
from layers.heads import denoiser
from layers.heads.denoiser import Denoiser
from tests.layers.heads.oracles import randomise

D, E, W, OUT = 3, 7, 16, 5


def net_of(depth: int = 2) -> Denoiser:
    return randomise(Denoiser(D, E, width=W, depth=depth, out_dim=OUT))


def test_network_equals_its_formula_written_with_the_official_names():
    net, x, t, z = net_of(), torch.randn(4, D), torch.tensor([0, 5, 500, 999]), torch.randn(4, E)
    p = net.state_dict()

    def linear(name, value):
        return value @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(h):
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    y = linear("time_embed.mlp.2", F.silu(linear("time_embed.mlp.0", timestep_features(t, 256))))
    y = y + linear("cond_embed", z)
    h = linear("input_proj", x)
    for i in range(2):
        name = f"res_blocks.{i}"
        shift, scale, gate = linear(f"{name}.adaLN_modulation.1", F.silu(y)).chunk(3, dim=1)
        normed = norm(h) * p[f"{name}.in_ln.weight"] + p[f"{name}.in_ln.bias"]
        h = h + gate * linear(f"{name}.mlp.2", F.silu(linear(f"{name}.mlp.0", normed * (1 + scale) + shift)))
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(y)).chunk(2, dim=1)
    expected = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    torch.testing.assert_close(net(x, t, z), expected, atol=1e-5, rtol=1e-5)
    assert len(p) == 8 + 2 * 8 + 4  # and no parameter besides


def test_a_fresh_network_answers_zero_and_has_the_official_start():
    net = Denoiser(64, 64, width=64, depth=2, out_dim=8)
    assert (net(torch.randn(3, 64), torch.tensor([0, 1, 2]), torch.randn(3, 64)) == 0).all()
    zero = {name for name, p in net.named_parameters() if (p == 0).all()}
    biases = {name for name, _ in net.named_parameters() if name.endswith("bias")}
    modulations = {f"res_blocks.{i}.adaLN_modulation.1.weight" for i in range(2)}
    assert zero == biases | modulations | {"final_layer.adaLN_modulation.1.weight", "final_layer.linear.weight"}
    for i in (0, 2):
        assert net.time_embed.mlp[i].weight.std().item() == pytest.approx(0.02, rel=0.1)
    bound = math.sqrt(6 / 128)  # Xavier, uniform
    for layer in (net.cond_embed, net.input_proj, net.res_blocks[0].mlp[0], net.res_blocks[1].mlp[2]):
        assert 0.97 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_hoisted_steps_equal_the_plain_network(depth):
    net, x, z = net_of(depth), torch.randn(6, D), torch.randn(6, E)
    times = torch.tensor([0, 37, 999])
    modulations = net.modulations(net.embed_time(times)[:, None] + net.cond_embed(z))  # (S, R, ...)
    for s, t in enumerate(times):
        hoisted = net.step(x, [m[s] for m in modulations])
        torch.testing.assert_close(hoisted, net(x, t.expand(6), z), atol=1e-6, rtol=1e-6)


def test_two_kinds_of_conditions_share_the_projected_token():
    net, x, z, other = net_of(), torch.randn(6, D), torch.randn(6, E), torch.randn(6, E)
    calls = []
    net.input_proj.register_forward_hook(lambda _, inputs, output: calls.append(output.shape))
    t = torch.tensor(250)
    both = net.step(x, net.modulations(net.embed_time(t) + net.cond_embed(torch.stack([z, other]))))
    assert both.shape == (2, 6, OUT) and calls == [(6, W)]
    for out, condition in zip(both, (z, other), strict=True):
        torch.testing.assert_close(out, net(x, t.expand(6), condition), atol=1e-6, rtol=1e-6)


def test_runs_cover_all_steps_in_order_within_the_bound(monkeypatch):
    net, rows = net_of(depth=2), 10
    per_step = rows * (3 * 2 + 2) * W
    monkeypatch.setattr(denoiser, "MAX_MODULATIONS", 7 * per_step)
    for num_steps, sizes in ((7, [7]), (8, [4, 4]), (25, [7, 7, 7, 4]), (1, [1])):
        runs = net.runs(num_steps, rows)
        assert [run.stop - run.start for run in runs] == sizes
        assert [i for run in runs for i in range(num_steps)[run]] == list(range(num_steps))
    made = net.modulations(torch.randn(7, rows, W))
    assert sum(m.numel() for m in made) == denoiser.MAX_MODULATIONS
    monkeypatch.setattr(denoiser, "MAX_MODULATIONS", per_step - 1)
    assert len(net.runs(3, rows)) == 3  # one step at a time, if even that is too much


@pytest.mark.parametrize("num_timesteps", [4, 1000])
def test_timesteps_are_embedded_once_each_where_there_are_more_rows(num_timesteps):
    net, timesteps = net_of(), torch.tensor([[0, 3, 1, 1], [2, 3, 3, 0]])
    rows = []
    net.time_embed.register_forward_hook(lambda _, inputs, output: rows.append(len(output)))
    embedded, weights = net.embed_timesteps(timesteps, num_timesteps), torch.randn(2, 4, W)
    assert rows == [min(8, num_timesteps)]
    torch.testing.assert_close(embedded, net.embed_time(timesteps), atol=1e-6, rtol=1e-6)
    grads = [
        torch.autograd.grad((e * weights).sum(), list(net.time_embed.parameters()))
        for e in (embedded, net.embed_time(timesteps))
    ]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


def test_gradients_of_shared_timesteps_are_summed_in_float32_under_autocast():
    """4096 rows of gradient 1: bfloat16 sums would stop growing at 256."""
    net = net_of()
    with torch.autocast("cpu", torch.bfloat16):
        out = net.embed_timesteps(torch.zeros(4096, dtype=torch.long), 1)
    assert out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out.float().sum(), net.time_embed.mlp[2].bias)
    assert (grad == 4096).all()


def test_forward_takes_any_leading_shape():
    net, x, t, z = net_of(), torch.randn(2, 3, D), torch.randint(1000, (2, 3)), torch.randn(3, E)
    out = net(x, t, z)
    assert out.shape == (2, 3, OUT)
    torch.testing.assert_close(out[1], net(x[1], t[1], z), atol=1e-6, rtol=1e-6)
