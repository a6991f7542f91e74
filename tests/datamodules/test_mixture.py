"""The mixture process: its density is a density, its rows are drawn from it, its entropy is what is logged."""

import math

import pytest
import torch

from datamodules.sampler import RowKey
from datamodules.synthetic import MixtureData, MixtureProcess


def test_density_integrates_to_one() -> None:
    process = MixtureProcess.drawn(3, 1, 2, seed=1)
    axis = torch.linspace(-4, 4, 801, dtype=torch.float64)
    pairs = torch.cartesian_prod(axis, axis)[:, :, None]  # two tokens of one number
    for label in (0, 1):
        density = process.log_prob(pairs, torch.full((len(pairs),), label)).exp()
        assert abs(float(density.sum()) * 0.01**2 - 1) < 1e-3


def test_rows_follow_the_density() -> None:
    """E[q/p] over draws of p is 1 for any other density q; and p beats q."""
    process = MixtureProcess.drawn(3, 2, 2, seed=3)
    labels = torch.arange(2).repeat(10_000)
    z = process.sample(labels, 3, torch.Generator().manual_seed(0))
    other = MixtureProcess(process.modes, process.scales * 0.9, process.first.roll(1, 0), process.step.roll(1, 0))
    ratio = other.log_prob(z, labels) - process.log_prob(z, labels)
    assert abs(float(ratio.exp().mean()) - 1) < 0.1
    assert float(ratio.mean()) < -0.1


def test_one_mode_has_the_entropy_of_a_gaussian() -> None:
    process = MixtureProcess(torch.zeros(1, 2), torch.tensor([0.2]), torch.zeros(1, 1), torch.zeros(1, 1, 1))
    labels = torch.zeros(20_000, dtype=torch.int64)
    z = process.sample(labels, 4, torch.Generator().manual_seed(0))
    entropy = 8 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.2))
    assert abs(float(-process.log_prob(z, labels).mean()) - entropy) < 0.05


def test_rows_carry_their_nats_and_labels() -> None:
    data = MixtureData(image_size=2, batch_size=4, length=32, val_length=8, token_dim=3, num_classes=5)
    data.setup()
    batch = data.train_set.__getitems__([RowKey(0, 3), RowKey(7, 31)])
    assert batch["raw"].shape == (2, 4, 3) and batch["label"].dtype == torch.int64
    expected = -data.process.log_prob(batch["raw"], batch["label"])
    assert torch.allclose(batch["true_nats"], expected)
    assert len(data.val_set) == 8
    again = MixtureData(image_size=2, batch_size=4, length=32, val_length=8, token_dim=3, num_classes=5)
    again.setup()
    assert torch.equal(again.train_set.z, data.train_set.z) and not torch.equal(data.train_set.z[:8], data.val_set.z)


@pytest.mark.parametrize("name", ["token_dim", "num_modes", "num_classes", "length", "val_length"])
def test_counts_below_one_are_errors(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        MixtureData(**{name: 0})
