"""GIVT's claims: cells, rows and noise, likelihoods, the test of equal laws, rules, tables. That they run whole is
tested with the other claims."""

import math
from itertools import product

import pytest
import torch
from torch import Generator

from benchmarks.claims import digits, givt_mixture, givt_models, givt_sampling
from benchmarks.claims.digits import VALIDATION
from benchmarks.claims.givt_models import KNOWN, Model
from layers.likelihood import bits_per_dim
from layers.tokenizers.base import to_uint8
from lightning_modules.givt import GIVTSampling

TINY = {
    "seeds": [0],
    "width": 16,
    "depth": 1,
    "num_heads": 2,
    "adapter_blocks": 2,
    "bottleneck": 8,
    "steps": 2,
    "batch": 4,
    "noise_draws": 1,
    "samples": 20,
}
TINY_MIXTURE = {**givt_mixture.SETTINGS, **TINY, "mixtures": [1, 2]}
TINY_SAMPLING = {
    **givt_sampling.SETTINGS,
    **TINY,
    "num_mixtures": 2,
    "temperatures": [0.95, 1.0],
    "cfg_scales": [1.0, 1.4, 2.0],
    "beams": [1, 2],
    "fans": 2,
    "permutations": 9,
}
REAL_DIGITS = {"fd_randconv": 0.5, "accuracy": 1.0, "variance_ratio": 1.0}


# Models, rows, likelihoods


def test_givt_s_cells_are_different_models():
    for claim, count in ((givt_mixture, 1 + 3 * (7 + 3)), (givt_sampling, 1 + 3)):
        keys = claim.cells(claim.SETTINGS)
        assert len(set(keys)) == len(keys) == count
    names = [model.name() for model in givt_mixture.on_digits(givt_mixture.SETTINGS)]
    assert len(set(names)) == len(names)


def test_a_model_is_what_its_name_says():
    for model in givt_mixture.models(TINY_MIXTURE):
        module = givt_models.build(model, TINY_MIXTURE, 0)
        assert (module.head.num_mixtures, module.head.kind) == (model.num_mixtures, model.kind)
        assert (module.adapter is not None) == model.adapter and module.causal
        assert bool(module.head.linear.weight.any()) == (model.init == "spread")
        assert module.tokenizer.seq_len == 16 and module.tokenizer.token_dim == (2 if model.rows == KNOWN else 4)


def test_givt_s_models_of_a_seed_see_the_same_rows_and_noise():
    seen = {}
    for model in givt_mixture.on_digits(TINY_MIXTURE):
        module = givt_models.build(model, TINY_MIXTURE, 0)
        steps = seen.setdefault(model, [])
        module.tokenizer.register_forward_hook(lambda _, inputs, out, steps=steps: steps.append(out.x))
        module.net.register_forward_pre_hook(lambda _, inputs, steps=steps: steps.append(inputs[1]))
        digits.train(module, TINY_MIXTURE, 0)
    first, *others = seen.values()
    assert len(first) == 2 * TINY["steps"] and not torch.equal(first[0], first[2])
    for steps in others:
        assert all(torch.equal(a, b) for a, b in zip(first, steps, strict=True))


def test_levels_are_those_of_the_digits():
    images, tokenizer = digits.rows(8, "val").images, digits.dequantised(2)
    x, logdet = tokenizer({"image": images}, Generator().manual_seed(0))
    assert x.shape == (len(images), 16, 4) and torch.equal(to_uint8(tokenizer.decode(x)), images)
    uniform = torch.full((len(images),), -64 * math.log(17 / 8))  # log density of tokens all over the levels' range
    assert bits_per_dim(uniform, logdet, 64) == pytest.approx(math.log2(17))


def test_validation_tells_bits_of_digits_and_the_gap_to_a_known_entropy():
    found = {
        rows: givt_models.train_and_validate(Model(2, rows=rows), TINY_MIXTURE, 0)[2] for rows in ("digits", KNOWN)
    }
    nats, bits = (found["digits"][name] for name in givt_models.LIKELIHOOD)
    log_det = 64 * math.log(2 / 16)
    assert bits == pytest.approx(bits_per_dim(torch.tensor(-16 * nats), log_det, 64).item(), rel=1e-4)
    true = givt_models.known_rows()[1]["true_nats"].mean().item() / 16
    gap = found[KNOWN][givt_mixture.ABOVE]
    assert gap > 0.1 and found[KNOWN]["nats_per_token"] - true == pytest.approx(gap, abs=1e-4)


def test_colder_samples_are_likelier_under_the_model_that_drew_them():
    module, average, _ = givt_models.train_and_validate(Model(2), TINY_MIXTURE, 0)
    cold, warm = (
        givt_models.draw(module, average, 20, GIVTSampling(temperature=t), Generator().manual_seed(0))
        for t in (0.1, 1.0)
    )
    assert cold[0].shape == (20, 3, 8, 8) and cold[1].tolist() == warm[1].tolist() == [*range(10)] * 2
    sharpened = 4 * (1 - 0.1**2) / 2  # nats per token of 4 numbers: half the mean of (1 - t^2) eps^2 each
    assert warm[2] - cold[2] == pytest.approx(sharpened, abs=0.7)


# Sampling


def test_ways_say_what_they_change():
    settings = givt_sampling.SETTINGS
    ways = givt_sampling.ways(settings)
    strong, rejection, again = (ways[name] for name in givt_sampling.compared(settings))
    assert strong.sampling == again.sampling and len({strong.stream, rejection.stream, again.stream}) == 3
    assert (strong.sampling.cfg_scale, strong.sampling.temperature) == (2.0, 0.95)
    assert rejection.sampling.guidance == "rejection"
    assert len(ways) == 4 + 3 + 2 + 3, "guidance 1 is the temperature of guided sampling"


def test_equal_laws_are_told_from_others():
    labels = torch.arange(200) % 10

    def pictures(seed, shift=0):
        noise = torch.randint(0, 60, (200, 1, 8, 8), generator=Generator().manual_seed(seed))
        return (noise + 10 * labels[:, None, None, None] + shift).to(torch.uint8).expand(-1, 3, -1, -1)

    def p(a, b):
        return givt_sampling.equal_laws(a, b, labels, 199, Generator().manual_seed(0))

    equal = [p(pictures(seed), pictures(seed + 100)) for seed in range(20)]
    assert 0.3 < sum(equal) / 20 < 0.7, "uniform in 0..1"
    assert p(pictures(0), pictures(1, shift=3)) == 1 / 200
    assert p(pictures(0), pictures(0)) == 1.0
    moved = pictures(1)[torch.arange(199, -1, -1)]
    assert p(pictures(0), moved) == 1 / 200, "the same pictures, of other labels"


def sampling_cells(settings, variance, read, far, nats, same=0.5, apart=0.001):
    """Cells in which figures are functions of temperature, guidance and beams (0: plain), and 1 of the solver."""
    found = {givt_sampling.REAL: REAL_DIGITS}
    group = {}
    for name, way in givt_sampling.ways(settings).items():
        s = way.sampling
        x = (s.temperature, s.cfg_scale, s.num_beams if s.beams else 0, s.guidance == "rejection")
        figures = {"variance_ratio": variance, "accuracy": read, "fd_randconv": far, givt_sampling.OWN_NATS: nats}
        group[name] = {key: f(*x) for key, f in figures.items()}
    group[givt_sampling.TESTS] = {givt_sampling.SAME: same, givt_sampling.TOLD_APART: apart}
    return found | {givt_sampling.model_of(settings).key(seed): group for seed in settings["seeds"]}


AS_CLAIMED = {
    "variance": lambda t, cfg, beams, rejection: t - 0.1 * (cfg - 1) - 0.1 * beams,
    "read": lambda t, cfg, beams, rejection: 1.5 - t + 0.1 * (cfg - 1),
    "far": lambda t, cfg, beams, rejection: t - 0.1 * (cfg - 1) + 0.02 * rejection,
    "nats": lambda t, cfg, beams, rejection: t - beams,
}


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        ({}, []),
        ({"variance": lambda t, cfg, beams, rejection: 1.0}, [1, 5, 10]),
        ({"variance": lambda t, cfg, beams, rejection: t + cfg - beams}, [5]),
        ({"read": lambda t, cfg, beams, rejection: t - cfg}, [2, 4]),
        ({"far": lambda t, cfg, beams, rejection: -t + cfg}, [3, 6]),
        ({"far": lambda t, cfg, beams, rejection: t - 0.1 * cfg + 0.2 * rejection}, [8]),
        ({"read": lambda t, cfg, beams, rejection: 1.5 - t + 0.1 * cfg - 0.05 * rejection}, [8]),
        ({"nats": lambda t, cfg, beams, rejection: abs(beams - 2)}, [9]),
        ({"same": 0.005}, [7]),
        ({"apart": 0.02}, [7]),
    ],
)
def test_sampling_verdict_follows_its_rules(changes, fails):
    settings = givt_sampling.SETTINGS
    cells = sampling_cells(settings, **(AS_CLAIMED | changes))
    assert [i for i, (holds, _) in enumerate(givt_sampling.rules(cells, settings), 1) if not holds] == fails
    assert givt_sampling.verdict(cells, settings).startswith(f"{10 - len(fails)} of 10 rules agree")


# Mixtures


def mixture_cells(settings, nats, far=lambda model: 1 / model.num_mixtures):
    """Cells in which nats per token, or above the entropy, and distances are functions of the model."""
    cells = {givt_mixture.REAL: REAL_DIGITS}
    for model, seed in product(givt_mixture.models(settings), settings["seeds"]):
        usage = {"component_entropy": 1.0, "component_spread": 0.5} if model.kind != "full" else {}
        value = {givt_mixture.ABOVE: nats(model), "nats_per_token": nats(model), "bpd": nats(model) + 7, **usage}
        cells[model.key(seed)] = {VALIDATION: value, givt_mixture.DRAWN: {**REAL_DIGITS, "fd_randconv": far(model)}}
    return cells


def claimed_nats(model):
    if model.rows == KNOWN:
        return 1.0 if model.init == "zero" or model.num_mixtures == 1 else 0.02
    if model.init == "zero":
        return 0.8
    return {1: 1.0, 4: 0.0, 16: -0.5}[model.num_mixtures] - (0.4 if model.num_mixtures == 1 else 0.2) * model.adapter


def changed(change):
    """The claimed nats, plus what `change` gives for a model."""
    return lambda model: claimed_nats(model) + change(model)


def claimed_far(model):
    return 1 / model.num_mixtures - 0.1 * (model.kind == "full")


@pytest.mark.parametrize(
    ("nats", "far", "fails"),
    [
        (claimed_nats, claimed_far, []),
        (changed(lambda m: 2.0 * (m.num_mixtures == 16 and m.init == "spread")), claimed_far, [1, 5, 8, 10]),
        (changed(lambda m: 0.9 * (m.num_mixtures == 4)), claimed_far, [2]),
        (claimed_nats, lambda m: 1.0, [3, 4]),
        (changed(lambda m: -1.0 * (m.init == "zero")), claimed_far, [5, 10]),
        (changed(lambda m: 0.3 * (m.adapter and m.num_mixtures == 16)), claimed_far, [6]),
        (changed(lambda m: -0.3 * (m.adapter and m.num_mixtures == 16)), claimed_far, [7]),
        (changed(lambda m: 0.05 * (m.rows == KNOWN)), claimed_far, [8]),
        (changed(lambda m: -0.6 * (m.rows == KNOWN and m.num_mixtures == 1)), claimed_far, [9]),
    ],
)
def test_mixture_verdict_follows_its_rules(nats, far, fails):
    settings = givt_mixture.SETTINGS
    cells = mixture_cells(settings, nats, far)
    assert [i for i, (holds, _) in enumerate(givt_mixture.rules(cells, settings), 1) if not holds] == fails
    assert givt_mixture.verdict(cells, settings).startswith(f"{10 - len(fails)} of 10 rules agree")


def test_givt_s_tables_have_a_line_per_model_and_way():
    settings = givt_mixture.SETTINGS
    mixture, known = givt_mixture.tables(mixture_cells(settings, claimed_nats), settings).split("\n\n")
    assert len(mixture.splitlines()) == 2 + 1 + 7 and len(known.splitlines()) == 2 + 3
    assert "| k = 16, init zero | 0.8 | 7.8 |" in mixture and "| k = 16 | 0.02 |" in known
    sampling = givt_sampling.tables(sampling_cells(givt_sampling.SETTINGS, **AS_CLAIMED), givt_sampling.SETTINGS)
    assert len(sampling.splitlines()) == 2 + 1 + 12
    for table in (mixture, known, sampling):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "| guidance 2, rejection, temperature 0.95 |" in sampling
