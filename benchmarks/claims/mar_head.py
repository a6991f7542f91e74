"""MAR's head on real digits, its width and its temperature: `python -m benchmarks.claims.mar_head`.

One trunk, bidirectional with the diffusion loss, and heads of several widths; one of them is sampled at several
temperatures. One cell is one model: width, seed.
"""

from itertools import pairwise, product
from pathlib import Path

from benchmarks.claims import digits, mar_models
from benchmarks.claims.digits import FIGURES, REAL, figure, series
from benchmarks.claims.ledger import Cell, Claim, Settings, command, markdown_table
from benchmarks.claims.mar_models import BIDIRECTIONAL, MODEL, TOKENS, Model
from experiments.errors import one_line_errors

SETTINGS = {
    **MODEL,
    "head_widths": [16, 32, 64],
    "temperatures": [0.8, 0.9, 0.95, 1.0, 1.1],
    "iterations": TOKENS,
}
PAPER_TRUNK = 1024  # wide
PAPER_FID = {256: 3.47, 512: 3.24, 1024: 2.85, 1536: 2.93}  # Table 3, by width of the head, without guidance
WORKS = 1.5  # times the best distance that the narrowest head may reach; 3.47 / 2.85 = 1.22 in the paper


def model_of(width: int) -> Model:
    return Model(BIDIRECTIONAL, "diffusion", width)


def way(temperature: float) -> str:
    return f"temperature {temperature:g}"


PLAIN = way(1.0)
COOL = way(0.95)  # what the official README takes where there is no guidance


def cells(settings: Settings) -> list[str]:
    """The widest first: it takes longest."""
    widths = sorted(settings["head_widths"], reverse=True)
    return [REAL, *(model_of(width).key(seed) for width, seed in product(widths, settings["seeds"]))]


def compute(key: str, settings: Settings) -> Cell:
    """Train one model, sample it at its temperatures."""
    if key == REAL:
        return digits.measure_real()
    width, seed = next(
        (w, seed) for w, seed in product(settings["head_widths"], settings["seeds"]) if model_of(w).key(seed) == key
    )
    temperatures = settings["temperatures"] if width == settings["head_width"] else [1.0]
    model, num_iter = model_of(width), settings["iterations"]
    samplings = {
        way(t): mar_models.make_sampling(model, settings, num_iter=num_iter, temperature=t) for t in temperatures
    }
    return mar_models.compute(model, settings, seed, samplings)


def verdict(found: dict[str, Cell], settings: Settings) -> str:
    """A line per rule."""
    return digits.rules_verdict(rules(found, settings))


def rules(found: dict[str, Cell], settings: Settings) -> list[tuple[bool, str]]:
    """Whether each rule holds, and what it says with the figures found."""
    widths, temperatures = sorted(settings["head_widths"]), sorted(settings["temperatures"])
    model = model_of(settings["head_width"])
    far = [figure(found, settings, model_of(width), PLAIN) for width in widths]
    read, variance = (
        [figure(found, settings, model, way(t), name) for t in temperatures] for name in ("accuracy", "variance_ratio")
    )
    cool, plain = (figure(found, settings, model, name) for name in (COOL, PLAIN))
    told = ", ".join(f"{value:.3g} at {width}" for value, width in zip(far, widths, strict=True))
    paper = ", ".join(f"{value} at {width}" for width, value in PAPER_FID.items())
    return [
        (
            far[-1] < far[0],
            f"a wide head beats a narrow one: {told} (wanted: the last below the first; paper: {paper}, with a "
            f"trunk of {PAPER_TRUNK})",
        ),
        (
            far[0] <= WORKS * min(far),
            f"a narrow head is nearly enough: the narrowest is {far[0] / min(far):.3g} times as far as the best "
            f"(wanted: at most {WORKS:g}; paper: {PAPER_FID[256] / min(PAPER_FID.values()):.3g})",
        ),
        (
            all(low < high for low, high in pairwise(variance)),
            f"diversity grows with the temperature: variance {series(variance, temperatures)} (wanted: always more)",
        ),
        (
            read[0] > read[-1],
            f"quality falls with it: read as asked {series(read, temperatures)} (wanted: less at the end)",
        ),
        (
            cool < plain,
            f"without guidance a temperature a little below 1 is better: {cool:.3g} at 0.95, {plain:.3g} at 1 (wanted: "
            "less; the official README takes 0.95 where there is no guidance)",
        ),
    ]


def tables(found: dict[str, Cell], settings: Settings) -> str:
    """A line per width and per temperature, means over seeds with their range."""
    lines = [[REAL, *(f"{found[REAL][column]:.3g}" for column in FIGURES), ""]]
    for width in settings["head_widths"]:
        paper = PAPER_FID.get(width * PAPER_TRUNK // settings["width"], "")
        figures = digits.table_line(found, settings, model_of(width), PLAIN)
        lines.append([f"head {width} wide, temperature 1", *figures, str(paper)])
    for t in settings["temperatures"]:
        figures = digits.table_line(found, settings, model_of(settings["head_width"]), way(t))
        lines.append([f"head {settings['head_width']} wide, {way(t)}", *figures, ""])
    return markdown_table(["model", *FIGURES.values(), "FID (paper)"], lines)


def draw(found: dict[str, Cell], settings: Settings, path: Path) -> None:
    """Samples of the first seed: a row of widths, a row of temperatures."""

    def points(width: int, name: str) -> list:
        return found[model_of(width).key(settings["seeds"][0])]["points"][name]

    chosen = settings["head_width"]
    widths = [(f"head {width} wide", points(width, PLAIN)) for width in settings["head_widths"]]
    temperatures = [(way(t), points(chosen, way(t))) for t in settings["temperatures"]]
    digits.draw_panels([widths, temperatures], path)


def setting(settings: Settings) -> str:
    """What all MAR claims share, and this one's widths and temperatures."""
    return (
        f"{mar_models.setting(settings)} The trunk is bidirectional and draws its {TOKENS} tokens in "
        f"{settings['iterations']} iterations. The widths of the head have the paper's ratios to the trunk's; the "
        f"temperature scales the noise of the diffusion steps, in the model whose head is {settings['head_width']} "
        "wide, from the same noise. The paper gives its temperatures' figures as curves only (Figure 5)."
    )


CLAIM = Claim(
    name="mar_head",
    title="MAR: a small head is nearly enough, and its temperature trades diversity for quality",
    statement=(
        "An MLP of a quarter of the trunk's width, 2 million parameters beside 407, gives a good FID, and wider ones "
        "improve it somewhat (Li et al., arXiv 2406.11838, Table 3). The temperature of the diffusion sampler, the "
        "factor of its noise, has a strong effect on FID and Inception Score (Figure 5): diversity against quality."
    ),
    setting=setting,
    settings=SETTINGS,
    cells=cells,
    compute=compute,
    verdict=verdict,
    tables=tables,
    draw=draw,
    caption="Samples of the first seed, ten per model: above heads from narrow to wide, below temperatures.",
)


@one_line_errors
def main() -> None:
    command(CLAIM)


if __name__ == "__main__":
    main()
