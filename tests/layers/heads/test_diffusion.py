"""Diffusion Loss: the loss row by row, and sampling against the plain loop."""

import copy

import pytest
import torch

from layers.diffusion.gaussian import Coefficients, hybrid_terms, q_sample
from layers.heads import denoiser
from layers.heads.diffusion import DiffusionHead
from tests.layers.heads.oracles import randomise, sample_plain

R, D, E = 5, 3, 6


def head_of(depth: int = 2) -> DiffusionHead:
    return randomise(DiffusionHead(D, E, width=16, depth=depth)).eval()


def draws(head: DiffusionHead, num_steps: int, solver: str):
    """z, unconditional z and noise."""
    count, dim = head.noise_shape(num_steps, solver)
    return torch.randn(R, E), torch.randn(R, E), torch.randn(count, R, dim)


def test_training_timesteps_are_uniform_and_never_the_last_plus_one():
    head = head_of()
    assert head.draw_times(torch.tensor([0.0, 0.0009, 0.001, 0.5, 1 - 2**-24])).tolist() == [0, 0, 1, 500, 999]
    times = head.draw_times(torch.linspace(0, 1, 100_001)[:-1])
    assert times.dtype == torch.int64 and set(times.bincount().tolist()) <= {99, 100, 101}


@pytest.mark.parametrize("m", [1, 3])
def test_loss_is_that_of_each_row_alone(m):
    head, x, z, noise = head_of(), torch.randn(R, D), torch.randn(R, E), torch.randn(m, R, D)
    time = torch.randint(1000, (m, R))
    time[0, :2] = torch.tensor([0, 999])
    terms = head.loss(x, z, time, noise)
    assert {name: value.shape for name, value in terms.items()} == dict.fromkeys(("loss", "mse", "vb"), (m, R))
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"])
    for k in range(m):
        for r in range(R):
            c = Coefficients.at(head.process.coefficients(), time[k, r])
            x_t = q_sample(x[r], noise[k, r], c)
            eps, v = head.net(x_t[None], time[k, r : r + 1], z[r : r + 1])[0].chunk(2)
            mse, vb = hybrid_terms(x[r], x_t, noise[k, r], eps, v, c)
            torch.testing.assert_close((terms["mse"][k, r], terms["vb"][k, r]), (mse, vb), atol=1e-5, rtol=2e-4)


def test_condition_is_projected_once_for_all_draws_of_a_row():
    head, rows = head_of(), []
    head.net.cond_embed.register_forward_hook(lambda _, inputs, output: rows.append(output.shape[:-1].numel()))
    head.loss(torch.randn(R, D), torch.randn(R, E), torch.randint(1000, (4, R)), torch.randn(4, R, D))
    assert rows == [R]


def test_every_parameter_and_the_condition_learn():
    head, z = head_of(), torch.randn(R, E, requires_grad=True)
    head.loss(torch.randn(R, D), z, torch.randint(1, 900, (4, R)), torch.randn(4, R, D))["loss"].mean().backward()
    assert all((p.grad != 0).any() for p in head.parameters()) and (z.grad != 0).any(dim=1).all()


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("depth", [0, 2])
def test_sampling_equals_the_plain_loop(solver, guided, depth, monkeypatch):
    head, num_steps = head_of(depth), 11
    z, uncond, noise = draws(head, num_steps, solver)
    settings = {"temperature": 0.9 if solver == "ddpm" else 1.0, "num_steps": num_steps, "solver": solver}
    guidance = {"uncond": uncond, "cfg_scale": 2.5} if guided else {}
    with torch.no_grad():
        expected = sample_plain(head, z, noise, **guidance, **settings)
        whole = head.sample(z, noise, **guidance, **settings)
        monkeypatch.setattr(denoiser, "MAX_MODULATIONS", 4 * (2 if guided else 1) * R * (3 * depth + 2) * 16)
        assert [run.stop for run in head.net.runs(num_steps, (2 if guided else 1) * R)] == [4, 8, 11]
        in_runs = head.sample(z, noise, **guidance, **settings)
    scale = expected.abs().max().item()  # rounding is amplified by the first step
    for out in (whole, in_runs):
        torch.testing.assert_close(out, expected, atol=1e-4 * scale, rtol=0)


def test_guidance_scale_may_be_a_tensor_one_for_all_or_one_per_row():
    head = head_of()
    z, uncond, noise = draws(head, 20, "ddpm")

    def sample(scale):
        with torch.no_grad():
            return head.sample(z, noise, uncond=uncond, cfg_scale=scale, num_steps=20, solver="ddpm")

    torch.testing.assert_close(sample(torch.tensor(2.0)), sample(2.0))
    per_row = sample(torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0])[:, None])
    for scale, rows in ((2.0, [1, 4]), (3.0, [2]), (1.0, [0, 3])):
        torch.testing.assert_close(per_row[rows], sample(scale)[rows], atol=1e-3, rtol=1e-3)


def test_guidance_of_one_does_not_run_the_unconditional_rows():
    head, shapes = head_of(), []
    z, uncond, noise = draws(head, 5, "ddpm")
    head.net.res_blocks[0].mlp.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape[:-1])))
    for settings in ({"uncond": uncond, "cfg_scale": 1.0}, {"cfg_scale": 3.0}):
        head.sample(z, noise, num_steps=5, solver="ddpm", **settings)
    assert set(shapes) == {(R,)}
    shapes.clear()
    head.sample(z, noise, num_steps=5, solver="ddpm", uncond=uncond, cfg_scale=3.0)
    assert set(shapes) == {(2, R)}


def test_draws_are_used_once_each_and_the_last_not_at_all():
    head = head_of()
    z, _, noise = draws(head, 4, "ddpm")
    noise.requires_grad_()
    out = head.sample(z, noise, num_steps=4, solver="ddpm")
    (grad,) = torch.autograd.grad(out.sum(), noise)
    assert (grad[:-1] != 0).all() and (grad[-1] == 0).all()


def test_rows_do_not_see_each_other():
    head = head_of()
    z, uncond, noise = draws(head, 6, "ddpm")
    with torch.no_grad():
        alone = [
            head.sample(z[r, None], noise[:, r, None], uncond=uncond[r, None], cfg_scale=2.0, num_steps=6)
            for r in range(R)
        ]
        together = head.sample(z, noise, uncond=uncond, cfg_scale=2.0, num_steps=6)
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-4 * together.abs().max().item(), rtol=0)


def test_noise_shapes_and_settings_that_there_are_not():
    head = head_of()
    assert head.noise_shape(25, "ddpm") == (26, D) and head.noise_shape(25, "ddim") == (1, D)
    for num_steps in (1, 0, 1001):
        with pytest.raises(ValueError, match=rf"num_steps is {num_steps}: the sampler needs 2\.\.1000"):
            head.noise_shape(num_steps, "ddpm")
    with pytest.raises(ValueError, match=r"temperature is 0\.9, but ddim adds no noise"):
        head.sample(torch.randn(R, E), torch.randn(1, R, D), num_steps=5, solver="ddim", temperature=0.9)


def test_state_holds_the_networks_weights_only_and_tables_survive_a_copy():
    head = head_of()
    z, _, noise = draws(head, 5, "ddpm")
    before = head.sample(z, noise, num_steps=5)
    assert all(name.startswith("net.") for name in head.state_dict())
    torch.testing.assert_close(copy.deepcopy(head).sample(z, noise, num_steps=5), before)


def test_constants_are_made_once_and_serve_inference_and_gradients_alike():
    head = head_of()
    z, _, noise = draws(head, 5, "ddpm")
    with torch.inference_mode():
        head.sample(z, noise, num_steps=5)
    made = head._constants(5, z.device)
    z.requires_grad_()
    (grad,) = torch.autograd.grad(head.sample(z, noise, num_steps=5).sum(), z)
    assert (grad != 0).any() and head._constants(5, z.device)[0] is made[0]


def test_neither_loss_nor_sampling_reads_a_value_back_to_the_host():
    """A meta tensor has no values: reading one raises."""
    head = head_of().to("meta")
    z, uncond, noise = (torch.empty(shape, device="meta") for shape in ((R, E), (R, E), (6, R, D)))
    assert head.sample(z, noise, uncond=uncond, cfg_scale=2.0, temperature=0.9, num_steps=5).shape == (R, D)
    time = head.draw_times(torch.empty(4, R, device="meta"))
    assert head.loss(noise[0], z, time, noise[:4])["loss"].shape == (4, R)


def test_bfloat16_autocast_leaves_losses_and_states_in_float32():
    head, x, noise = head_of(), torch.randn(R, D), torch.randn(2, R, D)
    z, uncond, step_noise = draws(head, 100, "ddpm")
    time = torch.randint(1000, (2, R))
    with torch.no_grad():
        exact, sample = head.loss(x, z, time, noise), head.sample(z, step_noise, num_steps=100)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = head.loss(x, z.bfloat16(), time, noise)
            guided = head.sample(z, step_noise, uncond=uncond, cfg_scale=2.0, num_steps=100)
            plain = head.sample(z, step_noise, num_steps=100)
    assert {t.dtype for t in (*rounded.values(), guided, plain)} == {torch.float32}
    torch.testing.assert_close(rounded["mse"], exact["mse"], rtol=0.05, atol=0.02)
    assert guided.isfinite().all()
    assert (plain - sample).square().mean().sqrt() <= 0.1 * sample.square().mean().sqrt()


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_clipping_keeps_tokens_within_their_bounds(solver):
    """Untrained weights go astray without it."""
    head = head_of()
    z, uncond, noise = draws(head, 10, solver)
    options = {"uncond": uncond, "cfg_scale": 2.0, "num_steps": 10, "solver": solver}
    with torch.no_grad():
        assert head.sample(z, noise, **options).abs().max() > 2
        head.clip_denoised = 0.5
        assert head.sample(z, noise, **options).abs().max() <= 0.5 + 1e-5


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_wide_clipping_changes_nothing(solver):
    head = head_of()
    z, _, noise = draws(head, 10, solver)
    with torch.no_grad():
        free = head.sample(z, noise, num_steps=10, solver=solver)
        head.clip_denoised = 1e9
        torch.testing.assert_close(head.sample(z, noise, num_steps=10, solver=solver), free, rtol=1e-4, atol=1e-3)
