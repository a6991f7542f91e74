"""The claims ledger: cells kept and resumed, sections, determinism; each claim whole, on a tiny budget; and that
docs/claims.md is what the stored results give."""

import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from benchmarks.claims import digits, jit_prediction, jit_toy, ledger
from benchmarks.claims.ledger import Claim, Places
from tests.test_claims_dart import TINY_HISTORY
from tests.test_claims_givt import TINY_MIXTURE, TINY_SAMPLING
from tests.test_claims_jetformer import TINY_FLOW, TINY_RECIPE
from tests.test_claims_mar import TINY_HEAD, TINY_LOSS
from tests.test_claims_rar import TINY_ORDERS

QUICK = {"jit_toy"}
QUICK_FIRST = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ledger.CLAIMS]
TINY = {
    "jit_toy": {
        **jit_toy.SETTINGS,
        "dims": [2, 6],
        "seeds": [0, 1],
        "steps": 3,
        "batch": 16,
        "width": 8,
        "sampling_steps": 3,
        "samples": 20,
        "reference": 50,
    },
    "jit_prediction": {
        **jit_prediction.SETTINGS,
        "seeds": [0],
        "width": 16,
        "depth": 1,
        "num_heads": 2,
        "steps": 2,
        "batch": 4,
        "p_means": [0.0],
        "ranks": [8],
        "samples": 20,
        "sampling_steps": 2,
    },
    "mar_loss": TINY_LOSS,
    "mar_head": TINY_HEAD,
    "givt_mixture": TINY_MIXTURE,
    "givt_sampling": TINY_SAMPLING,
    "jetformer_flow": TINY_FLOW,
    "jetformer_recipe": TINY_RECIPE,
    "rar_orders": TINY_ORDERS,
    "dart_history": TINY_HISTORY,
}


@pytest.fixture
def places(tmp_path):
    return Places(tmp_path / "results", tmp_path / "docs/claims.md", tmp_path / "docs/claims", tmp_path / "runs")


def counting(computed: list[str]) -> Claim:
    """A claim whose three cells hold the square of their number; a key ending in ! fails."""

    def compute(key, settings):
        computed.append(key)
        if key.endswith(settings.get("fails", "!")):
            raise ValueError(f"{key} was stopped")
        return {"square": int(key) ** 2, "points": [1]}

    return Claim(
        name="jit_toy",
        title="Squares",
        statement="They grow.",
        setting=lambda settings: "Ours.",
        settings={"count": 3},
        cells=lambda settings: [str(i) for i in range(settings["count"])],
        compute=compute,
        verdict=lambda cells, settings: f"sum {sum(cell['square'] for cell in cells.values())}",
        tables=lambda cells, settings: ledger.markdown_table(["n"], [[key] for key in cells]),
        draw=lambda cells, settings, path: path.write_text(str([cell["points"] for cell in cells.values()])),
        caption="A picture.",
    )


@pytest.fixture
def squares(monkeypatch):
    computed = []
    claim = counting(computed)
    monkeypatch.setattr(ledger, "find", lambda name: claim)
    monkeypatch.setattr(ledger, "CLAIMS", ("jit_toy",))
    return claim, computed


def test_a_stopped_run_goes_on_and_gives_the_same(squares, places):
    claim, computed = squares
    with pytest.raises(ValueError, match="2 was stopped"):
        ledger.run(claim, settings={"count": 3, "fails": "2"}, places=places)
    assert computed == ["0", "1", "2"] and not places.ledger.exists() and not places.results.exists()
    for file in (places.work / "jit_toy").glob("*.json"):  # as if the same settings had been stopped by hand
        kept = json.loads(file.read_text())
        file.write_text(json.dumps({**kept, "settings": {"count": 3}}))
    computed.clear()
    ledger.run(claim, places=places)
    assert computed == ["2"]
    stored = json.loads((places.results / "jit_toy.json").read_text())
    assert {key: cell["square"] for key, cell in stored["cells"].items()} == {"0": 0, "1": 1, "2": 4}
    assert "points" not in stored["cells"]["0"] and (places.pictures / "jit_toy.png").read_text() == "[[1], [1], [1]]"
    computed.clear()
    ledger.run(claim, places=places)
    assert computed == ["0", "1", "2"], "a finished run is computed anew"


def test_cells_of_other_settings_do_not_count(squares, places):
    claim, computed = squares
    with pytest.raises(ValueError):
        ledger.run(claim, settings={"count": 3, "fails": "2"}, places=places)
    computed.clear()
    ledger.run(claim, settings={"count": 2}, places=places)
    assert computed == ["0", "1"]


def test_ledger_replaces_its_sections_and_nothing_else(squares, places):
    claim, _ = squares
    ledger.run(claim, places=places)
    text = places.ledger.read_text()
    assert text.startswith("# Claims") and "sum 5" in text and "![A picture.](claims/jit_toy.png)" in text
    places.ledger.write_text(text.replace("sum 5", "sum 6") + "\nKept by hand.\n")
    ledger.write_ledger(places)
    assert places.ledger.read_text() == text + "\nKept by hand.\n"
    ledger.run(claim, settings={"count": 2}, places=places)
    assert "sum 1" in places.ledger.read_text() and places.ledger.read_text().count("## Squares") == 1


@pytest.mark.parametrize("marker", ["<!-- claim jit_toy -->", "<!-- end of jit_toy -->"])
def test_a_lone_marker_is_an_error(marker):
    with pytest.raises(ValueError, match="only one of the markers"):
        ledger.replace_section(f"text {marker} text", "jit_toy", "body")


def test_floats_are_rounded_in_groups_too(monkeypatch):
    claim = counting([])
    cell = {"way": {"figure": 1 / 3, "count": 2}, "plain": 2 / 3, "points": {"way": [[1]]}}
    monkeypatch.setattr(ledger, "find", lambda name: replace(claim, compute=lambda key, settings: cell))
    _, found = ledger.compute_cell("jit_toy", "0", {})
    assert found.pop("seconds") >= 0
    assert found == {"way": {"figure": 0.333333, "count": 2}, "plain": 0.666667, "points": {"way": [[1]]}}


def test_spread_gives_the_mean_and_the_range():
    assert ledger.spread([1.0, 2.0, 6.0]) == "3 (1 to 6)"
    assert ledger.spread([0.12345]) == ledger.spread([0.1234, 0.1231]) == "0.123"


def test_the_ledger_is_what_the_stored_results_give():
    real = Places()
    stored = [name for name in ledger.CLAIMS if (real.results / f"{name}.json").exists()]
    text = real.ledger.read_text() if stored else ledger.HEADER
    assert ledger.updated(text) == text, "run python -m benchmarks.claims.ledger"
    for name in stored:
        results = json.loads((real.results / f"{name}.json").read_text())
        assert results["settings"] == ledger.find(name).settings, f"run python -m benchmarks.claims.{name}"
        assert list(results["cells"]) == ledger.find(name).cells(results["settings"])
        picture = real.pictures / f"{name}.png"
        assert 1000 < picture.stat().st_size < 300_000


@pytest.mark.parametrize("name", QUICK_FIRST)
def test_a_claim_runs_whole(name, places):
    claim = ledger.find(name)
    assert claim.name == name
    ledger.run(claim, settings=TINY[name], places=places)
    results = json.loads((places.results / f"{name}.json").read_text())
    assert list(results["cells"]) == claim.cells(TINY[name])
    text = places.ledger.read_text()
    for part in (claim.title, f"python -m benchmarks.claims.{name}", "gree", "| ---: |", f"claims/{name}.png"):
        assert part in text
    assert "nan" not in text and "inf" not in text
    assert min(Image.open(places.pictures / f"{name}.png").size) > 100
    assert not (places.work / name).exists()


@pytest.mark.parametrize("name", QUICK_FIRST)
def test_a_cell_depends_on_its_key_alone(name):
    claim = ledger.find(name)
    key = claim.cells(TINY[name])[1]
    first = claim.compute(key, TINY[name])
    torch.rand(7)
    assert claim.compute(key, TINY[name]) == first
    assert json.loads(json.dumps(first)) == first


@pytest.mark.slow
def test_two_processes_compute_what_one_does(places):
    settings = {**TINY["jit_toy"], "dims": [2], "predictions": ["x", "eps", "v"], "seeds": [0]}
    ledger.run(jit_toy.CLAIM, settings=settings, places=places, workers=2)
    found = json.loads((places.results / "jit_toy.json").read_text())["cells"]
    key = "D=2 v seed 0"
    _, alone = ledger.compute_cell("jit_toy", key, settings)
    assert {n: v for n, v in found[key].items() if n != "seconds"} == {
        n: v for n, v in alone.items() if n not in ("seconds", "points")
    }


# the toy's setting and figures


def test_the_spiral_is_the_curve():
    points = jit_toy.spiral(5000, jit_toy.stream(0, jit_toy.DATA))
    radius, angle = points.norm(dim=1), torch.atan2(points[:, 1], points[:, 0])
    turns = (radius * 7.2 - angle) / (2 * math.pi)
    assert torch.allclose(turns, turns.round(), atol=1e-4) and 1.7 < radius.max() < 4 * math.pi / 7.2 + 1e-4
    assert (radius < 4 * math.pi / 7.2 / math.sqrt(2)).float().mean() == pytest.approx(0.5, abs=0.03)


def test_figures_of_a_known_set():
    basis = jit_toy.embedding(5, jit_toy.stream(0, jit_toy.MAP))
    assert torch.allclose(basis.T @ basis, torch.eye(2), atol=1e-6)
    reference = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    outside = torch.linalg.qr(torch.cat([basis, torch.randn(5, 3)], 1)).Q[:, 2]
    samples = torch.tensor([[0.0, 1.0], [0.0, 2.0]]) @ basis.T + 7 * outside
    found = jit_toy.measure(samples, basis, reference)
    assert found["sample_to_data"] == pytest.approx(1.5, abs=1e-4)
    assert found["data_to_sample"] == pytest.approx((1 + math.sqrt(10)) / 2, abs=1e-4)
    assert found["off_plane"] == pytest.approx(7.0, abs=1e-4)


def test_toy_learns_and_x_prediction_leaves_the_solver_s_noise_only():
    """At D = 64 the noise outside the plane is that of a perfect predictor: 0.01714 per dimension."""
    settings = {**jit_toy.SETTINGS, "dims": [64], "steps": 150, "batch": 256, "samples": 300, "reference": 1000}
    cell = jit_toy.compute("D=64 x seed 0", settings)
    assert cell["sample_to_data"] < 0.3
    assert cell["off_plane"] == pytest.approx(0.0171360 * math.sqrt(62), rel=0.1)


def toy_cells():
    cell = {"loss": 1.0, "sample_to_data": 0.04, "data_to_sample": 0.01, "off_plane": 0.4, "seconds": 1.0}
    cells = {key: dict(cell) for key in jit_toy.cells(TINY["jit_toy"])}
    for key in cells:
        if key.startswith("D=6 ") and " x " not in key:
            cells[key]["off_plane"] = 20.0
    return cells


def test_toy_verdict_follows_its_rule():
    assert jit_toy.verdict(toy_cells(), TINY["jit_toy"]).startswith("Agrees")
    near = {"D=6 x seed 0": {"sample_to_data": 0.2}}
    weak = {"D=6 v seed 0": {"off_plane": 1.0}, "D=6 v seed 1": {"off_plane": 1.0}}
    for changes in (near, weak):
        cells = toy_cells()
        for key, value in changes.items():
            cells[key].update(value)
        assert jit_toy.verdict(cells, TINY["jit_toy"]).startswith("DISAGREES")


# prediction spaces on the digits


def test_patches_exceed_the_width_at_one_size_only():
    settings = jit_prediction.SETTINGS
    wide, narrow = (
        jit_prediction.build(jit_prediction.grid(settings, size)[0], settings, 0)
        for size in (jit_prediction.WIDE, jit_prediction.NARROW)
    )
    assert wide.tokenizer.token_dim == 768 == 12 * settings["width"] and narrow.tokenizer.token_dim == 48
    assert wide.tokenizer.seq_len == narrow.tokenizer.seq_len == 4
    assert wide.objective.noise_scale == 4 * narrow.objective.noise_scale == 4
    blocks = zip(wide.net.blocks.parameters(), narrow.net.blocks.parameters(), strict=True)
    assert all(a.shape == b.shape for a, b in blocks)


def test_all_cells_are_different_models():
    settings = jit_prediction.SETTINGS
    keys = jit_prediction.cells(settings)
    assert len(set(keys)) == len(keys) == 1 + len(settings["seeds"]) * (9 + 9 + 3 + 9)


def test_models_of_a_seed_see_the_same_batches():
    """Rows and times of the loss are the same whatever is predicted."""
    settings, seen = TINY["jit_prediction"], {}
    for model in jit_prediction.grid(settings, jit_prediction.NARROW)[:2]:
        module = jit_prediction.build(model, settings, 0)
        module.net.register_forward_pre_hook(
            lambda _, inputs, name=model.prediction: seen.setdefault(name, []).append(inputs)
        )
        digits.train(module, settings, 0)
    for (z, t, labels), (other_z, other_t, other_labels) in zip(seen["x"], seen["eps"], strict=True):
        assert torch.equal(z, other_z) and torch.equal(t, other_t) and torch.equal(labels, other_labels)


def test_figures_of_real_digits_and_of_noise():
    rows = digits.rows(32, "val")
    real = digits.measure(rows.images, rows.labels)
    noisy = (rows.images.int() + torch.randint(-120, 121, rows.images.shape)).clamp(0, 255).to(torch.uint8)
    worse = digits.measure(noisy, rows.labels)
    assert real["noise"] == 0 and real["accuracy"] > 0.95 and real["fd_randconv"] < 1
    assert worse["noise"] > 30 and worse["fd_randconv"] > 3 * real["fd_randconv"]
    small = digits.measure(digits.rows(8, "val").images, rows.labels)
    assert small["fd_randconv"] == pytest.approx(real["fd_randconv"])


def prediction_cells(settings, found, accuracy=lambda model: 0.9):
    cells = {jit_prediction.REAL: {"fd_randconv": 0.5, "accuracy": 1.0, "variance_ratio": 1.0, "noise": 0.0}}
    for model in jit_prediction.models(settings):
        for seed in settings["seeds"]:
            figures = {"fd_randconv": found(model), "accuracy": accuracy(model)}
            cells[model.key(seed)] = {**cells[jit_prediction.REAL], **figures}
    return cells


def as_in_the_paper(model):
    if model.size == jit_prediction.NARROW:
        return 3.5
    if model.prediction != "x":
        return 100.0
    return {0.0: 14.4, -0.4: 9.8, -0.8: 8.6, -1.2: 9.0}[model.p_mean] - 0.1 * (model.rank < 64)


@pytest.mark.parametrize(
    ("found", "accuracy", "held"),
    [
        (as_in_the_paper, lambda model: 0.9, [True, True, True, True, True]),
        (as_in_the_paper, lambda model: 0.3, [False, False, True, True, False]),
        (lambda model: 1.0, lambda model: 0.9, [False, True, False, True, True]),
        (lambda model: 1.0 + (model.rank < 64), lambda model: 0.9, [False, True, False, True, False]),
        (lambda model: 2.0 + model.p_mean, lambda model: 0.9, [False, True, False, True, True]),
        (lambda model: 2.0 - model.p_mean, lambda model: 0.9, [False, True, False, False, True]),
    ],
)
def test_prediction_verdict_follows_its_rules(found, accuracy, held):
    settings = jit_prediction.SETTINGS
    cells = prediction_cells(settings, found, accuracy)
    assert [holds for holds, _ in jit_prediction.rules(cells, settings)] == held
    text = jit_prediction.verdict(cells, settings)
    assert text.startswith(f"{sum(held)} of 5 rules agree") and text.count("DISAGREES") == 5 - sum(held)


def test_tables_stand_beside_the_paper_s_figures():
    settings = jit_prediction.SETTINGS
    table = jit_prediction.tables(prediction_cells(settings, as_in_the_paper), settings).splitlines()
    assert len(table) == 2 + 1 + 9 + 9 + 9 + 3 and len({line.count("|") for line in table}) == 1
    assert any("768, x-prediction, v-loss" in line and line.endswith("| 8.62 |") for line in table)
    assert any("768, v-prediction, v-loss, P_mean -1.2" in line and line.endswith("| 106.85 |") for line in table)
