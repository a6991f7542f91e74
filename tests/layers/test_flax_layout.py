"""Flax's parameters in our layout and back, against flax's own formulas."""

import pytest
import torch

from layers.attention import PlainAttention
from layers.checkpoint import to_official, to_ours
from layers.flax_layout import (
    conv_rules,
    cross_attention_rules,
    heads_in_rules,
    linear_rules,
    norm_rules,
    self_attention_rules,
    stack,
    unstack,
)


def same(a, b):
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("axis", [0, 1])
def test_layers_of_one_array_come_apart_and_together(axis):
    layers = [torch.randn(3, 5) for _ in range(11)]  # more than ten: numbers, not their spelling, give the order
    state = {"enc/block/x/kernel": torch.stack(layers, dim=axis), "enc/norm/scale": torch.ones(2)}
    apart = unstack(state, "enc/block", "enc/block_{}", axis=axis)
    same(apart, {f"enc/block_{i}/x/kernel": w for i, w in enumerate(layers)} | {"enc/norm/scale": torch.ones(2)})
    same(unstack(apart, "enc/block", "enc/block_{}", axis=axis), apart)
    same(stack(apart, "enc/block", "enc/block_{}", axis=axis), state)


def test_a_name_that_only_begins_alike_is_no_layer():
    state = {"enc/blocks/kernel": torch.ones(2, 3), "enc/block0/kernel": torch.ones(2)}
    same(unstack(state, "enc/block", "enc/block{}", axis=0), state)


def test_linear_conv_and_norm():
    x, kernel, bias = torch.randn(4, 3), torch.randn(3, 5), torch.randn(5)
    rules = linear_rules("a/*", "b.*")
    official = {"a/d/kernel": kernel, "a/d/bias": bias}
    ours = to_ours(official, rules)
    torch.testing.assert_close(torch.nn.functional.linear(x, ours["b.d.weight"], ours["b.d.bias"]), x @ kernel + bias)
    same(to_official(ours, rules), official)
    conv = {"c/kernel": torch.randn(3, 3, 2, 4)}
    ours = to_ours(conv, conv_rules("c", "c"))
    assert ours["c.weight"][3, 1, 0, 2] == conv["c/kernel"][0, 2, 1, 3]
    same(to_official(ours, conv_rules("c", "c")), conv)
    norm = {"n/scale": torch.ones(2), "n/bias": torch.zeros(2)}
    same(to_ours(norm, norm_rules("n", "m")), {"m.weight": torch.ones(2), "m.bias": torch.zeros(2)})


def flax_attention(x, memory, state, name):
    """MultiHeadDotProductAttention: x (L, E), memory (M, E)."""

    def project(y, part):
        return torch.einsum("le,end->lnd", y, state[f"{name}/{part}/kernel"]) + state.get(f"{name}/{part}/bias", 0)

    q, k, v = project(x, "query"), project(memory, "key"), project(memory, "value")
    weights = (torch.einsum("lnd,mnd->nlm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    out = torch.einsum("nlm,mnd->lnd", weights, v)
    return torch.einsum("lnd,nde->le", out, state[f"{name}/out/kernel"]) + state.get(f"{name}/out/bias", 0)


def attention_state(name, width=6, heads=2, *, bias=True):
    dim, state = width // heads, {}
    for part in ("query", "key", "value"):
        state[f"{name}/{part}/kernel"] = torch.randn(width, heads, dim)
        state |= {f"{name}/{part}/bias": torch.randn(heads, dim)} if bias else {}
    state[f"{name}/out/kernel"] = torch.randn(heads, dim, width)
    return state | ({f"{name}/out/bias": torch.randn(width)} if bias else {})


def test_fused_self_attention_computes_what_flax_does():
    official, rules = attention_state("l3/attn"), self_attention_rules("l*/attn", "*", num_heads=2)
    ours = to_ours(official, rules)
    attention = PlainAttention(6, 2)
    attention.load_state_dict({name.removeprefix("3."): tensor for name, tensor in ours.items()})
    x = torch.randn(5, 6)
    torch.testing.assert_close(attention(x[None])[0], flax_attention(x, x, official, "l3/attn"))
    same(to_official(ours, rules), official)


def test_cross_attention_keeps_queries_apart():
    official, rules = attention_state("x", bias=False), cross_attention_rules("x", "y", num_heads=2)
    ours = to_ours(official, rules)
    assert {name: tuple(t.shape) for name, t in ours.items()} == {
        "y.q.weight": (6, 6),
        "y.kv.weight": (12, 6),
        "y.proj.weight": (6, 6),
    }
    same(to_official(ours, rules), official)


def test_keys_and_values_of_multi_query_attention_have_one_head():
    rules = [
        *heads_in_rules("a", "a.q", ("query",), num_heads=4),
        *heads_in_rules("a", "a.kv", ("key", "value"), num_heads=1),
    ]
    official = {"a/query/kernel": torch.randn(8, 4, 2)}
    official |= {f"a/{part}/kernel": torch.randn(8, 1, 2) for part in ("key", "value")}
    ours = to_ours(official, rules)
    assert ours["a.kv.weight"].shape == (4, 8)
    torch.testing.assert_close(ours["a.kv.weight"][2:], official["a/value/kernel"][:, 0].T)
    same(to_official(ours, rules), official)


def test_another_number_of_heads_is_an_error_though_sizes_fit():
    rules = self_attention_rules("a", "a", num_heads=3)
    with pytest.raises(ValueError, match=r"attention has 2 heads, this model 3: set --model.init_args.net.num_heads"):
        to_ours(attention_state("a"), rules)
