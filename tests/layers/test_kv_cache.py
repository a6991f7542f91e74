"""KVCache and causal attention with it."""

import pytest
import torch

from layers.blocks import ViTBlock
from layers.kv_cache import KVCache


def cache_for(blocks, batch, length):
    heads, width = blocks[0].attn.num_heads, blocks[0].attn.proj.in_features
    sizes = {"num_heads": heads, "length": length, "head_dim": width // heads}
    return KVCache(len(blocks), batch, **sizes, dtype=torch.float32, device="cpu")


def run(blocks, x, cache=None):
    for i, block in enumerate(blocks):
        x = block.causal(x, cache, i)
    if cache:
        cache.advance(x.shape[1])
    return x


@pytest.mark.parametrize("pieces", [[1] * 7, [3, 1, 1, 1, 1], [3, 4], [7], [2, 3, 2]])
@torch.no_grad()
def test_pieces_through_the_cache_equal_the_whole_at_every_position(pieces):
    blocks = [ViTBlock(16, 2) for _ in range(3)]
    x = torch.randn(2, 7, 16)
    cache = cache_for(blocks, 2, 7)
    out = torch.cat([run(blocks, piece, cache) for piece in x.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(out, run(blocks, x), atol=1e-5, rtol=0)


@torch.no_grad()
def test_no_position_sees_a_later_one():
    blocks = [ViTBlock(16, 2) for _ in range(2)]
    x = torch.randn(1, 6, 16)
    before = run(blocks, x)
    for i in range(6):
        moved = x.clone()
        moved[:, i] += torch.randn(16)  # a constant would not pass the norm
        changed = (run(blocks, moved) - before).abs().amax(dim=(0, 2)) > 1e-6
        assert changed.tolist() == [j >= i for j in range(6)]


def test_a_full_cache_says_so():
    cache = cache_for([ViTBlock(8, 2)], 1, 2)
    with pytest.raises(AssertionError, match="3 positions in a cache of 2"):
        cache.extend(0, torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
