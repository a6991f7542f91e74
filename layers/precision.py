"""What dtype is computed in, and casting weights once for sampling under autocast."""

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
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
