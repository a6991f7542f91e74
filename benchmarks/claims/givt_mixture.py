"""GIVT's mixtures, their initialisation, covariance and adapter: `python -m benchmarks.claims.givt_mixture`.

On real digits, heads of 1, 4 and 16 components; 16 that start equal; one Gaussian with full covariance; the flow
adapter before 1 and before 16. On sequences whose entropy is known, what 1 and 16 components waste. One cell is one
model and seed.
"""

from itertools import pairwise, product
from pathlib import Path

import torch

from benchmarks.claims import digits, givt_models
from benchmarks.claims.digits import FIGURES, REAL, VALIDATION, figure
from benchmarks.claims.givt_models import KNOWN, LIKELIHOOD, MODEL, PROCESS, USAGE, Model, Way
from benchmarks.claims.ledger import Cell, Claim, Settings, command, markdown_table
from experiments.errors import one_line_errors
from lightning_modules.givt import GIVTSampling

SETTINGS = {**MODEL, "mixtures": [1, 4, 16]}
FULL = Model(1, "full")
DRAWN = "samples"  # group of the figures of samples
ABOVE = "nats_above_entropy"
GAP = {ABOVE: "nats above entropy", **USAGE}
# Thresholds. An analytic optimum is known for the process alone, 0; the best single Gaussian is far from it
CLOSE, FAR = 0.05, 0.5
KEPT = 0.5  # of the gain of mixtures: one that starts equal must keep less


def most(settings: Settings) -> int:
    return max(settings["mixtures"])


def zero(settings: Settings, rows: str = givt_models.DIGITS) -> Model:
    return Model(most(settings), init="zero", rows=rows)


def on_digits(settings: Settings) -> list[Model]:
    adapted = [Model(count, adapter=True) for count in (1, most(settings))]
    return [*map(Model, settings["mixtures"]), zero(settings), FULL, *adapted]


def on_known(settings: Settings) -> list[Model]:
    return [Model(1, rows=KNOWN), Model(most(settings), rows=KNOWN), zero(settings, KNOWN)]


def models(settings: Settings) -> list[Model]:
    """Those with an adapter first: they take longest."""
    return sorted(on_digits(settings), key=lambda model: not model.adapter) + on_known(settings)


def cells(settings: Settings) -> list[str]:
    return [REAL, *(model.key(seed) for seed, model in product(settings["seeds"], models(settings)))]


def compute(key: str, settings: Settings) -> Cell:
    """Train one model, look at its likelihood, draw from it."""
    if key == REAL:
        return digits.measure_real()
    model, seed = next((m, s) for s, m in product(settings["seeds"], models(settings)) if m.key(s) == key)
    if model.rows == KNOWN:
        return {VALIDATION: givt_models.train_and_validate(model, settings, seed)[2]}
    return givt_models.compute(model, settings, seed, {DRAWN: Way(GIVTSampling())})[0]


def verdict(found: dict[str, Cell], settings: Settings) -> str:
    """A line per rule."""
    return digits.rules_verdict(rules(found, settings))


def rules(found: dict[str, Cell], settings: Settings) -> list[tuple[bool, str]]:
    """Whether each rule holds, and what it says with the figures found."""
    return [
        likelihood_rule(found, settings),
        saturation_rule(found, settings),
        distance_rule(found, settings),
        full_rule(found, settings),
        zero_rule(found, settings),
        adapter_rule(found, settings),
        simpler_rule(found, settings),
        *known_rules(found, settings),
    ]


def nats(found: dict[str, Cell], settings: Settings, model: Model) -> float:
    """Per token of the validation rows, mean over seeds; of sequences above their entropy."""
    return figure(found, settings, model, VALIDATION, ABOVE if model.rows == KNOWN else "nats_per_token")


def likelihood_rule(found: dict[str, Cell], settings: Settings) -> tuple[bool, str]:
    counts = sorted(settings["mixtures"])
    values = [nats(found, settings, Model(count)) for count in counts]
    return all(few > many for few, many in pairwise(values)), (
        f"more components, more likelihood: nats per token {digits.series(values, counts)} (wanted: always less)"
    )


def saturation_rule(found: dict[str, Cell], settings: Settings) -> tuple[bool, str]:
    counts = sorted(settings["mixtures"])
    gains = [nats(found, settings, Model(a)) - nats(found, settings, Model(b)) for a, b in pairwise(counts)]
    told = ", ".join(f"{gain:.3g} from {a} to {b}" for gain, (a, b) in zip(gains, pairwise(counts), strict=True))
    return all(first > later for first, later in pairwise(gains)), (
        f"and the gain saturates: {told} (wanted: always less)"
    )


def distance_rule(found: dict[str, Cell], settings: Settings) -> tuple[bool, str]:
    one, many = (figure(found, settings, Model(count), DRAWN) for count in (1, most(settings)))
    return many < one, (
        f"samples of a mixture are better: {many:.3g} with {most(settings)} components, {one:.3g} with one (wanted: "
        "less; paper: k from 1 to 16 lowers FID)"
    )


def full_rule(found: dict[str, Cell], settings: Settings) -> tuple[bool, str]:
    full, one = (figure(found, settings, model, DRAWN) for model in (FULL, Model(1)))
    return full < one, (
        f"a full covariance beats a diagonal one: {full:.3g} and {one:.3g} (wanted: less; paper: about 3 % of FID); "
        f"nats per token {nats(found, settings, FULL):.3g} and {nats(found, settings, Model(1)):.3g}"
    )


def kept(found: dict[str, Cell], settings: Settings, rows: str) -> float:
    """Share of the gain in nats from one component to the most that is left where the most start equal; 1 if there is
    no gain, so nothing to lose."""
    one, many = (nats(found, settings, Model(count, rows=rows)) for count in (1, most(settings)))
    return (one - nats(found, settings, zero(settings, rows))) / (one - many) if one > many else 1.0


def zero_rule(found: dict[str, Cell], settings: Settings) -> tuple[bool, str]:
    share, pair = kept(found, settings, givt_models.DIGITS), (Model(most(settings)), zero(settings))
    apart, equal = (figure(found, settings, model, VALIDATION, "component_spread") for model in pair)
    return share < KEPT, (
        f"components that start equal stay one Gaussian: they keep {share:.3g} of the gain in nats from 1 to "
        f"{most(settings)} (wanted: less than {KEPT:g}); their means differ by {equal:.3g}, those that start apart by "
        f"{apart:.3g}"
    )


def adapter_gains(found: dict[str, Cell], settings: Settings) -> list[float]:
    """Nats per token that the adapter saves with one component and with the most."""
    counts = (1, most(settings))
    return [nats(found, settings, Model(n)) - nats(found, settings, Model(n, adapter=True)) for n in counts]


def adapter_rule(found: dict[str, Cell], settings: Settings) -> tuple[bool, str]:
    one, many = adapter_gains(found, settings)
    return min(one, many) > 0, (
        f"an adapter helps: it saves {one:.3g} nats per token with one component, {many:.3g} with {most(settings)} "
        "(wanted: both above 0)"
    )


def simpler_rule(found: dict[str, Cell], settings: Settings) -> tuple[bool, str]:
    one, many = adapter_gains(found, settings)
    return one > many, f"and a single Gaussian needs it more: {one:.3g} against {many:.3g} (wanted: more)"


def known_rules(found: dict[str, Cell], settings: Settings) -> list[tuple[bool, str]]:
    one, many = (nats(found, settings, Model(count, rows=KNOWN)) for count in (1, most(settings)))
    share = kept(found, settings, KNOWN)
    return [
        (
            many < CLOSE,
            f"on a process of known entropy {most(settings)} components waste {many:.3g} nats per token (wanted: less "
            f"than {CLOSE:g})",
        ),
        (one > FAR, f"where a single Gaussian wastes {one:.3g} (wanted: more than {FAR:g})"),
        (
            share < KEPT,
            f"and {most(settings)} that start equal keep {share:.3g} of the difference (wanted: less than {KEPT:g})",
        ),
    ]


def tables(found: dict[str, Cell], settings: Settings) -> str:
    """A line per model, means over seeds with their range: digits, then sequences."""
    columns = {**LIKELIHOOD, **USAGE, **FIGURES}
    lines = [[REAL, *("" for _ in (*LIKELIHOOD, *USAGE)), *(f"{found[REAL][column]:.3g}" for column in FIGURES)]]
    for model in on_digits(settings):
        usage = ["", ""] if model.kind == "full" else digits.table_line(found, settings, model, VALIDATION, USAGE)
        likelihood = digits.table_line(found, settings, model, VALIDATION, LIKELIHOOD)
        lines.append([model.name(), *likelihood, *usage, *digits.table_line(found, settings, model, DRAWN)])
    known = [[m.name(), *digits.table_line(found, settings, m, VALIDATION, GAP)] for m in on_known(settings)]
    process = markdown_table(["known entropy", *GAP.values()], known)
    return f"{markdown_table(['digits', *columns.values()], lines)}\n\n{process}"


def draw(found: dict[str, Cell], settings: Settings, path: Path) -> None:
    """Samples of the first seed: real digits and plain heads, then the others."""

    def panel(model: Model) -> tuple[str, list]:
        return model.name(), found[model.key(settings["seeds"][0])]["points"][DRAWN]

    real = digits.rows(givt_models.SIDE, "val")
    shown = torch.stack([real.images[real.labels == label][0] for label in range(digits.CLASSES)])
    first, others = (on_digits(settings)[part] for part in (slice(len(settings["mixtures"])), slice(-4, None)))
    digits.draw_panels([[("real", shown), *map(panel, first)], list(map(panel, others))], path)


def setting(settings: Settings) -> str:
    """What all GIVT claims share, and this one's heads and process."""
    return (
        f"{givt_models.setting(settings)} Samples are drawn at temperature 1 without guidance. The adapter has "
        f"{settings['adapter_blocks']} couplings. The sequences are {PROCESS['image_size'] ** 2} vectors of "
        f"{PROCESS['token_dim']} numbers from a Markov chain over {PROCESS['num_modes']} Gaussians in "
        f"{PROCESS['num_classes']} classes, and their models are trained for as many steps."
    )


CLAIM = Claim(
    name="givt_mixture",
    title="GIVT: a mixture of Gaussians beats one, if its components start apart",
    statement=(
        "From 1 to 16 components FID falls and then saturates; a full covariance gains about 3 % over a diagonal one; "
        "a small invertible network between latents and Transformer, the adapter, costs next to nothing and helps "
        "(Tschannen et al., arXiv 2312.02116; the ablation's figures were not at hand). Not in the paper: the "
        "official head starts at zero, where all components are equal and have equal gradients."
    ),
    setting=setting,
    settings=SETTINGS,
    cells=cells,
    compute=compute,
    verdict=verdict,
    tables=tables,
    draw=draw,
    caption="Samples of the first seed, ten per model: above real digits and plain heads, below the variants.",
)


@one_line_errors
def main() -> None:
    command(CLAIM)


if __name__ == "__main__":
    main()
