"""Drawing numbered images: image i of a set is the same whatever the batch size, the order and the process count.

Its noise comes from (seed, i), its label from i, class-major and balanced as in the MAR and JiT protocol: with 50,000
images of 1,000 classes, images 0 to 49 are of class 0. Processes take whole batches in turn, so that a batch holds the
same images however many of them share the work: the arithmetic is then the same to the last bit.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from layers.random import row_generators
from lightning_modules.base import GenerativeModule, to_uint8


class Drawn(NamedTuple):
    """Some images of a set: index int64 (B,) and labels (B,) on the host, uint8 images (B, 3, H, W) on the device."""

    index: Tensor
    labels: Tensor
    images: Tensor


def class_major_labels(num_images: int, num_classes: int) -> Tensor:
    """Labels 0, 0, ..., 1, 1, ...: int64 (num_images,), as evenly as the numbers allow."""
    return torch.arange(num_images) * num_classes // num_images


def rank_batches(num_images: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> list[Tensor]:
    """Image indices of one process, batch by batch: every `world_size`-th batch, each image in exactly one."""
    return list(torch.arange(num_images).split(batch_size))[rank::world_size]


def draw_images(
    module: GenerativeModule, labels: Tensor, *, seed: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[Drawn]:
    """This process's batches of a set with `labels` (N,). Float types are the caller's: see `sampling_autocast`."""
    for index in rank_batches(len(labels), batch_size, rank=rank, world_size=world_size):
        generators = row_generators(seed, index.tolist(), device=module.device)
        yield Drawn(index, labels[index], to_uint8(module.sample(labels[index], generator=generators)))


def sampling_autocast(device: torch.device) -> torch.autocast:
    """bf16 on CUDA, as in the official evaluations; float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
