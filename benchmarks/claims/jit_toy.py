"""JiT's toy experiment: `python -m benchmarks.claims.jit_toy`.

A 2-D spiral lies in D dimensions; a small network learns to generate it by x-, eps- or v-prediction, always with the
v-loss. One cell is one model: space dimension, prediction, seed.
"""

import math
from itertools import pairwise, product
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from benchmarks.claims.ledger import Cell, Claim, Settings, command, markdown_table, mean, spread
from experiments.errors import one_line_errors
from layers.diffusion.flow_matching import convert, interpolate, target
from layers.samplers.ode import heun, solve, uniform_times
from lightning_modules.optim import learning_rate

SETTINGS = {
    "dims": [2, 8, 16, 512],
    "predictions": ["x", "eps", "v"],
    "seeds": [0, 1],
    "steps": 2500,
    "batch": 512,
    "width": 256,
    "lr": 1e-3,
    "min_lr": 1e-5,
    "t_eps": 0.05,
    "sampling_steps": 50,
    "samples": 2000,
    "reference": 20_000,
}
DATA, WEIGHTS, MAP, SAMPLES, REFERENCE = range(5)  # streams of random numbers of one seed
SHOWN = 600  # points in a panel of the picture
LIMIT = 2.2  # the spiral ends at radius 1.75


def stream(seed: int, kind: int) -> Generator:
    return Generator().manual_seed(1000 * seed + kind)


def spiral(count: int, generator: Generator) -> Tensor:
    """Points of two turns, about evenly spread: (count, 2), root mean square about 1.2."""
    theta = 4 * math.pi * torch.rand(count, generator=generator).sqrt()
    return theta[:, None] / 7.2 * torch.stack([theta.cos(), theta.sin()], dim=1)


def embedding(dim: int, generator: Generator) -> Tensor:
    """Random orthonormal columns, (dim, 2)."""
    return torch.linalg.qr(torch.randn(dim, 2, generator=generator)).Q


class ToyNet(nn.Module):
    """Five linear layers with ReLU between; the time is one more input."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        sizes = [dim + 1, *[width] * 4]
        hidden = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, dim))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """z (B, D), t (B, 1) -> (B, D)."""
        return self.layers(torch.cat([z, t], dim=1))


def cells(settings: Settings) -> list[str]:
    """The widest space first: it takes longest."""
    grid = product(sorted(settings["dims"], reverse=True), settings["predictions"], settings["seeds"])
    return [f"D={dim} {prediction} seed {seed}" for dim, prediction, seed in grid]


def compute(key: str, settings: Settings) -> Cell:
    """Train and measure one model."""
    dim_text, prediction, _, seed_text = key.split()
    dim, seed = int(dim_text.removeprefix("D=")), int(seed_text)
    basis = embedding(dim, stream(seed, MAP))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, WEIGHTS).initial_seed())
        net = ToyNet(dim, settings["width"])
    loss = train(net, prediction, basis, settings, stream(seed, DATA))
    samples = draw_samples(net, prediction, settings, stream(seed, SAMPLES))
    cell = measure(samples, basis, spiral(settings["reference"], stream(seed, REFERENCE)))
    return {"loss": loss, **cell, "points": (samples[:SHOWN] @ basis).tolist()}


def train(net: ToyNet, prediction: str, basis: Tensor, settings: Settings, generator: Generator) -> float:
    """Adam with a cosine to `min_lr`; the mean v-loss of the last tenth."""
    steps, batch, t_eps = settings["steps"], settings["batch"], settings["t_eps"]
    optimizer = torch.optim.Adam(net.parameters(), lr=settings["lr"], fused=True)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(
            step, peak=settings["lr"], warmup=0, total=steps, schedule="cosine", min_lr=settings["min_lr"]
        )
        x = spiral(batch, generator) @ basis.T  # (B, D)
        t, noise = torch.rand(batch, 1, generator=generator), torch.randn(x.shape, generator=generator)
        z = interpolate(x, noise, t)
        found, wanted = (
            convert(value, z, t, source=prediction, to="v", t_eps=t_eps)
            for value in (net(z, t), target(prediction, x, noise))
        )
        loss = (found - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses[-max(1, steps // 10) :]).mean().item()


@torch.no_grad()
def draw_samples(net: ToyNet, prediction: str, settings: Settings, generator: Generator) -> Tensor:
    """(samples, D) by Heun steps with an Euler end."""

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        out = net(z, t.expand(len(z), 1))
        return convert(out, z, t, source=prediction, to="v", t_eps=settings["t_eps"])

    dim = net.layers[-1].out_features
    noise = torch.randn(settings["samples"], dim, generator=generator)
    return solve(heun(velocity, noise, uniform_times(settings["sampling_steps"])))


def measure(samples: Tensor, basis: Tensor, reference: Tensor) -> Cell:
    """Mean distance of projected samples (N, D) to the nearest reference point (M, 2), the reverse, and the RMS norm of
    what lies outside the plane."""
    flat = samples @ basis  # (N, 2)
    distances = torch.cdist(flat, reference, compute_mode="donot_use_mm_for_euclid_dist")  # (N, M)
    outside = samples - flat @ basis.T
    return {
        "sample_to_data": distances.amin(1).mean().item(),
        "data_to_sample": distances.amin(0).mean().item(),
        "off_plane": outside.square().sum(1).mean().sqrt().item(),
    }


def of_seeds(found: dict[str, Cell], settings: Settings, dim: int, prediction: str, name: str) -> list[float]:
    return [found[f"D={dim} {prediction} seed {seed}"][name] for seed in settings["seeds"]]


def verdict(found: dict[str, Cell], settings: Settings) -> str:
    """By the rule of the statement."""
    low, high = min(settings["dims"]), max(settings["dims"])
    near = mean(of_seeds(found, settings, high, "x", "sample_to_data"))
    growth = near / mean(of_seeds(found, settings, low, "x", "sample_to_data"))
    off = {p: mean(of_seeds(found, settings, high, p, "off_plane")) for p in settings["predictions"]}
    farther = {p: mean(of_seeds(found, settings, high, p, "sample_to_data")) / near for p in ("eps", "v")}
    holds = growth <= 2 and off["v"] > 10 * off["x"] and off["eps"] > 10 * off["x"]
    return (
        f"{'Agrees' if holds else 'DISAGREES'} with the paper, by the rule above. From D = {low} to {high} "
        f"x-prediction's distance to the spiral changes by a factor {growth:.2g} (wanted: at most 2). At D = {high} "
        f"the norm outside the plane is {off['eps'] / off['x']:.3g} (eps) and {off['v'] / off['x']:.3g} (v) times "
        f"x-prediction's (wanted: more than 10); in the plane they are {farther['eps']:.3g} and {farther['v']:.3g} "
        f"times as far from the spiral."
    )


def tables(found: dict[str, Cell], settings: Settings) -> str:
    """One row per space and prediction: means over seeds, with their range."""
    names = ("loss", "sample_to_data", "data_to_sample", "off_plane")
    rows = [
        [f"{dim}, {p}", *(spread([round(v, 6) for v in of_seeds(found, settings, dim, p, name)]) for name in names)]
        for dim, p in product(settings["dims"], settings["predictions"])
    ]
    return markdown_table(["D, prediction", "v-loss", "sample to data", "data to sample", "off the plane"], rows)


def draw(found: dict[str, Cell], settings: Settings, path: Path) -> None:
    """A panel per model of the first seed: its samples in the plane over the spiral."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dims, predictions = settings["dims"], settings["predictions"]
    size = (1.6 * len(predictions), 1.6 * len(dims))
    figure, axes = pyplot.subplots(len(dims), len(predictions), figsize=size, squeeze=False)
    line = spiral(4000, stream(0, REFERENCE))
    for (i, dim), (j, prediction) in product(enumerate(dims), enumerate(predictions)):
        panel = axes[i][j]
        points = torch.tensor(found[f"D={dim} {prediction} seed {settings['seeds'][0]}"]["points"])
        panel.scatter(*line.T.numpy(), s=0.2, color="0.8")
        panel.scatter(*points.T.numpy(), s=0.6, color="tab:blue")
        panel.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), xticks=[], yticks=[], aspect="equal")
        panel.set_title(f"{prediction}-prediction" if i == 0 else "", fontsize=8)
        panel.set_ylabel(f"D = {dim}" if j == 0 else "", fontsize=8)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def setting(settings: Settings) -> str:
    """Data, model, training, rule."""
    return (
        "The paper gives neither the spiral nor the training. Here radius = theta / 7.2 with theta = 4 pi sqrt(u); "
        f"P is orthonormal; five linear layers, {settings['width']} wide, see (z, t); t is uniform; Adam, lr "
        f"{settings['lr']:g} with a cosine to {settings['min_lr']:g}, {settings['steps']} steps of {settings['batch']} "
        f"fresh points; divisors at least {settings['t_eps']}. {settings['samples']} samples by "
        f"{settings['sampling_steps']} Heun steps against {settings['reference']} points of the spiral; seeds "
        f"{settings['seeds']}. Rule: x-prediction's distance from samples to data at the largest D is at most twice "
        "that at the smallest, and there eps- and v-prediction's norm outside the plane is more than 10 times "
        "x-prediction's."
    )


CLAIM = Claim(
    name="jit_toy",
    title="JiT: only x-prediction survives a high-dimensional space",
    statement=(
        "Data on a plane inside R^D: with a network of 256 hidden units and the v-loss, x-prediction generates it at "
        "D = 2, 8, 16 and 512; eps- and v-prediction struggle at 16 and collapse at 512, where the network is too "
        "narrow to carry the noise (Li & He, arXiv 2511.13720, section 3.3, Figure 2)."
    ),
    setting=setting,
    settings=SETTINGS,
    cells=cells,
    compute=compute,
    verdict=verdict,
    tables=tables,
    draw=draw,
    caption=(
        "Samples (blue) projected back onto the plane, over the spiral (grey): a row per D, a column per prediction; "
        "points beyond the frame are not shown."
    ),
)


@one_line_errors
def main() -> None:
    command(CLAIM)


if __name__ == "__main__":
    main()
