"""RAR's claim: orders in training, validation and sampling, rules, tables. That it runs whole is tested with the other
claims."""

import math
from itertools import product

import pytest
import torch
from torch import Generator

from benchmarks.claims import digits, rar_orders
from benchmarks.claims.digits import VALIDATION
from benchmarks.claims.rar_orders import ALWAYS_RANDOM, ANNEALED, DRAWN, MODELS, PERMUTED, RASTER_ONLY, SCANS, Model
from layers.orders import scan_order

TINY = {
    "seeds": [0],
    "vocab": 8,
    "width": 16,
    "depth": 1,
    "num_heads": 2,
    "steps": 4,
    "batch": 8,
    "noise_draws": 1,
    "samples": 20,
    "random_orders": 2,
}
TINY_ORDERS = {**rar_orders.SETTINGS, **TINY}
REAL_DIGITS = {"fd_randconv": 0.5, "accuracy": 1.0, "variance_ratio": 1.0}


def recorded(owner, name, kept):
    """Make a function of `owner` keep its arguments."""
    function = getattr(owner, name)
    setattr(owner, name, lambda *args: (kept.append(args), function(*args))[1])


def trained(model):
    """A tiny model after its training, and what each step was given: ids, labels, orders."""
    module, seen = rar_orders.build(model, TINY_ORDERS, 0), []
    recorded(module, "order_loss", seen)
    digits.train(module, TINY_ORDERS, 0, reseed=True)
    module.eval()
    return module, seen


def test_cells_are_different_models():
    keys = rar_orders.cells(rar_orders.SETTINGS)
    assert len(set(keys)) == len(keys) == 2 + 2 * 8
    assert len({model.name() for model in MODELS}) == 8 and SCANS[0] == PERMUTED and PERMUTED in MODELS
    objective = rar_orders.build(Model(ANNEALED, "z_curve"), rar_orders.SETTINGS, 0).objective
    assert (objective.anneal_start, objective.anneal_end, objective.scan) == (500, 750, "z_curve")


@pytest.mark.parametrize("model", MODELS, ids=Model.name)
def test_orders_in_training_are_those_of_the_name(model):
    """Four steps, annealed from 2 to 3: random orders until the third, the scan in the last."""
    module, seen = trained(model)
    scan = torch.tensor(scan_order(model.scan, (4, 4)))
    shares = [(orders != scan).any(1).float().mean().item() for _, _, orders in seen]
    assert module.done == 4 and torch.equal(module.scan, scan)
    expected = {"annealed": [1, 1, 1, 0], "fixed": [0] * 4, "random": [1] * 4}[model.orders]
    assert shares == expected
    assert len({tuple(order) for order in seen[0][2].tolist()}) == (1 if model == RASTER_ONLY else 8)


def test_models_of_a_seed_see_the_same_rows_and_labels():
    steps = [seen for _, seen in map(trained, (PERMUTED, RASTER_ONLY, ALWAYS_RANDOM))]
    for first, *others in zip(*steps, strict=True):
        for other in others:
            assert torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])


@pytest.mark.parametrize("model", [Model(ANNEALED, "spiral_in"), RASTER_ONLY, ALWAYS_RANDOM], ids=Model.name)
def test_validation_is_in_the_orders_in_which_training_ended(model):
    module, seen = trained(model)
    batch = digits.whole(8, "val")
    losses = module.training_loss(batch, Generator().manual_seed(0))
    ids, labels, orders = seen[-1]
    assert module.done == 4 and len(seen) == 5, "validation is no step"
    assert losses["bits"].item() == pytest.approx(losses["loss"].item() / math.log(2))
    assert torch.equal(ids, module.tokenizer(batch).x) and torch.equal(labels, batch["label"])
    distinct = {tuple(order) for order in orders.tolist()}
    if model == ALWAYS_RANDOM:
        assert len(distinct) == len(ids) and torch.equal(orders.sort(1).values, torch.arange(16).expand_as(orders))
    else:
        assert distinct == {tuple(scan_order(model.scan, (4, 4)))}


def test_a_random_model_draws_in_several_orders():
    module, _ = trained(ALWAYS_RANDOM)
    scan, seen = module.scan, []
    recorded(module.net, "positions", seen)
    labels = torch.arange(20) % 10
    with torch.no_grad():
        first, again = (module.sample_tokens(labels, module.sampling, Generator().manual_seed(0)) for _ in range(2))
    orders = [tuple(order.tolist()) for (order,) in seen]
    assert len(set(orders)) == 2 and len(orders) == 4 and tuple(range(16)) not in orders and module.scan is scan
    assert first.shape == (20, 16) and torch.equal(first, again)
    annealed, _ = trained(PERMUTED)
    seen = []
    recorded(annealed.net, "positions", seen)
    annealed.sample(labels)
    assert len(seen) == 1 and torch.equal(seen[0][0], annealed.scan)


def test_rank_correlation():
    assert rar_orders.rank_correlation([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]) == 1
    assert rar_orders.rank_correlation([1.0, 2.0, 3.0], [6.0, 5.0, 4.0]) == -1
    assert rar_orders.rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0]) == pytest.approx(0.8)


# Rules


def cells_of(far, bits):
    """Cells in which distances and bits per id are functions of the model."""
    cells = {name: REAL_DIGITS for name in (rar_orders.REAL, rar_orders.CODED)}
    for model, seed in product(MODELS, rar_orders.SETTINGS["seeds"]):
        drawn = {**REAL_DIGITS, "fd_randconv": far(model) + 0.01 * seed}
        cells[model.key(seed)] = {VALIDATION: {"bits": bits(model)}, DRAWN: drawn}
    return cells


def but(found, **changes):
    """A function of the model with other values for some; names have underscores for spaces."""
    other = {name.replace("_", " "): value for name, value in changes.items()}
    return lambda model: other.get(model.name(), found(model))


def bits_as_expected(model):
    return 2.0 if model == PERMUTED else 2.5


def distance_as_in_the_paper(model):
    return model.paper()


REVERSED = {f"annealed_to_{model.scan}": 4.6 - model.paper() for model in SCANS[1:]}
DASHED = {name.replace("z_curve", "z-curve").replace("l_", "l-"): value for name, value in REVERSED.items()}


@pytest.mark.parametrize(
    ("far", "bits", "fails"),
    [
        (distance_as_in_the_paper, bits_as_expected, []),
        (but(distance_as_in_the_paper, raster_only=2.0), bits_as_expected, [1, 6]),
        (but(distance_as_in_the_paper, always_random=2.0), bits_as_expected, [2]),
        (distance_as_in_the_paper, but(bits_as_expected, raster_only=1.9), [3]),
        (distance_as_in_the_paper, but(bits_as_expected, always_random=1.9), [4]),
        (but(distance_as_in_the_paper, annealed_to_alternate=2.0), bits_as_expected, [5, 7]),
        (but(distance_as_in_the_paper, annealed_to_subsample=3.2), bits_as_expected, [6]),
        (but(distance_as_in_the_paper, **DASHED), bits_as_expected, [5, 7]),
    ],
)
def test_verdict_follows_its_rules(far, bits, fails):
    cells, settings = cells_of(far, bits), rar_orders.SETTINGS
    assert [i for i, (holds, _) in enumerate(rar_orders.rules(cells, settings), 1) if not holds] == fails
    text = rar_orders.verdict(cells, settings)
    assert text.startswith(f"{7 - len(fails)} of 7 rules agree") and "differ by up to 0.01" in text


def test_table_has_a_line_per_model():
    cells = cells_of(distance_as_in_the_paper, bits_as_expected)
    lines = rar_orders.tables(cells, TINY_ORDERS).splitlines()
    assert len(lines) == 2 + 2 + 8 and len({line.count("|") for line in lines}) == 1
    assert lines[-1] == "| annealed to spiral-in | 2.5 | 2.5 | 1 | 1 | 2.50 |"
