"""What JetFormer has between pixels and decoder, and what it factors out: `python -m benchmarks.claims.jetformer_flow`.

On real digits: numbers factored out behind the flow, behind a learned projection, behind principal components, or not
at all; the flow trained along, trained alone first, or absent. And the picture of the paper's appendix: pictures, with
the curriculum's noise, and what is left of them where only what the decoder models is kept; beside a small autoencoder.
"""

from itertools import product
from pathlib import Path

from torch import Tensor

from benchmarks.claims import digits, jetformer_models
from benchmarks.claims.digits import FIGURES, REAL, VALIDATION
from benchmarks.claims.jetformer_models import ALONE, DRAWN, LIKELIHOOD, MODEL, RELEASED, RMS, Model, bits, closer
from benchmarks.claims.ledger import Cell, Claim, Settings, command, markdown_table, spread
from datamodules.digits import SIDE
from experiments.errors import one_line_errors

SETTINGS = {**MODEL, "vae_steps": 300, "sigmas": [64.0, 16.0]}
WHOLE = Model("nothing factored out", kept=False)
LINEAR = Model("learned projection", split="linear")
COMPONENTS = Model("principal components", split="pca")
FROZEN = Model("flow trained alone first", flow="alone first")
NONE = Model("no flow", kept=False, flow="none")
MODELS = (RELEASED, WHOLE, LINEAR, COMPONENTS, FROZEN, NONE)
SPLIT = (RELEASED, LINEAR, COMPONENTS)  # which the picture shows
REDRAWN = "rest drawn anew"  # group of figures, and of pictures
VAE = Model("autoencoder")  # no JetFormer: its key names the cell


def cells(settings: Settings) -> list[str]:
    return [REAL, *(model.key(seed) for seed, model in product(settings["seeds"], (*MODELS, VAE)))]


def compute(key: str, settings: Settings) -> Cell:
    """One model's figures, samples, and pictures of validation digits of which it kept what it models."""
    if key == REAL:
        return measure_real(settings)
    model, seed = next((m, s) for s, m in product(settings["seeds"], (*MODELS, VAE)) if m.key(s) == key)
    images = digits.rows(SIDE, "val").images
    if model == VAE:
        autoencoder, average = jetformer_models.autoencoder(settings, seed)
        return measure_redrawn(jetformer_models.reconstructed(autoencoder, average, images))
    module, average, cell = jetformer_models.compute(model, settings, seed)
    if model in SPLIT:
        found = measure_redrawn(jetformer_models.redrawn(module, average, images, seed))
        return {**cell, **found, "points": cell["points"] | found["points"]}
    return cell


def measure_real(settings: Settings) -> Cell:
    """Figures of the validation digits, and of their noisy selves as groups."""
    images = digits.rows(SIDE, "val").images
    noisy = {way(sigma): jetformer_models.noised(images, sigma, 0) for sigma in settings["sigmas"]}
    groups = {name: {RMS: jetformer_models.distance(found, images)} for name, found in noisy.items()}
    points = {name: first_of_each_class(found).tolist() for name, found in noisy.items()}
    return {**digits.measure_real(), **groups, "points": points | {REAL: first_of_each_class(images).tolist()}}


def measure_redrawn(found: Tensor) -> Cell:
    """How far pictures (N, 3, S, S) are from the validation digits that they come from, as group `REDRAWN`."""
    rms = jetformer_models.distance(found, digits.rows(SIDE, "val").images)
    return {REDRAWN: {RMS: rms}, "points": {REDRAWN: first_of_each_class(found).tolist()}}


def first_of_each_class(images: Tensor) -> Tensor:
    """Of the validation digits (N, 3, S, S), or of what became of them: (10, 3, S, S)."""
    labels = digits.rows(SIDE, "val").labels.tolist()
    return images[[labels.index(label) for label in range(digits.CLASSES)]]


def way(sigma: float) -> str:
    return f"noise of {sigma:g}"


def verdict(found: dict[str, Cell], settings: Settings) -> str:
    """A line per rule."""
    return digits.rules_verdict(rules(found, settings))


def rules(found: dict[str, Cell], settings: Settings) -> list[tuple[bool, str]]:
    """Whether each rule holds, and what it says with the figures found."""
    return [*factor_rules(found, settings), *training_rules(found, settings)]


def factor_rules(found: dict[str, Cell], settings: Settings) -> list[tuple[bool, str]]:
    behind_flow, linear = closer(found, settings, RELEASED, LINEAR)
    behind_linear, components = closer(found, settings, LINEAR, COMPONENTS)
    some, all_modelled = closer(found, settings, RELEASED, WHOLE)
    return [
        (behind_flow, f"factoring out behind the flow beats a learned projection before it: {linear} (wanted: less)"),
        (behind_linear, f"and that beats principal components: {components} (wanted: less)"),
        (some, f"factoring out beats modelling everything: {all_modelled} (wanted: less)"),
    ]


def training_rules(found: dict[str, Cell], settings: Settings) -> list[tuple[bool, str]]:
    along, frozen, absent = (bits(found, settings, model) for model in (RELEASED, FROZEN, NONE))
    alone = digits.figure(found, settings, FROZEN, ALONE, "bpd")
    nearer, distances = closer(found, settings, RELEASED, FROZEN)
    return [
        (
            along < frozen,
            f"training end to end beats a flow that was trained alone first and then kept: {along:.3g} and "
            f"{frozen:.3g} bits (wanted: less)",
        ),
        (nearer, f"and so do its samples: {distances} (wanted: less)"),
        (
            along < alone,
            f"a decoder behind the flow saves bits: {along:.3g}, the flow alone {alone:.3g} (wanted: less)",
        ),
        (
            along < absent,
            f"and so does a flow before the decoder: {absent:.3g} without, all numbers being modelled (wanted: more "
            f"than {along:.3g})",
        ),
    ]


def tables(found: dict[str, Cell], settings: Settings) -> str:
    """A line per model, means over seeds with their range: likelihood and samples, then what is left of pictures."""
    lines = [[REAL, "", *(f"{found[REAL][column]:.3g}" for column in FIGURES)]]
    for model in MODELS:
        likelihood = digits.table_line(found, settings, model, VALIDATION, LIKELIHOOD)
        lines.append([model.name, *likelihood, *digits.table_line(found, settings, model, DRAWN)])
    alone = digits.table_line(found, settings, FROZEN, ALONE, ["bpd", "fd_randconv"])
    lines.append([f"{ALONE}, which sees no label", *alone, "", ""])
    columns = [*LIKELIHOOD.values(), *FIGURES.values()]
    changes = [[name, f"{found[REAL][name][RMS]:.3g}"] for name in map(way, settings["sigmas"])]
    for model in (*SPLIT, VAE):
        rms = digits.of_seeds(found, settings, model, REDRAWN, RMS)
        changes.append([title(model, settings), spread(rms)])
    left = markdown_table(["pictures", "RMS change in grey levels"], changes)
    return f"{markdown_table(['digits', *columns], lines)}\n\n{left}"


def title(model: Model, settings: Settings) -> str:
    """Of a picture that is left."""
    numbers = settings["kept"]
    return f"autoencoder, {numbers} numbers" if model == VAE else f"{model.name}, {numbers} of 4 kept"


def draw(found: dict[str, Cell], settings: Settings, path: Path) -> None:
    """Above what becomes of digits, below samples; of the first seed."""

    def points(model: Model, name: str) -> list:
        return found[model.key(settings["seeds"][0])]["points"][name]

    real = found[REAL]["points"]
    above = [("original", real[REAL]), *((name, real[name]) for name in map(way, settings["sigmas"]))]
    above += [(title(model, settings), points(model, REDRAWN)) for model in (*SPLIT, VAE)]
    below = [(model.name, points(model, DRAWN)) for model in MODELS]
    digits.draw_panels([above, [*below, (ALONE, points(FROZEN, ALONE))]], path)


def setting(settings: Settings) -> str:
    """What all JetFormer claims share, and this one's variants."""
    return (
        f"{jetformer_models.setting(settings)} Before a projection or principal components (whitened, fitted to the "
        "training digits) the flow has only what the decoder sees, and the bits of all maps are counted. A flow alone "
        "has a normal prior, no label, and as many steps with the same noise on pixels; frozen, it gets a decoder that "
        "is trained for as many again. Without a flow the decoder models all numbers of the patches. Pictures: noise "
        "in levels of 256; rests drawn anew; a small KL autoencoder with as many latents as numbers are kept, of "
        f"{settings['vae_steps']} steps of squared errors. Rules about bits are expectations of ours; "
        "no rule is about the pictures, since no claim about them was at hand."
    )


CLAIM = Claim(
    name="jetformer_flow",
    title="JetFormer: what is not modelled is best split off behind a flow that is trained along",
    statement=(
        "Of a token's numbers the decoder models some, the others are noise. Splitting them off behind the flow gives "
        "better images than a learned projection before it, and that better ones than principal components; modelling "
        "everything is clearly worse; flow and decoder are trained together (Tschannen et al., arXiv 2411.19722; "
        "order as its reviews tell it). Its appendix shows what is left of images where only what is modelled is kept."
    ),
    setting=setting,
    settings=SETTINGS,
    cells=cells,
    compute=compute,
    verdict=verdict,
    tables=tables,
    draw=draw,
    caption=(
        "Above: validation digits, with the curriculum's noise at its start and later, and what is left of them where "
        "what is modelled is kept and the rest drawn anew; an autoencoder. Below: samples. First seed, ten each."
    ),
)


@one_line_errors
def main() -> None:
    command(CLAIM)


if __name__ == "__main__":
    main()
