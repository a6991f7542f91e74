"""Couplings one after another, with two backward passes: the usual one, and one that stores the last output alone.

The second computes each coupling's input from its output on the way back (RevNet, Gomez et al., arXiv 1707.04585). The
network of a coupling runs as often as with recomputation: what stays, which it sees, is in the output as well. In:
x (B, N, C). Out: y (B, N, C) and log |det| (B,).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def chain(couplings: Sequence[Callable[[Tensor], tuple[Tensor, Tensor]]], x: Tensor) -> tuple[Tensor, Tensor]:
    """All couplings in order, and the sum of their log-determinants."""
    logdet = x.new_zeros(len(x))
    for coupling in couplings:
        x, change = coupling(x)
        logdet = logdet + change
    return x, logdet


def reversible_chain(couplings: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, Tensor]:
    """As `chain`, but only y is kept for the backward pass, whatever the number of couplings.

    Couplings have `split`, `net`, `scale` and `merge` (see `layers/flows/jet.py`) and draw no random numbers. Gradients
    differ from those of `chain` by what is lost in inverting: rounding in float32; under bf16 autocast more, since the
    networks then round what they see. All parameters get their gradients at the end, together. They cannot be
    differentiated again.
    """
    return _ReversibleChain.apply(couplings, x, *(p for coupling in couplings for p in _trained(coupling)))


class _ReversibleChain(torch.autograd.Function):
    """The parameters are arguments, so that their gradients are returned like all others (DDP waits for them)."""

    @staticmethod
    def forward(ctx: Any, couplings: Sequence[nn.Module], x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        ctx.couplings, ctx.autocast = couplings, _autocast_as_here(x.device)
        with ctx.autocast():
            y, logdet = chain(couplings, x)
        ctx.save_for_backward(y)
        return y, logdet

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_logdet: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        grads: list[Tensor] = []
        for coupling in reversed(ctx.couplings):
            with ctx.autocast():
                y, grad_y, own = _step_back(coupling, y, grad_y, grad_logdet)
            grads = [*own, *grads]
        return None, grad_y, *grads


def _step_back(
    coupling: nn.Module, y: Tensor, grad_y: Tensor, grad_logdet: Tensor
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """A coupling's input, the gradient of it, and those of its parameters, from its output and the gradient of that."""
    with torch.enable_grad():
        seen = y.detach().requires_grad_()
        kept, moved = coupling.split(seen)
        bias, raw = coupling.net(kept)
        scale, logdet = coupling.scale(raw)
        before = (moved / scale - bias).detach().requires_grad_()
        after = (before + bias) * scale
    _, grad_after = coupling.split(grad_y)
    inputs = (seen, before, *_trained(coupling))
    through_net, grad_before, *own = torch.autograd.grad((after, logdet), inputs, (grad_after, grad_logdet))
    return coupling.merge(y, before.detach()), coupling.merge(grad_y + through_net, grad_before), own


def _trained(coupling: nn.Module) -> list[nn.Parameter]:
    return [p for p in coupling.parameters() if p.requires_grad]


def _autocast_as_here(device: torch.device) -> Callable[[], AbstractContextManager]:
    """A context with today's autocast, for the backward pass. It keeps no cast weights: those made without gradient,
    in the forward pass, must not be found by the backward pass."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    state = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
    return partial(torch.autocast, kind, **state, cache_enabled=False)
