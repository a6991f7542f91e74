"""NOMAD: statistics of the forward process, conversions, weights, and the samplers as functions of callables.

The tables of the golden folder are compared in tests/methods/test_dart.py.
"""

import numpy as np
import pytest
import torch

from layers.diffusion.nomad import SCHEDULES, WEIGHTS, Nomad, clean, loss_weights, mix, nomad_tables, velocity
from layers.samplers.nomad import Prediction, denoise, denoise_tokens

DRAWS = 1_000_000
schedules = pytest.mark.parametrize("schedule", SCHEDULES)


@schedules
def test_copies_of_a_fixed_image_have_their_mean_their_variance_and_nothing_in_common(schedule):
    num_steps, value = 5, 0.8
    process = Nomad(num_steps, schedule)
    x = torch.full((DRAWS, 1, 1), value)
    x_t = process.noised(x, torch.randn(DRAWS, num_steps, 1, 1)).view(DRAWS, num_steps).double()
    gamma = process.gamma.flatten().double()
    error = 5 / DRAWS**0.5
    torch.testing.assert_close(x_t.mean(0), gamma.sqrt() * value, atol=error, rtol=0)
    torch.testing.assert_close(x_t.var(0), 1 - gamma, atol=2 * error, rtol=0)
    between = torch.corrcoef((x_t - x_t.mean(0)).T) - torch.eye(num_steps)  # of a Markov chain far from 0
    assert between.abs().max() < error


@schedules
@pytest.mark.parametrize("num_steps", [2, 7, 16])
def test_steps_run_from_pure_noise_to_nearly_the_image(schedule, num_steps):
    process = Nomad(num_steps, schedule)
    assert process.gammas[0] == 0 and np.all(np.diff(process.gammas) > 0)
    assert process.gamma.flatten().tolist() == pytest.approx(process.gammas, rel=1e-6)
    assert process.gammas[-1] < 1 and not process.state_dict()


@schedules
def test_all_copies_of_the_matched_schedule_know_what_one_of_the_direct_one_does(schedule):
    direct, matched = nomad_tables(9, "direct"), nomad_tables(9, "matched")
    np.testing.assert_allclose(matched.cumulative, direct.snr, rtol=1e-12)
    tables = nomad_tables(9, schedule)
    np.testing.assert_allclose(tables.cumulative, [tables.snr[t:].sum() for t in range(9)], rtol=1e-12)


def test_velocity_and_image_say_the_same_and_the_loss_is_a_weighted_error_of_either():
    process = Nomad(6)
    x, noise, error = torch.randn(3, 4, 2), torch.randn(3, 6, 4, 2), torch.randn(3, 6, 4, 2)
    x_t, v = process.noised(x, noise), velocity(x[:, None], noise, process.gamma)
    torch.testing.assert_close(process.clean(x_t, v), x[:, None].expand_as(x_t), atol=1e-5, rtol=1e-5)
    squares_v = error.square()
    squares_x = (process.clean(x_t, v + error) - x[:, None]).square()
    snr = process.gamma / (1 - process.gamma)
    torch.testing.assert_close(squares_v, (1 + snr) * squares_x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(process.loss(v, x, noise), torch.zeros(()), atol=1e-10, rtol=0)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_loss_is_the_error_of_the_image_under_weights_of_mean_one(weight):
    process, tables = Nomad(6, "direct", weight), nomad_tables(6, "direct")
    x, noise, v = torch.randn(3, 4, 2), torch.randn(3, 6, 4, 2), torch.randn(3, 6, 4, 2)
    weights = loss_weights(tables, weight)[::-1]  # noise first
    squares = (process.clean(process.noised(x, noise), v) - x[:, None]).square().mean((0, 2, 3))
    expected = np.mean(weights / weights.mean() * squares.numpy())
    assert process.loss(v, x, noise).item() == pytest.approx(expected, rel=1e-4)


def test_no_step_is_without_weight():
    tables = nomad_tables(8, "direct")
    for weight in WEIGHTS:
        assert loss_weights(tables, weight).min() > 0, weight
    floored = loss_weights(tables, "snr_cum")
    assert tables.cumulative[-1] == 0 and floored[-1] == floored[-2] == tables.cumulative[-2]
    np.testing.assert_allclose(loss_weights(tables, "elbo")[:2], tables.snr[0] / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, "direct", "v"), "num_steps is 1: .* at least 2"),
        ((4, "linear", "v"), "schedule is 'linear': use direct or matched"),
        ((4, "direct", "snr"), "weight is 'snr': use v, snr_cum, elbo, x0"),
    ],
)
def test_unknown_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Nomad(*arguments)


GAMMAS = [0.0, 0.4, 0.9]


def test_each_copy_is_drawn_from_the_prediction_and_the_last_prediction_comes_back():
    noise, seen = torch.randn(2, 3, 4, 5), []

    def predict(x_t, i):
        seen.append(x_t)
        return Prediction(torch.full_like(x_t, i + 1.0), x_t)

    out = denoise(predict, noise, GAMMAS)
    assert torch.equal(out, torch.full_like(out, 3.0)) and torch.equal(seen[0], noise[:, 0])
    for i in (1, 2):
        torch.testing.assert_close(seen[i], mix(torch.full_like(out, i), noise[:, i], GAMMAS[i]))


def test_a_refinement_moves_what_was_drawn_and_nothing_after_the_last_step():
    noise, calls = torch.randn(2, 3, 4, 5), []

    def refine(x, prediction):
        calls.append(prediction)
        return x + 100

    seen = []
    denoise(lambda x_t, i: seen.append(x_t) or Prediction(x_t, x_t), noise, GAMMAS, refine=refine)
    assert len(calls) == 2 and torch.equal(calls[0].hidden, noise[:, 0])
    assert seen[1].mean() > 90


def test_tokens_in_turn_see_their_own_noisy_form_and_enter_once():
    batch, num_steps, block, dim = 2, 3, 4, 5
    noise, entered, asked = torch.randn(batch, num_steps, block, dim), [], []

    def advance(x):
        entered.append(x)
        return torch.cat(entered, dim=1).sum(1)  # a state that depends on all so far

    def predict(state, x_t, i):
        asked.append((x_t, i))
        return clean(x_t, state, GAMMAS[i])

    out = denoise_tokens(advance, predict, noise, GAMMAS)
    assert [x.shape[1] for x in entered] == [block] + [1] * (num_steps * block - 1)
    sequence = torch.cat([*entered, out[:, -1:]], dim=1)  # the last token is never read
    assert torch.equal(out, sequence[:, -block:])
    for j, (x_t, i) in enumerate(asked):
        assert i == j // block and torch.equal(x_t, sequence[:, j])
        state = sequence[:, : block + j].sum(1)
        drawn = clean(x_t, state, GAMMAS[i])
        if i + 1 < num_steps:
            drawn = mix(drawn, noise[:, i + 1, j % block], GAMMAS[i + 1])
        torch.testing.assert_close(sequence[:, block + j], drawn, atol=1e-3, rtol=1e-4)
