"""What dtype is computed in, and casting weights once for sampling under autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def cast_linear_(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the weights of all linear layers in place; norms, tables and embeddings stay float32.

    Autocast would cast them anew at each of a sampler's forwards; the results are the same, bit for bit.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.to(dtype)
    return module


def compute_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype of matrix products on this device as things stand: autocast's where it is on, else float32."""
    kind = torch.device(device).type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled else torch.float32


def without_autocast(device: torch.device | str) -> AbstractContextManager:
    """Inside, products are computed in the dtype of their factors. Meta tensors, which have no autocast, may enter."""
    kind = torch.device(device).type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
