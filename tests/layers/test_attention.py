"""Self-attention against the softmax written out."""

import pytest
import torch

from layers.attention import Attention, NormedAttention, PlainAttention
from layers.rope import apply_rope, axial_rope


def written_out(attention: Attention, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Head by head: the same numbers without a fused kernel."""
    width, dim = x.shape[-1], x.shape[-1] // attention.num_heads
    qkv, heads = attention.qkv(x), []
    for n in range(attention.num_heads):
        q, k, v = (qkv[..., i * width + n * dim :][..., :dim] for i in range(3))
        q, k = (
            apply_rope((y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w).unsqueeze(1), rope).squeeze(1)
            for y, w in ((q, attention.q_norm.weight), (k, attention.k_norm.weight))
        )
        scores = q @ k.transpose(-1, -2) / dim**0.5
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(weights @ v)
    return attention.proj(torch.cat(heads, dim=-1))


def build(**dropout):
    attention = Attention(16, 2, **dropout)
    torch.nn.init.normal_(attention.q_norm.weight)
    torch.nn.init.normal_(attention.k_norm.weight)
    return attention, torch.randn(2, 6, 16), axial_rope(8, (2, 2), num_prefix=2)


def test_attention_equals_the_softmax_written_out():
    attention, x, rope = build()
    torch.testing.assert_close(attention(x, rope), written_out(attention, x, rope), atol=1e-6, rtol=1e-5)


def test_gradients_equal_those_of_the_softmax_written_out():
    attention, x, rope = build()
    plain, fused = (
        torch.autograd.grad(f(x, rope).square().sum(), list(attention.parameters()))
        for f in (lambda *args: written_out(attention, *args), attention)
    )
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["attn_dropout", "proj_dropout"])
def test_dropout_acts_in_train_mode_only(kind):
    attention, x, rope = build(**{kind: 0.5})
    attention.eval()
    torch.testing.assert_close(attention(x, rope), written_out(attention, x, rope), atol=1e-6, rtol=1e-5)
    attention.train()
    assert not torch.equal(attention(x, rope), attention(x, rope))


def test_proj_dropout_acts_on_the_output_and_attn_dropout_does_not():
    proj, x, rope = build(proj_dropout=0.5)
    assert 0.3 < (proj(x, rope) == 0).float().mean() < 0.7
    attn, x, rope = build(attn_dropout=0.5)
    assert (attn(x, rope) != 0).all()


def test_width_must_be_divisible_by_the_heads():
    with pytest.raises(ValueError, match="width 10 is not divisible by num_heads 4"):
        Attention(10, 4)


@torch.no_grad()
def test_normed_attention_is_plain_attention_of_normed_queries_and_keys():
    """In all three forms."""
    normed, plain, x = NormedAttention(8, 2), PlainAttention(8, 2), torch.randn(2, 5, 8)
    for p in normed.parameters():
        torch.nn.init.normal_(p)
    plain.proj.load_state_dict(normed.proj.state_dict())
    q, k, v = normed.qkv(x).view(2, 5, 3, 2, 4).unbind(2)
    plain.qkv = torch.nn.Identity()
    made = torch.stack([normed.q_norm(q), normed.k_norm(k), v], dim=2).flatten(2)  # what plain's layer would give
    torch.testing.assert_close(normed(x), plain(made))
    torch.testing.assert_close(normed.causal(x), plain.causal(made))
    torch.testing.assert_close(normed.query(x, x[:, 1:3]), normed(x)[:, 1:3], atol=1e-5, rtol=1e-5)
