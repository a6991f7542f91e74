"""Seeded fake rows, for tests, smoke runs and benchmarks, and sequences whose entropy is known.

SyntheticData: row i depends only on (seed, i): label i mod `num_classes`, image = a colour of its class plus uniform
noise. A model can so learn something in a few steps, and no file, network or decoder is involved. Validation rows
continue the numbering, so they differ from the training rows. Images uint8 (N,3,H,W) are held in memory; captions are
"class 3".

MixtureData: sequences of vectors drawn from a process whose density is written down below, so that a likelihood model
can be held against the entropy, which no model undercuts but by chance of the rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

import torch
from torch import Tensor

from datamodules.base import BatchData, RowDataset, TensorRows, check_counts
from datamodules.sampler import RowKey, hash64

NOISE = 32  # largest distance of a pixel from the colour of its class, in grey levels


class SyntheticData(BatchData):
    """`length` training and `val_length` validation rows. Raises ValueError for counts below 1."""

    def __init__(
        self,
        image_size: int = 32,
        batch_size: int = 16,
        *,
        num_classes: int = 10,
        length: int = 64,
        val_length: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        limit_n: int | None = None,
    ) -> None:
        super().__init__(image_size, batch_size, num_workers=num_workers, seed=seed, limit_n=limit_n)
        check_counts(num_classes=num_classes, length=length, val_length=val_length)
        self.num_classes = num_classes
        self.class_names = [f"class {c}" for c in range(num_classes)]
        self.length, self.val_length = length, val_length

    def make_datasets(self) -> tuple[RowDataset, RowDataset]:
        """Returns the training rows 0..length-1 and the validation rows that follow them."""
        train, val = range(self.length), range(self.length, self.length + self.val_length)
        return self._rows(train), self._rows(val)

    def _rows(self, indices: range) -> TensorRows:
        labels = torch.tensor([i % self.num_classes for i in indices])
        images = torch.empty(len(indices), 3, self.image_size, self.image_size, dtype=torch.uint8)
        for row, (i, label) in enumerate(zip(indices, labels.tolist(), strict=True)):
            images[row] = fake_image(self.image_size, label, seed=hash64(self.seed, i) >> 1)
        return TensorRows(images, labels, captions=self.class_names)


def fake_image(size: int, label: int, *, seed: int) -> Tensor:
    """uint8 (3, size, size): the colour of class `label`, the same for every seed, plus noise drawn from `seed`."""
    colour = torch.tensor([NOISE + hash64(label, channel) % (256 - 2 * NOISE) for channel in range(3)])
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(-NOISE, NOISE + 1, (3, size, size), generator=generator)
    return (colour[:, None, None] + noise).to(torch.uint8)


class VectorBatch(TypedDict):
    """One batch of vector sequences."""

    raw: Tensor  # (B, L, D)
    label: Tensor  # (B,)
    true_nats: Tensor  # (B,) -log p(raw | label) under the process, in nats of the whole sequence


@dataclass(frozen=True)
class MixtureProcess:
    """Markov chain of vectors: z_t given z_{t-1} is a mixture of K Gaussians N(mode_k, scale_k^2 I), whose weights are
    the row of a class's transition table that belongs to the mode nearest to z_{t-1}.

    modes (K, D), scales (K,), first (classes, K) log weights of z_0, step (classes, K, K) log weights of the others.
    """

    modes: Tensor
    scales: Tensor
    first: Tensor
    step: Tensor

    @classmethod
    def drawn(cls, num_modes: int, token_dim: int, num_classes: int, *, seed: int) -> "MixtureProcess":
        """A process by its seed: modes in [-2, 2)^D, apart from each other, and scales of 0.1 to 0.2."""
        generator = torch.Generator().manual_seed(seed)
        modes = torch.rand(1, token_dim, generator=generator) * 4 - 2
        while len(modes) < num_modes:  # rejection: a candidate too close to another is thrown away
            candidate = torch.rand(1, token_dim, generator=generator) * 4 - 2
            if torch.cdist(candidate, modes).min() > 4 / (num_modes + 1) ** (1 / token_dim) / 2:
                modes = torch.cat([modes, candidate])
        scales = 0.1 + 0.1 * torch.rand(num_modes, generator=generator)
        first = (2 * torch.randn(num_classes, num_modes, generator=generator)).log_softmax(-1)
        step = (2 * torch.randn(num_classes, num_modes, num_modes, generator=generator)).log_softmax(-1)
        return cls(modes, scales, first, step)

    def nearest(self, z: Tensor) -> Tensor:
        """The mode nearest to each vector: (..., D) -> (...), int64."""
        return (z[..., None, :] - self.modes).square().sum(-1).argmin(-1)

    def sample(self, labels: Tensor, length: int, generator: torch.Generator) -> Tensor:
        """Labels (B,) -> sequences (B, length, D)."""
        weights, tokens = self.first[labels], []
        for _ in range(length):
            mode = torch.multinomial(weights.exp(), 1, generator=generator)[:, 0]
            noise = torch.randn(len(labels), self.modes.shape[1], generator=generator)
            tokens.append(self.modes[mode] + self.scales[mode, None] * noise)
            weights = self.step[labels, self.nearest(tokens[-1])]
        return torch.stack(tokens, dim=1)

    def log_prob(self, z: Tensor, labels: Tensor) -> Tensor:
        """Exact log density of sequences: z (B, L, D), labels (B,) -> (B,) nats, in float64."""
        z, modes, scales = z.double(), self.modes.double(), self.scales.double()
        rows = self.step[labels[:, None], self.nearest(z[:, :-1])]  # (B, L-1, K)
        weights = torch.cat([self.first[labels][:, None], rows], dim=1).double()  # (B, L, K)
        square = ((z[:, :, None] - modes) / scales[:, None]).square().sum(-1)  # (B, L, K)
        norm = z.shape[-1] * (scales.log() + 0.5 * math.log(2 * math.pi))
        return (weights - 0.5 * square - norm).logsumexp(-1).sum(-1)


class VectorRows(RowDataset):
    """Sequences held in memory: z (N, L, D), labels (N,), their true nats (N,)."""

    def __init__(self, z: Tensor, labels: Tensor, true_nats: Tensor) -> None:
        self.z, self.labels, self.true_nats = z, labels, true_nats

    def __len__(self) -> int:
        return len(self.z)

    def __getitems__(self, keys: Sequence[RowKey]) -> VectorBatch:
        rows = torch.tensor([key.index for key in keys])
        return {"raw": self.z[rows], "label": self.labels[rows], "true_nats": self.true_nats[rows]}


class MixtureData(BatchData):
    """image_size^2 vectors of `token_dim` numbers per row, from a MixtureProcess of `num_modes` modes by `seed`.

    For VectorTokenizer. Rows carry their exact log density, so that logs show the gap to the entropy
    (`nats_above_entropy`). Raises ValueError for counts below 1.
    """

    def __init__(
        self,
        image_size: int = 4,
        batch_size: int = 256,
        *,
        token_dim: int = 2,
        num_modes: int = 4,
        num_classes: int = 4,
        length: int = 65_536,
        val_length: int = 4096,
        num_workers: int = 0,
        seed: int = 0,
        limit_n: int | None = None,
    ) -> None:
        super().__init__(image_size, batch_size, num_workers=num_workers, seed=seed, limit_n=limit_n)
        check_counts(token_dim=token_dim, num_modes=num_modes, num_classes=num_classes)
        check_counts(length=length, val_length=val_length)
        self.token_dim, self.num_modes, self.num_classes = token_dim, num_modes, num_classes
        self.length, self.val_length = length, val_length

    @cached_property
    def process(self) -> MixtureProcess:
        """Drawn when it is asked for: to build a data module computes nothing."""
        return MixtureProcess.drawn(self.num_modes, self.token_dim, self.num_classes, seed=hash64(self.seed) >> 1)

    def make_datasets(self) -> tuple[RowDataset, RowDataset]:
        """Returns independent training and validation rows."""
        return self._rows(self.length, 1), self._rows(self.val_length, 2)

    def _rows(self, count: int, part: int) -> VectorRows:
        generator = torch.Generator().manual_seed(hash64(self.seed, part) >> 1)
        labels = torch.randint(self.num_classes, (count,), generator=generator)
        z = self.process.sample(labels, self.image_size**2, generator)
        return VectorRows(z, labels, -self.process.log_prob(z, labels))
