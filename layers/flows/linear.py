"""Linear maps of tokens, in the place of a flow or before one: learned, or by frozen principal components.

What JetFormer's ablations hold against its flow (Tschannen et al., arXiv 2411.19722). The first was never released and
is written from its formula; the second is `models/proj/jetformer/patch_pca.py`, which leaves out the log-determinant
that is counted here. In and out: tokens (B, N, C), log |det| (B,) in nats.
"""

from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor, nn

from layers.precision import without_autocast
from layers.random import Generators, randn


class LearnedLinear(nn.Module):
    """y = x W with a learned W (C, C), the identity at first; float32 whatever autocast says.

    ln |det W| by `slogdet`, a few C^3 at each step, next to nothing beside a network. Weight decay pulls W to zero, and
    with it the volume: better exempt it.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, C) -> the same, and N ln |det W| for each image (B,)."""
        with without_autocast(x.device):
            return _float(x) @ self.weight, self._logdet(x)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` maps to y, and minus its log-determinant. W that training made singular raises an error."""
        with without_autocast(y.device):
            x = torch.linalg.solve(self.weight, _float(y).flatten(0, 1), left=False)
            return x.view(y.shape), -self._logdet(y)

    def _logdet(self, x: Tensor) -> Tensor:
        return (x.shape[1] * torch.linalg.slogdet(self.weight).logabsdet).expand(len(x))


class PCA(nn.Module):
    """Principal components of tokens, frozen; the identity until `fit` or until a state dict is loaded.

    Buffers as in scikit-learn's files: mean (C,), components (K, C), of which rows are orthonormal, explained_variance
    (K,). `whiten`: codes have unit variance. `depth_to_seq`: a code is cut into so many tokens; all first parts come
    before all second ones. `noise_std`: of `noised`. Raises ValueError for K that depth_to_seq does not divide.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_components: int | None = None,
        whiten: bool = True,
        depth_to_seq: int = 1,
        noise_std: float = 0.01,
    ) -> None:
        super().__init__()
        count = num_components or dim
        if count > dim or count % depth_to_seq:
            raise ValueError(
                f"num_components is {count}: it must be at most {dim}, and a multiple of depth_to_seq {depth_to_seq}"
            )
        self.whiten, self.depth_to_seq, self.noise_std = whiten, depth_to_seq, noise_std
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("components", torch.eye(dim)[:count].clone())
        self.register_buffer("explained_variance", torch.ones(count))

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """From batches of tokens (..., C), each seen once; sums are float64. Largest variance first; the largest entry
        of a component is positive. Raises ValueError for fewer than two tokens."""
        count, total, products = 0, 0.0, 0.0
        for batch in batches:
            x = batch.flatten(0, -2).double()
            count, total, products = count + len(x), total + x.sum(0), products + x.T @ x
        if count < 2:
            raise ValueError(f"principal components need two tokens or more, not {count}")
        mean = total / count
        variance, vectors = torch.linalg.eigh((products - count * mean.outer(mean)) / (count - 1))
        variance, rows = (t.flip(0)[: len(self.components)] for t in (variance, vectors.T))
        signs = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
        self.mean.copy_(mean)
        self.components.copy_(rows * signs)
        self.explained_variance.copy_(variance.clamp_min(0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, C) -> codes, and the log-determinant of each image (B,).

        Raises ValueError if components were left out: tokens then have no density, only codes (`encode`).
        """
        return self.encode(x), self._logdet(x)

    def inverse(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` maps to codes, and minus its log-determinant."""
        x = self.decode(codes)
        return x, -self._logdet(x)

    def encode(self, x: Tensor) -> Tensor:
        """(B, N, C) -> codes (B, N f, K / f), f = depth_to_seq."""
        with without_autocast(x.device):
            codes = (_float(x) - self.mean) @ self.components.T
        codes = codes / self._scale() if self.whiten else codes
        return rearrange(codes, "b n (f d) -> b (f n) d", f=self.depth_to_seq)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes -> tokens (B, N, C); what components that were left out had of them is lost."""
        codes = rearrange(_float(codes), "b (f n) d -> b n (f d)", f=self.depth_to_seq)
        with without_autocast(codes.device):
            return (codes * self._scale() if self.whiten else codes) @ self.components + self.mean

    def noised(self, codes: Tensor, generator: Generators = None) -> Tensor:
        """Codes with the official regularisation: Gaussian noise of `noise_std`."""
        return codes + self.noise_std * randn(codes.shape, generator, device=codes.device)

    def _scale(self) -> Tensor:
        """Standard deviations, at least float32's epsilon."""
        return self.explained_variance.sqrt().clamp_min(torch.finfo(torch.float32).eps)

    def _logdet(self, x: Tensor) -> Tensor:
        """-N sum ln sigma: rows of the components are orthonormal, so only the division changes the volume."""
        if len(self.components) < x.shape[-1]:
            raise ValueError(
                f"{len(self.components)} of {x.shape[-1]} components were kept, so tokens have no density: keep all, "
                f"and model the last ones by a normal distribution"
            )
        nats = -x.shape[1] * self._scale().log().sum() if self.whiten else self.mean.new_zeros(())
        return nats.expand(len(x))


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
