"""Linear probing: `python -m experiments.probe --exp givt_digits --ckpt last`.

How well a linear classifier reads the class off each of a model's representations (Chen et al., ICML 2020; GIVT, arXiv
2312.02116): features of the training split, standardised, logistic regression, accuracy on the validation split. The
labels are dropped; a model trained without any (`--model.init_args.objective.label_drop_prob=1`) is the paper's case.
Overrides: --data.* and --model.*. `make probe` calls this.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Generator

from experiments.errors import one_line_errors
from experiments.load import ready_data, split_overrides
from experiments.sample import add_source, load
from lightning_modules.base import GenerativeModule

Features = dict[str, np.ndarray]


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and overrides."""
    parser = argparse.ArgumentParser(prog="probe", description=__doc__, allow_abbrev=False)
    add_source(parser)
    parser.add_argument("--num", type=int, default=50_000, help="training images at most")
    parser.add_argument("--l2", type=float, default=1.0, help="inverse strength of the penalty on the weights (C)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_known_args(argv)


def batches(datamodule: Any, split: str, limit: int, device: str) -> Iterator[dict[str, Any]]:
    """Batches of a split on the device, the first `limit` rows of it."""
    count = 0
    for batch in datamodule.ordered_loader(split):
        if count >= limit:
            return
        batch = {name: value[: limit - count] for name, value in batch.items()}
        count += len(batch["label"])
        yield {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


@torch.no_grad()
def read(module: GenerativeModule, rows: Iterator[dict[str, Any]], *, seed: int) -> tuple[Features, np.ndarray]:
    """{name of a representation: (N, E)} and labels (N,)."""
    generator = Generator(module.device).manual_seed(seed)
    parts: dict[str, list[np.ndarray]] = {}
    for batch in rows:
        found = module.representations(batch, generator) | {"label": batch["label"]}
        for name, value in found.items():
            parts.setdefault(name, []).append(value.float().cpu().numpy())
    features = {name: np.concatenate(values) for name, values in parts.items()}
    return features, features.pop("label").astype(np.int64)


def accuracy(train: np.ndarray, labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray, *, l2: float) -> float:
    """Share of validation rows that a linear classifier of the training rows reads right."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=l2, max_iter=2000))
    return float(probe.fit(train, labels).score(val, val_labels))


@one_line_errors
def main() -> None:
    options, overrides = parse()
    if options.num < 1 or options.l2 <= 0:
        raise ValueError(f"NUM is {options.num} and --l2 {options.l2}: both must be positive")
    data, overrides = split_overrides(overrides)
    module, source = load(options, overrides)
    if not hasattr(module, "representations"):
        raise ValueError(f"{type(module).__name__} names no representations to probe: GIVT-Causal does (EXP=givt)")
    datamodule = ready_data(options.exp, data)
    module.to(options.device)
    (train, labels), (val, val_labels) = (
        read(module, batches(datamodule, split, limit, options.device), seed=options.seed)
        for split, limit in (("train", options.num), ("val", datamodule.split_length("val")))
    )
    print(f"linear probes of {source}: {len(labels)} training rows, {len(val_labels)} of validation")
    table = Table()
    table.add_column("representation")
    table.add_column("accuracy", justify="right")
    for name in train:
        table.add_row(name, f"{accuracy(train[name], labels, val[name], val_labels, l2=options.l2):.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
