"""Random draws whose generator may be one for the batch, one per row, or a function of the shape."""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

Generators = Generator | Sequence[Generator] | Callable[[Sequence[int]], Tensor] | None


def randn(shape: Sequence[int], generator: Generators, *, device: torch.device | str) -> Tensor:
    """Standard normal tensor of `shape`, float32.

    With a sequence of generators, one per row, row i depends on generator i alone: an image then does not change with
    the size of the batch that it is drawn in. Raises ValueError if their number is not the number of rows.
    """
    if generator is None or isinstance(generator, Generator):
        return torch.randn(*shape, generator=generator, device=device)
    if callable(generator):  # draws of the caller's own, as for one process's rows of a global batch
        return generator(shape)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for {shape[0]} rows: give one per row, or a single one")
    return torch.stack([torch.randn(*shape[1:], generator=g, device=device) for g in generator])


def token_noise(
    batch: int, draws: int, tokens: int, dim: int, *, generator: Generators, device: torch.device | str
) -> Tensor:
    """Standard normal noise (draws, batch * tokens, dim) of a head: each image's comes from its own generator."""
    noise = randn((batch, draws, tokens, dim), generator, device=device)
    return noise.transpose(0, 1).flatten(1, 2)


def row_generators(seed: int, indices: Sequence[int], *, device: torch.device | str) -> list[Generator]:
    """One generator per image index: image i of a seed is the same whatever batch or process draws it."""
    return [torch.Generator(device).manual_seed(mix_seed(seed, i)) for i in indices]


def mix_seed(*parts: int) -> int:
    """Hash whole numbers into one 63-bit seed (splitmix64), so that neighbours give unrelated streams."""
    state = 0
    for part in parts:
        state = (state ^ part) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
