"""Tensors of which each process holds a piece (torch's DTensor), as `--trainer.strategy=fsdp2` makes them of weights.

All else is returned as it is, so that callers need not know whether they run on whole weights or on pieces.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from its pieces: every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def piece_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's piece of a whole `tensor`, cut as `like`, which has its shape. Sends nothing."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    piece = distribute_tensor(tensor.detach(), like.device_mesh, like.placements, src_data_rank=None)
    return piece.clone()  # else it would keep the memory of the whole


def whole_tree(tree: Any, *, keep: bool) -> Any:
    """Nested dicts and lists with whole tensors on the host in place of pieces; without `keep`, None in their place."""
    if isinstance(tree, DTensor):
        tensor = tree.full_tensor()
        return tensor.cpu() if keep else None
    if isinstance(tree, Mapping):
        return {name: whole_tree(value, keep=keep) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(whole_tree(value, keep=keep) for value in tree)
    return tree


@torch.no_grad()
def exchange(first: Tensor, second: Tensor) -> None:
    """Swap the values of two tensors of one shape, in place: whoever holds one of them sees the other's."""
    kept = first.detach().clone()
    first.copy_(second)
    second.copy_(kept)
