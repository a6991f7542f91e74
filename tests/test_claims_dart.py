"""DART's claim: networks with and without memory, errors by step, two points, rules, tables. That it runs whole is
tested with the other claims."""

from itertools import product

import pytest
import torch
from torch import Generator

from benchmarks.claims import dart_history, dart_models, digits
from benchmarks.claims.dart_history import VALIDATION, exact_key, memory, on_points
from benchmarks.claims.dart_models import DRAWN, POINTS, Model, step_name
from layers.diffusion.nomad import Nomad
from lightning_modules.callbacks.ema import EMA

TINY = {
    "seeds": [0],
    "num_steps": 3,
    "width": 32,
    "depth": 1,
    "num_heads": 2,
    "mlp_hidden": 32,
    "head_width": 16,
    "head_depth": 1,
    "steps": 2,
    "batch": 4,
    "noise_draws": 1,
    "samples": 20,
    POINTS: {"num_steps": [3], "width": 16, "depth": 1, "num_heads": 1, "mlp_hidden": 16, "rows": 8, "draws": 50},
}
TINY_HISTORY = {**dart_history.SETTINGS, **TINY}
REAL_DIGITS = {"fd_randconv": 0.5, "accuracy": 1.0, "variance_ratio": 1.0}


def modulated(history, settings=TINY_HISTORY):
    """A tiny model whose blocks and velocities are not the identity and 0, as they are at first."""
    module = dart_models.build(memory(settings, history), settings, 0)
    generator = Generator().manual_seed(1)
    for layer in (module.net.linear, module.net.adaLN_modulation[1]):
        layer.weight.data = torch.randn(layer.weight.shape, generator=generator)
    return module.eval()


@torch.no_grad()
def outputs(module, x_t):
    """h (B, T, K, E) of copies (B, T, K, D) of class 3."""
    condition = module.net.of_classes(torch.full((len(x_t),), 3))
    return module.net(x_t.flatten(1, 2), condition).unflatten(1, x_t.shape[1:3])


# Memory


def test_cells_are_different_models():
    keys = dart_history.cells(dart_history.SETTINGS)
    assert len(set(keys)) == len(keys) == 1 + 2 * (2 + 2 * 2) + 2
    flows = [dart_models.build(Model(3, POINTS, flow=flow), on_points(TINY_HISTORY), 0).has_flow for flow in (0, 1)]
    assert flows == [False, True]


def test_networks_with_and_without_memory_have_the_same_weights():
    with_memory, without = (dart_models.build(memory(TINY_HISTORY, h), TINY_HISTORY, 0) for h in (True, False))
    states = with_memory.state_dict(), without.state_dict()
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def test_without_memory_only_the_copy_itself_is_read():
    x_t = torch.randn(2, 3, 4, 16, generator=Generator().manual_seed(0))
    other = x_t.clone()
    other[:, 0] += 1.0
    with_memory, without = (modulated(history) for history in (True, False))
    torch.testing.assert_close(outputs(with_memory, x_t)[:, 0], outputs(without, x_t)[:, 0])
    changed = [(outputs(m, other) - outputs(m, x_t)).abs().amax((0, 2, 3)) for m in (with_memory, without)]
    assert (changed[0] > 1e-3).all()
    assert changed[1][0] > 1e-3 and changed[1][1:].max() < 1e-5
    other = x_t.clone()
    other[:, 1, 3] += 1.0
    assert ((outputs(without, other) - outputs(without, x_t))[:, 1].abs().amax(-1) > 1e-5).all(), "attention in a copy"


@torch.no_grad()
def test_without_memory_sampling_reads_as_training_does():
    module = modulated(False)
    x_t = torch.randn(2, 3, 4, 16, generator=Generator().manual_seed(0))
    advance = module.decoder.start(module.net.of_classes(torch.tensor([3, 3])), 2)
    found = torch.stack([advance(copy) for copy in x_t.unbind(1)], dim=1)
    torch.testing.assert_close(found, outputs(module, x_t))


def test_models_of_a_seed_see_the_same_copies():
    seen = {}
    for history in (True, False):
        module = dart_models.build(memory(TINY_HISTORY, history), TINY_HISTORY, 0)
        kept = seen[history] = []
        module.net.register_forward_pre_hook(lambda _, inputs, kept=kept: kept.append(inputs[0]))
        digits.train(module, TINY_HISTORY, 0, reseed=True)
    assert len(seen[True]) == 2 and not torch.equal(*seen[True])
    assert all(torch.equal(a, b) for a, b in zip(seen[True], seen[False], strict=True))


def test_errors_are_those_of_the_loss():
    """An error of x_0 is one of v times sqrt(1 - gamma), and the loss is the mean of v's."""
    module, average, batch = modulated(True), EMA([0.5]), digits.whole(8, "val")
    average.start(module)
    found = dart_models.errors(module, average, batch, 4)
    gamma = module.processes[0].gamma.flatten()
    of_v = [found[step_name(3 - i)] / (1 - g) for i, g in enumerate(gamma.tolist())]
    weight = (module.processes[0].v_weight.flatten() * torch.tensor(of_v)).mean().item()
    assert weight == pytest.approx(digits.validate(module, average, batch, 4)["loss"], rel=0.02)
    assert list(found) == [step_name(t) for t in (3, 2, 1)]


# Two points


@pytest.mark.parametrize("num_steps", [2, 3, 4])
def test_reachable_is_the_share_where_copies_are_true(num_steps):
    process, x = Nomad(num_steps), dart_models.two_points(100_000)["raw"]
    x_t = process.noised(x, torch.randn(len(x), num_steps, 1, 1, generator=Generator().manual_seed(0)))
    best = (process.gamma.sqrt() / (1 - process.gamma) * x_t).sum(1).tanh().flatten()
    assert dart_models.reachable(num_steps) == pytest.approx(dart_models.measured(best)[DRAWN]["near"], abs=0.005)


def test_plain_draws_by_the_best_prediction_fall_between_the_points():
    few, more = (dart_models.compute_exact(steps, {"draws": 20_000}, 0)[DRAWN] for steps in (3, 8))
    assert 0.8 < few["near"] < dart_models.reachable(3) - 0.05 and more["near"] > 0.99
    assert few["positive"] == pytest.approx(0.5, abs=0.02)


def test_figures_of_draws():
    found = dart_models.measured(torch.tensor([-1.0, 1.4, 0.6, 0.4, -1.6, 0.0, 0.9, 0.1]))
    assert found[DRAWN] == {"near": 0.5, "positive": 0.625} and len(found["points"][DRAWN]) == 8
    rows = dart_models.two_points(6)
    assert rows["raw"].flatten().tolist() == [-1, 1] * 3 and rows["raw"].shape == (6, 1, 1)


# Rules


def cells_of(*, error, far=0.5, variance=0.8, plain=0.7, moved=0.9, best=0.8):
    """Cells in which the model with memory has these figures, and `error` at each step, t = T first."""
    settings, cells = dart_history.SETTINGS, {dart_history.REAL: REAL_DIGITS}
    for seed, history in product(settings["seeds"], (True, False)):
        distance, ratio = (far, variance) if history else (0.55, 0.6)
        values = zip(dart_history.times(settings), error, strict=True)
        found = {step_name(t): value if history else 1.0 for t, value in values}
        cells[memory(settings, history).key(seed)] = {
            VALIDATION: found,
            DRAWN: {"fd_randconv": distance, "accuracy": 1.0, "variance_ratio": ratio},
        }
    for seed, num_steps in product(settings["seeds"], settings[POINTS]["num_steps"]):
        for flow, near in ((False, plain), (True, moved)):
            cells[Model(num_steps, POINTS, flow=flow).key(seed)] = {DRAWN: {"near": near, "positive": 0.5}}
        cells[exact_key(num_steps)] = {DRAWN: {"near": best, "positive": 0.5}}
    return cells


ERROR = [1.0, *[0.8] * 7]  # of 8 steps


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        ({}, []),
        ({"error": [1.0, *[0.8] * 6, 1.01]}, [1]),
        ({"error": [0.9, *[0.8] * 7]}, [2]),
        ({"far": 0.6}, [3]),
        ({"variance": 1.5}, [4]),
        ({"best": 0.94}, [5]),
        ({"plain": 0.95, "moved": 0.951}, [5, 6]),
        ({"moved": 0.8}, [6]),
    ],
)
def test_verdict_follows_its_rules(changes, fails):
    cells, settings = cells_of(**{"error": ERROR, **changes}), dart_history.SETTINGS
    assert [i for i, (holds, _) in enumerate(dart_history.rules(cells, settings), 1) if not holds] == fails
    assert dart_history.verdict(cells, settings).startswith(f"{6 - len(fails)} of 6 rules agree")


def test_tables_have_a_line_per_model():
    drawn, errors, points = dart_history.tables(cells_of(error=ERROR), dart_history.SETTINGS).split("\n\n")
    assert len(drawn.splitlines()) == 2 + 3 and len(errors.splitlines()) == 2 + 2 and len(points.splitlines()) == 2 + 8
    assert "| all noisier copies | 1 | 0.8 |" in errors and "| 3 steps, best of true copies | 0.953 | 0.5 |" in points
    for table in (drawn, errors, points):
        assert len({line.count("|") for line in table.splitlines()}) == 1
