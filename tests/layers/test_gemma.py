"""Gemma's block: multi-query attention against the softmax written out, its cache, and official kernels both ways."""

import pytest
import torch
from torch import Tensor

from layers import gemma
from layers.checkpoint import to_official, to_ours
from layers.gemma import GemmaBlock, MultiQueryAttention, block_rules, grouped_attention
from layers.kv_cache import KVCache
from layers.rope import rotary_table

B, N, L, D = 2, 4, 5, 6
kv_heads = pytest.mark.parametrize("num_kv_heads", [1, 2, 4])


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Head by head; mask (B, L, S)."""
    group, heads = q.shape[1] // k.shape[1], []
    for n in range(q.shape[1]):
        scores = q[:, n] @ k[:, n // group].mT / q.shape[-1] ** 0.5
        weights = scores.exp() * mask
        heads.append(weights / weights.sum(-1, keepdim=True) @ v[:, n // group])
    return torch.stack(heads, dim=1)


def tensors(num_kv_heads: int, queries: int) -> list[Tensor]:
    sizes = ((N, queries), (num_kv_heads, L), (num_kv_heads, L))
    return [torch.randn(B, heads, length, D, requires_grad=True) for heads, length in sizes]


@kv_heads
@pytest.mark.parametrize("queries", [1, L])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_gradients_equal_the_softmax_written_out(num_kv_heads, queries, masked):
    q, k, v = tensors(num_kv_heads, queries)
    causal = torch.ones(L, L, dtype=torch.bool).tril()[-queries:].expand(B, -1, -1)
    mask = causal & ((torch.rand(B, 1, L) < 0.5) | torch.eye(L, dtype=torch.bool)[-queries:]) if masked else causal
    found = grouped_attention(q, k, v, mask[:, None] if masked else None)
    expected = written_out(q, k, v, mask)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (found, expected)]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("num_kv_heads", "queries"), [(1, L), (1, 1), (2, 1), (4, L)])
def test_keys_are_not_copied_for_each_head(num_kv_heads, queries, monkeypatch):
    q, k, v = tensors(num_kv_heads, queries)
    seen, plain = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        gemma.F, "scaled_dot_product_attention", lambda *args, **kw: seen.extend(args[1:3]) or plain(*args, **kw)
    )
    grouped_attention(q, k, v)
    assert [t.untyped_storage().data_ptr() for t in seen] == [t.untyped_storage().data_ptr() for t in (k, v)]


def block(num_kv_heads: int = 1, **options) -> GemmaBlock:
    sizes = {"num_kv_heads": num_kv_heads, "head_dim": D, "mlp_hidden": 12, "dropout": 0.0} | options
    made = GemmaBlock(8, N, **sizes)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return made


def official_block(x: Tensor, positions: Tensor, state: dict[str, Tensor]) -> Tensor:
    """`ppp/gemma.py` in einsums, causal."""

    def norm(y: Tensor, name: str) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + state[f"l/{name}/scale"])

    def rope(y: Tensor) -> Tensor:
        angle = positions[:, :, None, None] / 10_000 ** (torch.arange(0, D, 2) / D)
        u, v = y.chunk(2, dim=-1)
        return torch.cat([u * angle.cos() - v * angle.sin(), v * angle.cos() + u * angle.sin()], dim=-1)

    h = norm(x, "pre_attention_norm")
    if "l/attn/qkv_einsum/w" in state:
        q, k, v = torch.einsum("bsd,tkdh->tbskh", h, state["l/attn/qkv_einsum/w"])
    else:
        q = torch.einsum("btd,ndh->btnh", h, state["l/attn/q_einsum/w"])
        k, v = torch.einsum("bsd,tkdh->tbskh", h, state["l/attn/kv_einsum/w"])
    q = (rope(q) * D**-0.5).unflatten(2, (k.shape[2], -1))
    logits = torch.einsum("btkgh,bskh->bkgts", q, rope(k))
    logits = logits.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf)
    encoded = torch.einsum("bkgts,bskh->btkgh", logits.softmax(-1), v).flatten(2, 3)
    x = x + torch.einsum("btnh,nhd->btd", encoded, state["l/attn/attn_vec_einsum/w"])
    h, (gate, value) = norm(x, "pre_ffw_norm"), state["l/mlp/gating_einsum"]
    return x + (torch.nn.functional.gelu(h @ gate, approximate="tanh") * (h @ value)) @ state["l/mlp/linear"]


@kv_heads
@torch.no_grad()
def test_block_under_official_names_computes_the_official_block(num_kv_heads):
    ours, rules = block(num_kv_heads), block_rules("l", "b", num_heads=N, num_kv_heads=num_kv_heads)
    official = to_official({f"b.{name}": p for name, p in ours.named_parameters()}, rules)
    shapes = {name: tuple(tensor.shape) for name, tensor in official.items()}
    if num_kv_heads == N:
        assert shapes["l/attn/qkv_einsum/w"] == (3, N, 8, D)
    else:
        assert shapes["l/attn/q_einsum/w"] == (N, 8, D) and shapes["l/attn/kv_einsum/w"] == (2, num_kv_heads, 8, D)
    assert shapes["l/attn/attn_vec_einsum/w"] == (N, D, 8) and shapes["l/mlp/gating_einsum"] == (2, 8, 12)
    x, positions = torch.randn(B, L, 8), torch.tensor([[0, 1, 2, 3, 4], [0, 0, 1, 2, 2]])
    expected = official_block(x, positions, official)
    torch.testing.assert_close(ours(x, rotary_table(positions, D)), expected, atol=1e-5, rtol=1e-5)
    back = to_ours(official, rules)
    assert all(torch.equal(back[f"b.{name}"], p) for name, p in ours.named_parameters())


def test_kernels_of_another_number_of_heads_are_refused():
    official = to_official(
        {f"b.{name}": p for name, p in block().named_parameters()}, block_rules("l", "b", num_heads=N, num_kv_heads=1)
    )
    with pytest.raises(ValueError, match=r"\(\(4,\), \(2, 1\)\) heads, this model of \(\(2,\), \(2, 1\)\)"):
        to_ours(official, block_rules("l", "b", num_heads=2, num_kv_heads=1))


@kv_heads
@pytest.mark.parametrize("pieces", [[L], [2, 1, 1, 1]])
@torch.no_grad()
def test_pieces_through_the_cache_equal_the_whole(num_kv_heads, pieces):
    ours, x, rope = block(num_kv_heads), torch.randn(B, L, 8), rotary_table(torch.arange(L)[None], D)
    sizes = {"num_heads": num_kv_heads, "length": L, "head_dim": D}
    cache, out = KVCache(1, B, **sizes, dtype=torch.float32, device="cpu"), []
    for piece, table in zip(x.split(pieces, dim=1), rope.split(pieces, dim=3), strict=True):
        out.append(ours(piece, table, None, cache, 0))
        cache.advance(piece.shape[1])
    torch.testing.assert_close(torch.cat(out, dim=1), ours(x, rope), atol=1e-5, rtol=1e-5)


def test_dropout_acts_on_both_branches_and_nowhere_else():
    ours, x, rope = block(dropout=0.5).train(), torch.randn(B, L, 8), rotary_table(torch.arange(L)[None], D)
    dropped = []
    ours.dropout.register_forward_hook(lambda _, inputs, output: dropped.append((inputs[0], output)))
    ours(x, rope)
    (attention, attention_kept), (mlp, _) = dropped
    torch.testing.assert_close(attention, ours.attn(ours.norm1(x), rope))
    torch.testing.assert_close(mlp, ours.mlp(ours.norm2(x + attention_kept)))
    for before, after in dropped:
        assert 0.2 < (after == 0).float().mean() < 0.8
        torch.testing.assert_close(after[after != 0], 2 * before[after != 0])
    assert torch.equal(ours.eval()(x, rope), ours(x, rope))


def test_linear_maps_begin_with_variance_one_over_fan_in_and_end_at_two_sigmas():
    ours = GemmaBlock(64, 8, num_kv_heads=1, head_dim=32, mlp_hidden=256, dropout=0.0)
    ours.init_weights()
    for linear in (ours.attn.qkv, ours.attn.proj, ours.mlp.w12, ours.mlp.w3):
        scaled = linear.weight * linear.in_features**0.5
        assert scaled.std().item() == pytest.approx(1, abs=0.05)
        assert 2.2 < scaled.abs().max() < 2.28
    assert not ours.norm1.scale.any() and not ours.norm2.scale.any()


def test_heads_of_queries_share_heads_of_keys_evenly():
    with pytest.raises(ValueError, match="num_heads 4 is not divisible by num_kv_heads 3"):
        MultiQueryAttention(8, 4, num_kv_heads=3, head_dim=2)
