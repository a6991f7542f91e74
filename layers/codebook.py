"""A codebook: vectors, the search for the nearest, and what its training looks at.

Official `taming.modules.vqvae.quantize.VectorQuantizer2`, and `VectorQuantizer` of RAR's
`modeling/modules/maskgit_vqgan.py`. In: latents (B, C, h, w). Out: ids int64 (B, h*w) in raster order.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from layers.precision import without_autocast

CHUNK = 2**25  # distances are taken for as many rows at a time as give this many float32 differences (128 MiB)
ENTROPY_EPS = 1e-5  # MaskGIT `libml/losses.py`


class Codebook(nn.Module):
    """`num_codes` vectors of `channels` numbers."""

    def __init__(self, num_codes: int, channels: int) -> None:
        super().__init__()
        if num_codes < 1:
            raise ValueError(f"num_codes is {num_codes}: use 1 or more")
        self.embedding = nn.Embedding(num_codes, channels)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)  # as official code starts

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> ids int64 (B, h*w) of the nearest codes; of equally near ones, the lowest. float32 island.

        Squared differences are summed directly: the expanded product would round equal distances apart.
        """
        rows = rearrange(latents.float(), "b c h w -> (b h w) c")
        codes = self.embedding.weight.float()
        size = max(1, CHUNK // codes.numel())
        ids = [(chunk[:, None] - codes).square().sum(-1).argmin(-1) for chunk in rows.split(size)]
        return torch.cat(ids).view(len(latents), -1)

    def distances(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> squared distances (B*h*w, codes), with gradients. float32 island.

        By the expanded product, which needs no more memory than its result.
        """
        rows = rearrange(latents.float(), "b c h w -> (b h w) c")
        codes = self.embedding.weight.float()
        with without_autocast(rows.device):
            products = rows @ codes.T
        return rows.square().sum(1, keepdim=True) - 2 * products + codes.square().sum(1)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 (B, L) -> codes (B, L, C)."""
        return self.embedding(ids)

    def latents(self, ids: Tensor, size: int) -> Tensor:
        """int64 (B, size*size) -> codes in their places (B, C, size, size)."""
        return rearrange(self(ids), "b (h w) c -> b c h w", h=size, w=size)


def entropy_loss(distances: Tensor, temperature: float) -> Tensor:
    """Squared distances (R, codes) -> mean entropy of a row's soft choice, less the entropy of the mean choice: nats.

    Low where each latent is sure of its code and all codes are chosen alike, so a code that nothing is near to gets a
    gradient too. MaskGIT `libml/losses.py: entropy_loss`, type softmax. float32 island.
    """
    log_probs = (-distances.float() / temperature).log_softmax(-1)
    probs = log_probs.exp()
    mean = probs.mean(0)
    unsure = -(probs * log_probs).sum(-1).mean()
    return unsure + (mean * (mean + ENTROPY_EPS).log()).sum()


@torch.no_grad()
def code_usage(ids: Tensor, num_codes: int) -> dict[str, Tensor]:
    """ids -> "usage", the share of the codes that occur, and "perplexity", of how many equally frequent codes it is."""
    ids = ids.flatten()
    counts = torch.zeros(num_codes, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))
    entropy = torch.special.entr(counts / len(ids)).sum()
    return {"usage": (counts > 0).float().mean(), "perplexity": entropy.exp()}
