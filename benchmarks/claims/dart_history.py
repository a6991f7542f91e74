"""What DART's memory and its flow head are worth: `python -m benchmarks.claims.dart_history`.

On real digits, a network that reads all noisier copies against the same network that reads the last one only. On two
points, plain draws against draws that a flow head moves, beside plain draws by the best prediction there is. A cell is
one model and seed.
"""

from itertools import product
from pathlib import Path

import torch

from benchmarks.claims import dart_models, digits
from benchmarks.claims.dart_models import DRAWN, NEAR, PATCH, POINTS, TOKENS, Model, reachable, step_name
from benchmarks.claims.digits import FIGURES, REAL, VALIDATION, figure
from benchmarks.claims.ledger import Cell, Claim, Settings, command, markdown_table, spread
from datamodules.digits import SIDE
from experiments.errors import one_line_errors
from lightning_modules.pictures import make_grid

SETTINGS = {
    "seeds": [0, 1],
    "num_steps": 8,
    "width": 64,
    "depth": 3,
    "num_heads": 4,
    "mlp_hidden": 192,
    "head_width": 64,
    "head_depth": 2,
    "steps": 1000,
    "batch": 32,
    "lr": 3e-3,
    "warmup": 100,
    "clip": 2.0,
    "ema": 0.99,
    "noise_draws": 4,
    "samples": 500,
    POINTS: {  # in place of the above
        "num_steps": [3, 4],
        "width": 32,
        "depth": 2,
        "num_heads": 1,
        "mlp_hidden": 64,
        "batch": 128,
        "lr": 5e-3,
        "rows": 1024,
        "draws": 4000,
    },
}
SAME = 0.05  # relative difference at the first step, where there is nothing to remember
LOST = 0.02  # share of draws that plain ones must leave in between
REPAIRED = 0.5  # of what they leave: the flow must bring as much to the points
COPIES = {True: "all noisier copies", False: "the last copy only"}
HEADS = {False: "plain draws", True: "draws moved by a flow"}
POINT_FIGURES = {"near": "near a point", "positive": "positive"}
PAPER_FID = (5.62, 3.82)  # DART and DART-FM, as other papers quote them


def on_points(settings: Settings) -> Settings:
    return {**settings, **settings[POINTS]}


def memory(settings: Settings, history: bool) -> Model:
    return Model(settings["num_steps"], history=history)


def models(settings: Settings) -> list[Model]:
    pairs = product(settings[POINTS]["num_steps"], HEADS)
    return [*(memory(settings, h) for h in COPIES), *(Model(t, POINTS, flow=flow) for t, flow in pairs)]


def exact_key(num_steps: int) -> str:
    return f"{POINTS} T={num_steps} best prediction"


def cells(settings: Settings) -> list[str]:
    trained = [model.key(seed) for seed, model in product(settings["seeds"], models(settings))]
    return [REAL, *trained, *map(exact_key, settings[POINTS]["num_steps"])]


def compute(key: str, settings: Settings) -> Cell:
    """Train one model and draw from it; or one of the cells without training."""
    if key == REAL:
        return digits.measure_real()
    points = on_points(settings)
    for num_steps in points["num_steps"]:
        if key == exact_key(num_steps):
            return dart_models.compute_exact(num_steps, points, 0)
    model, seed = next((m, s) for s, m in product(settings["seeds"], models(settings)) if m.key(s) == key)
    if model.rows == POINTS:
        return dart_models.compute_points(model, points, seed)
    return dart_models.compute(model, settings, seed)


def verdict(found: dict[str, Cell], settings: Settings) -> str:
    """A line per rule."""
    return digits.rules_verdict(rules(found, settings))


def rules(found: dict[str, Cell], settings: Settings) -> list[tuple[bool, str]]:
    """Whether each rule holds, and what it says with the figures found."""
    return [*memory_rules(found, settings), plain_rule(found, settings), flow_rule(found, settings)]


def memory_rules(found: dict[str, Cell], settings: Settings) -> list[tuple[bool, str]]:
    pair = [memory(settings, history) for history in COPIES]
    far, last_far = (figure(found, settings, model, DRAWN) for model in pair)
    variance, last_variance = (figure(found, settings, model, DRAWN, "variance_ratio") for model in pair)
    error, last_error = ([step_error(found, settings, model, t) for t in times(settings)] for model in pair)
    ratios = [a / b for a, b in zip(error, last_error, strict=True)]
    return [
        (
            max(ratios[1:]) < 1,
            f"after the first step a network that reads all noisier copies always knows x_0 better than one that reads "
            f"the last only: its error is {digits.series(ratios[1:], times(settings)[1:])} times as large (t falls; "
            "wanted: always less than 1)",
        ),
        (
            abs(ratios[0] - 1) <= SAME,
            f"and at the first, where both read the same, as well: {ratios[0]:.3g} times (wanted: within {SAME:g} of "
            "1; this tells that nothing but memory differs)",
        ),
        (far < last_far, f"its samples are better: {far:.3g} and {last_far:.3g} (wanted: less)"),
        (
            abs(variance - 1) < abs(last_variance - 1),
            f"and less alike: variance {variance:.3g} and {last_variance:.3g} of the real one (wanted: nearer to 1)",
        ),
    ]


def times(settings: Settings) -> list[int]:
    """As sampling takes them."""
    return list(range(settings["num_steps"], 0, -1))


def step_error(found: dict[str, Cell], settings: Settings, model: Model, t: int) -> float:
    return figure(found, settings, model, VALIDATION, step_name(t))


def near(found: dict[str, Cell], settings: Settings, num_steps: int) -> tuple[float, float, float]:
    """Shares near a point: plain, moved by the flow, plain by the best prediction."""
    trained = (figure(found, settings, Model(num_steps, POINTS, flow=flow), DRAWN, "near") for flow in HEADS)
    return *trained, found[exact_key(num_steps)][DRAWN]["near"]


def plain_rule(found: dict[str, Cell], settings: Settings) -> tuple[bool, str]:
    told, holds = [], []
    for num_steps in settings[POINTS]["num_steps"]:
        plain, _, best = near(found, settings, num_steps)
        holds.append(max(plain, best) < reachable(num_steps) - LOST)
        told.append(f"{plain:.3g} by a network and {best:.3g} by the best prediction in {num_steps} steps")
    return all(holds), (
        f"plain draws lie between two points: near one of them are {'; '.join(told)} (wanted: at least {LOST:g} less "
        f"than where the copies are true, {digits.series(*limits(settings))} steps)"
    )


def limits(settings: Settings) -> tuple[list[float], list[int]]:
    counts = settings[POINTS]["num_steps"]
    return [reachable(count) for count in counts], counts


def flow_rule(found: dict[str, Cell], settings: Settings) -> tuple[bool, str]:
    counts, shares = settings[POINTS]["num_steps"], []
    for num_steps in counts:
        plain, moved, _ = near(found, settings, num_steps)
        missed = reachable(num_steps) - plain
        shares.append((moved - plain) / missed if missed > 0 else 0.0)  # nothing to repair
    return min(shares) >= REPAIRED, (
        f"a flow repairs them: of what plain draws miss it brings to the points {digits.series(shares, counts)} steps "
        f"(wanted: at least {REPAIRED:g}; paper, on images: FID {PAPER_FID[0]} plain, {PAPER_FID[1]} with a flow)"
    )


def tables(found: dict[str, Cell], settings: Settings) -> str:
    """A line per model, means over seeds with their range: digits, errors of x_0 by step, two points."""
    pair = {name: memory(settings, history) for history, name in COPIES.items()}
    lines = [[REAL, *(f"{found[REAL][column]:.3g}" for column in FIGURES)]]
    lines += [[name, *digits.table_line(found, settings, model, DRAWN)] for name, model in pair.items()]
    names = [step_name(t) for t in times(settings)]
    errors = [[name, *digits.table_line(found, settings, model, VALIDATION, names)] for name, model in pair.items()]
    points = []
    for num_steps in settings[POINTS]["num_steps"]:
        for flow, name in HEADS.items():
            model = Model(num_steps, POINTS, flow=flow)
            figures = digits.table_line(found, settings, model, DRAWN, POINT_FIGURES)
            points.append([f"{num_steps} steps, {name}", *figures])
        best = found[exact_key(num_steps)][DRAWN]
        points.append([f"{num_steps} steps, best prediction", *(spread([best[column]]) for column in POINT_FIGURES)])
        points.append([f"{num_steps} steps, best of true copies", f"{reachable(num_steps):.3g}", "0.5"])
    drawn = markdown_table(["a network that reads", *FIGURES.values()], lines)
    predicted = markdown_table(["squared error of x_0", *(f"t = {t}" for t in times(settings))], errors)
    return "\n\n".join([drawn, predicted, markdown_table(["two points", *POINT_FIGURES.values()], points)])


def draw(found: dict[str, Cell], settings: Settings, path: Path) -> None:
    """Samples of the first seed, ten per model; below, draws of two points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    seed, counts = settings["seeds"][0], settings[POINTS]["num_steps"]
    real = digits.rows(SIDE, "val")
    shown = torch.stack([real.images[real.labels == label][0] for label in range(digits.CLASSES)])
    images = {name: found[memory(settings, h).key(seed)]["points"][DRAWN] for h, name in COPIES.items()}
    sheet, axes = pyplot.subplots(1 + len(counts), 3, figsize=(6.6, 1.5 * (1 + len(counts))), squeeze=False)
    for axis, (title, ten) in zip(axes[0], [("real", shown), *images.items()], strict=True):
        grid = make_grid(torch.as_tensor(ten, dtype=torch.uint8), columns=5, pad=1)
        axis.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(title, fontsize=7)
        axis.axis("off")
    for row, num_steps in zip(axes[1:], counts, strict=True):
        keys = {name: Model(num_steps, POINTS, flow=flow).key(seed) for flow, name in HEADS.items()}
        for axis, (title, key) in zip(row, {"best prediction": exact_key(num_steps), **keys}.items(), strict=True):
            axis.hist(found[key]["points"][DRAWN], bins=50, range=(-1.6, 1.6))
            axis.set_title(f"{title}, {num_steps} steps", fontsize=7)
            axis.set(yticks=[], xticks=[-1, 0, 1])
    sheet.tight_layout(pad=0.4)
    sheet.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(sheet)


def setting(settings: Settings) -> str:
    """Data, model, training, figures."""
    points = on_points(settings)
    return (
        f"scikit-learn's digits at {SIDE} px, grey, in {PATCH}x{PATCH} patches, dequantised at their own "
        f"{digits.LEVELS} levels: {settings['num_steps']} copies of {TOKENS} tokens of {PATCH**2} numbers. DART, "
        f"{settings['width']} wide and {settings['depth']} deep, without a flow, its schedule on each copy, every step "
        f"of v weighted alike; the same network without memory attends inside a copy only. {settings['steps']} steps "
        f"of {settings['batch']} images, AdamW, lr {settings['lr']:g} with a cosine, gradients clipped to norm "
        f"{settings['clip']:g}, average {settings['ema']}; of a seed both start from the same weights and see the same "
        f"rows and noise; seeds {settings['seeds']}. Errors of x_0 are those on the validation digits, means over "
        f"{settings['noise_draws']} draws of the noise. {settings['samples']} samples without guidance; `fd_randconv` "
        "is a Frechet distance to the training digits over fixed random convolutions; a support vector machine reads "
        "the samples; variance is that of pixels within a class. Two points: -1 and 1, one token of one number; a DART "
        f"{points['width']} wide and {points['depth']} deep, and a flow of {settings['head_depth']} blocks; "
        f"{points['steps']} steps of {points['batch']}, lr {points['lr']:g}; {points['draws']} draws, of which one is "
        f"near a point if it is at most {NEAR:g} from it. The best prediction is E[x_0 | all copies], in closed form; "
        "in 8 steps plain draws by it come to the points, too. Sizes and steps were chosen by the time they take, "
        f"{NEAR:g} and few steps after trials of single cells on two points: networks of this size do not come within "
        "0.1, and 8 steps leave a flow nothing to repair. Rules about errors, variance and two points are expectations "
        "of ours."
    )


CLAIM = Claim(
    name="dart_history",
    title="DART: memory of all copies helps, and a flow repairs what plain draws blur",
    statement=(
        "Noise that is drawn anew for each copy makes all noisier copies worth reading, where a Markov diffusion has "
        "only the last; and tokens that are drawn independently around one prediction lose what is not Gaussian, which "
        f"a small flow gives back, FID {PAPER_FID[0]} and {PAPER_FID[1]} (Gu et al., arXiv 2410.08159, figures as "
        "later papers quote them; an ablation of memory was not at hand)."
    ),
    setting=setting,
    settings=SETTINGS,
    cells=cells,
    compute=compute,
    verdict=verdict,
    tables=tables,
    draw=draw,
    caption="Above: samples of the first seed, ten per model. Below: draws of two points, of the first seed.",
)


@one_line_errors
def main() -> None:
    command(CLAIM)


if __name__ == "__main__":
    main()
