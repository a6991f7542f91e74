"""A linear layer and a density of its outputs, a chunk of rows at a time, so that the outputs of all rows never exist.

As in fused linear cross-entropy: forward keeps h, x and the weights, backward computes each chunk's outputs again. In:
h (R, E), x (R, D), weight (P, E), bias (P,). Out: (R,). Unusual: R P numbers are neither stored nor needed at once; for
GIVT P is 528 per token, for JetFormer 263,168.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from layers.precision import without_autocast

Density = Callable[[Tensor, Tensor], Tensor]  # outputs (r, P) in float32 and x (r, D) -> (r,)

CHUNK_BYTES = 2**25  # of a chunk's float32 outputs; the density needs six times as many with their gradients
# With fewer, products would wait for their weights to be read; with more, a chunk of JetFormer's head would hold more
# than the gradient of its weights does
MIN_CHUNK_ROWS = 128


def chunk_rows(numbers_per_row: int) -> int:
    """Rows of a chunk that has this many float32 numbers per row."""
    return max(MIN_CHUNK_ROWS, CHUNK_BYTES // (4 * numbers_per_row))


def linear(h: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """h (..., E) -> float32 outputs (..., P) of a product in `dtype`, whatever autocast says."""
    with without_autocast(h.device):
        return F.linear(h.to(dtype), weight.to(dtype), bias.to(dtype)).float()


def linear_of_rows(h: Tensor, weight: Tensor, bias: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """The outputs `index` (R, Q) of each row alone: h (G, R, E) -> float32 (G, R, Q), as `linear` would give them.

    Reads Q rows of the weight per row of h, for all G at once, and no others; a chunk of rows at a time.
    """
    chunks = []
    with without_autocast(h.device):
        for c in _chunks(len(index), chunk_rows(index.shape[1] * h.shape[-1])):
            rows, columns = h[:, c].transpose(0, 1).to(dtype), weight[index[c]].to(dtype)  # (r, G, E), (r, Q, E)
            chunks.append(torch.baddbmm(bias[index[c]][:, None].to(dtype), rows, columns.mT))
    return torch.cat(chunks).transpose(0, 1).float()


def density_of_linear(
    h: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *, density: Density, dtype: torch.dtype, rows: int
) -> Tensor:
    """density(linear(h), x), (R,), in chunks of `rows`. A single chunk is left to autograd, which computes it once."""
    if len(h) <= rows:
        return density(linear(h, weight, bias, dtype), x)
    return _DensityOfLinear.apply(h, x, weight, bias, density, dtype, rows)


class _DensityOfLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        h: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        density: Density,
        dtype: torch.dtype,
        rows: int,
    ) -> Tensor:
        ctx.save_for_backward(h, x, weight, bias)
        ctx.density, ctx.dtype, ctx.rows = density, dtype, rows
        weight, bias = weight.to(dtype), bias.to(dtype)  # once for all chunks
        return torch.cat([density(linear(h[c], weight, bias, dtype), x[c]) for c in _chunks(len(h), rows)])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, x, weight, bias = ctx.saved_tensors
        grads = [torch.empty_like(h), torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)]
        grad_h, grad_x, grad_weight, grad_bias = grads
        cast, cast_bias = weight.to(ctx.dtype), bias.to(ctx.dtype)
        for c in _chunks(len(h), ctx.rows):
            outputs = linear(h[c], cast, cast_bias, ctx.dtype)
            grad_outputs, grad_x[c] = _density_grads(ctx.density, outputs, x[c], grad[c])
            grad_outputs = grad_outputs.to(ctx.dtype)  # as autograd's, through the cast
            with without_autocast(h.device):
                grad_h[c] = grad_outputs @ cast
                grad_weight += grad_outputs.T @ h[c].to(ctx.dtype)
                grad_bias += grad_outputs.sum(0)
        return *grads, None, None, None


def _density_grads(density: Density, outputs: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the density's sum, weighted by grad (r,), in outputs and x."""
    with torch.enable_grad():
        inputs = outputs.detach().requires_grad_(), x.detach().requires_grad_()
        return torch.autograd.grad(density(*inputs), inputs, grad)


def _chunks(total: int, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, total, rows))
