"""MAR's claims: tokens, cells, draws, rules, tables. That they run whole is tested with the other claims."""

from dataclasses import replace

import pytest
import torch

from benchmarks.claims import digits, mar_head, mar_loss, mar_models
from layers.patch import patchify
from layers.tokenizers.base import to_uint8

TINY = {
    "seeds": [0],
    "width": 16,
    "depth": 1,
    "num_heads": 2,
    "head_width": 16,
    "head_depth": 1,
    "steps": 2,
    "batch": 4,
    "samples": 20,
    "sampling_steps": 2,
}
TINY_LOSS = {**mar_loss.SETTINGS, **TINY, "vocab": 8, "speed_batches": [2], "speed_rounds": 1}
TINY_HEAD = {**mar_head.SETTINGS, **TINY, "head_widths": [8, 16], "temperatures": [0.95, 1.0]}


def test_codes_are_the_nearest_of_the_codebook_and_lose_something():
    images = digits.rows(8, "val").images[:50]
    pixels, codes = mar_models.GreyPixels(8, 2), mar_models.GreyCodes(8, 2, 16)
    x, ids = pixels({"image": images}).x, codes({"image": images}).x
    assert x.shape == (50, 16, 4) and ids.shape == (50, 16) and ids.max() < 16
    assert torch.equal(to_uint8(pixels.decode(x)), images)
    distances = (x[..., None, :] - codes.codes).square().sum(-1)  # (B, L, V)
    assert torch.equal(ids, distances.argmin(-1))
    decoded = patchify(codes.decode(ids)[:, :1], 2)
    assert (decoded - x).square().sum(-1) == pytest.approx(distances.amin(-1), abs=1e-5)
    few, many = (mar_models.measure_coded({"vocab": count})["error"] for count in (8, 16))
    assert few > many > 5


def test_mar_s_cells_are_different_models():
    for claim, count in ((mar_loss, 2 + 3 * 7 + 1), (mar_head, 1 + 3 * 3)):
        keys = claim.cells(claim.SETTINGS)
        assert len(set(keys)) == len(keys) == count
    trunks = {model.trunk: mar_models.build(model, TINY_LOSS, 0).net for model in mar_loss.models(TINY_LOSS)}
    raster, random, both = (trunks[name].config for name in (mar_loss.RASTER, mar_loss.RANDOM, "bidirectional"))
    assert (raster.attention, raster.order) == ("causal", "raster")
    assert (random.attention, random.order) == ("causal", "random")
    assert (both.attention, both.order) == ("bidirectional", "random")


def test_mar_s_models_of_a_seed_see_the_same_draws():
    """Known and wanted positions and labels of each step are the same whatever the head is, and differ by step."""
    settings, seen = {**TINY_LOSS, "steps": 6}, {}
    for head in ("diffusion", "categorical", "regression"):
        module = mar_models.build(mar_loss.model_of(settings, "bidirectional", head), settings, 0)
        module.net.register_forward_pre_hook(lambda _, inputs, name=head: seen.setdefault(name, []).append(inputs[1:]))
        digits.train(module, settings, 0, reseed=True)
    for other in ("categorical", "regression"):
        for step, same in zip(seen["diffusion"], seen[other], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(step, same, strict=True))
    assert len({known.shape[1] for known, _, _ in seen["diffusion"]}) > 1


def test_ways_differ_in_their_iterations_only():
    settings = mar_loss.SETTINGS
    one, many = mar_loss.samplings(mar_loss.model_of(settings, "bidirectional", "diffusion"), settings).values()
    assert one.num_iter == 16 and replace(one, num_iter=4) == many
    assert list(mar_loss.samplings(mar_loss.model_of(settings, mar_loss.RASTER, "diffusion"), settings)) == ["one"]


REAL_DIGITS = {"fd_randconv": 0.5, "accuracy": 1.0, "variance_ratio": 1.0}
COLUMNS = {"diffusion": 0, "categorical": 1}


def loss_cells(settings, found):
    """Cells in which `found(variant, head)` is the distance."""
    cells = {mar_loss.REAL: REAL_DIGITS, mar_loss.CODED: {**REAL_DIGITS, "fd_randconv": 0.7, "error": 19.0}}
    cells[mar_loss.SPEED] = {f"batch {size}": {"one": 0.4, "many": 0.1} for size in settings["speed_batches"]}
    for model in mar_loss.models(settings):
        for seed in settings["seeds"]:
            ways = {v.way: found(v, model.head) for v in mar_loss.VARIANTS if v.trunk == model.trunk}
            cells[model.key(seed)] = {way: {**REAL_DIGITS, "fd_randconv": far} for way, far in ways.items()}
    return cells


def as_in_table_1(variant, head):
    return mar_loss.PAPER[variant][COLUMNS[head]] if head in COLUMNS else 101.0


def failing(cells):
    """Numbers of the rules that do not hold, from 1."""
    judged = mar_loss.rules(cells, mar_loss.SETTINGS)
    return [i for i, (holds, _) in enumerate(judged, 1) if not holds]


def changed(trunk=None, way=None, head=None, *, to):
    """The paper's table but for some lines."""

    def found(variant, h):
        hit = trunk in (None, variant.trunk) and way in (None, variant.way) and head in (None, h)
        return to if hit else as_in_table_1(variant, h)

    return found


@pytest.mark.parametrize(
    ("found", "fails"),
    [
        (as_in_table_1, []),
        (changed(mar_loss.RASTER, head="diffusion", to=20.0), [2]),
        (changed(mar_loss.RANDOM, head="diffusion", to=17.0), [3]),
        (changed("bidirectional", head="diffusion", to=9.0), [4, 5, 6]),
        (changed("bidirectional", "many", "categorical", to=12.0), [9]),
        (changed(mar_loss.RANDOM, head="categorical", to=21.0), [7]),
        (changed(mar_loss.RANDOM, head="categorical", to=8.0), [3, 8]),
        (changed(head="regression", to=10.0), [11]),
    ],
)
def test_loss_verdict_follows_its_rules(found, fails):
    cells = loss_cells(mar_loss.SETTINGS, found)
    assert failing(cells) == fails
    text = mar_loss.verdict(cells, mar_loss.SETTINGS)
    assert text.startswith(f"{11 - len(fails)} of 11 rules agree") and text.count("DISAGREES") == len(fails)


def test_loss_verdict_looks_at_the_codebook_and_at_seconds():
    cells = loss_cells(mar_loss.SETTINGS, as_in_table_1)
    cells[mar_loss.CODED] = {**cells[mar_loss.CODED], "fd_randconv": 0.4}
    cells[mar_loss.SPEED] = {**cells[mar_loss.SPEED], "batch 10": {"one": 0.14, "many": 0.1}}
    assert failing(cells) == [1, 10]


def head_cells(settings, by_width, variance, read, cost=1.0):
    """Cells whose distance grows by the share `cost` with the temperature."""
    cells = {mar_head.REAL: REAL_DIGITS}
    for width in settings["head_widths"]:
        at = settings["temperatures"] if width == settings["head_width"] else [1.0]
        ways = {
            mar_head.way(t): {
                "fd_randconv": by_width[width] * (1 + cost * (t - 1)),
                "accuracy": read(t),
                "variance_ratio": variance(t),
            }
            for t in at
        }
        cells |= {mar_head.model_of(width).key(seed): ways for seed in settings["seeds"]}
    return cells


PAPER_WIDTHS = {16: 3.47, 32: 3.24, 64: 2.85}


@pytest.mark.parametrize(
    ("by_width", "variance", "read", "cost", "held"),
    [
        (PAPER_WIDTHS, lambda t: t, lambda t: 1 - t / 2, 1, [True, True, True, True, True]),
        ({16: 3.0, 32: 1.0, 64: 2.0}, lambda t: -t, lambda t: t / 2, -1, [True, False, False, False, False]),
        ({16: 2.0, 32: 3.0, 64: 2.1}, lambda t: abs(t - 0.9), lambda t: 0.9, 1, [False, True, False, False, True]),
    ],
)
def test_head_verdict_follows_its_rules(by_width, variance, read, cost, held):
    settings = mar_head.SETTINGS
    cells = head_cells(settings, by_width, variance, read, cost)
    assert [holds for holds, _ in mar_head.rules(cells, settings)] == held
    assert mar_head.verdict(cells, settings).startswith(f"{sum(held)} of 5 rules agree")


def test_mar_s_tables_stand_beside_the_paper_s_figures():
    loss = mar_loss.tables(loss_cells(mar_loss.SETTINGS, as_in_table_1), mar_loss.SETTINGS).splitlines()
    assert len(loss) == 2 + 2 + 8 + 2 and len({line.count("|") for line in loss}) == 1
    assert any("raster causal, diffusion loss | 19.2 " in line and line.endswith("| 19.23 |") for line in loss)
    assert any("several at a time, cross-entropy | 8.79 " in line and line.endswith("| 8.79 |") for line in loss)
    cells = head_cells(mar_head.SETTINGS, PAPER_WIDTHS, lambda t: t, lambda t: 1 - t / 2)
    head = mar_head.tables(cells, mar_head.SETTINGS).splitlines()
    assert len(head) == 2 + 1 + 3 + 5 and len({line.count("|") for line in head}) == 1
    assert any(line.startswith("| head 16 wide, temperature 1 | 3.47 ") and line.endswith("| 3.47 |") for line in head)
