"""AdaLNBlock."""

import pytest
import torch

from layers.blocks import AdaLNBlock, ViTBlock
from layers.gather import take
from layers.norm import modulate
from layers.rope import axial_rope


@pytest.fixture
def case():
    block = AdaLNBlock(16, 2, mlp_hidden=20)
    return block, torch.randn(2, 4, 16), torch.randn(2, 16), axial_rope(8, (2, 2))


def test_zero_modulation_is_the_identity(case):
    block, x, c, rope = case
    torch.nn.init.zeros_(block.adaLN_modulation[1].weight)
    torch.nn.init.zeros_(block.adaLN_modulation[1].bias)
    assert torch.equal(block(x, c, rope), x)


@pytest.mark.parametrize(("gate", "part"), [(2, "attn"), (5, "mlp")])
def test_third_and_sixth_vectors_gate_attention_and_mlp(case, gate, part):
    """With all other vectors 0, the block adds exactly this part of the normalised input, times its gate."""
    block, x, c, rope = case
    torch.nn.init.zeros_(block.adaLN_modulation[1].weight)
    bias = torch.zeros(6, 16)
    bias[gate] = torch.randn(16)
    block.adaLN_modulation[1].bias.data = bias.flatten()
    branch = block.attn(block.norm1(x), rope) if part == "attn" else block.mlp(block.norm2(x))
    torch.testing.assert_close(block(x, c, rope), x + bias[gate] * branch, atol=1e-6, rtol=1e-5)


def test_block_equals_its_formula(case):
    block, x, c, rope = case
    vectors = block.adaLN_modulation[1](c * c.sigmoid()).view(2, 6, 1, 16)
    shift1, scale1, gate1, shift2, scale2, gate2 = vectors.unbind(1)
    x1 = x + gate1 * block.attn(block.norm1(x) * (1 + scale1) + shift1, rope)
    expected = x1 + gate2 * block.mlp(block.norm2(x1) * (1 + scale2) + shift2)
    torch.testing.assert_close(block(x, c, rope), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(modulate(x, torch.zeros(2, 16), torch.zeros(2, 16)), x)


def test_proj_dropout_reaches_attention_output_and_mlp_and_attn_dropout_the_scores():
    block = AdaLNBlock(16, 2, mlp_hidden=20, attn_dropout=0.1, proj_dropout=0.2)
    assert (block.attn.attn_dropout, block.attn.proj_dropout.p, block.mlp.dropout.p) == (0.1, 0.2, 0.2)


def test_vit_block_equals_its_formula():
    block, x = ViTBlock(16, 2, mlp_ratio=2.0), torch.randn(2, 5, 16)
    q, k, v = block.attn.qkv(block.norm1(x)).view(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
    mid = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
    hidden = block.mlp.fc1(block.norm2(mid))
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(block(x), mid + block.mlp.fc2(gelu), atol=1e-5, rtol=1e-5)


def test_some_rows_of_a_vit_block_equal_those_of_the_whole_with_gradients():
    block, x, index = ViTBlock(16, 2), torch.randn(2, 5, 16, requires_grad=True), torch.tensor([[4, 0], [2, 3]])
    some, whole = block.rows(x, index), take(block(x), index)
    torch.testing.assert_close(some, whole, atol=1e-6, rtol=1e-5)
    weight = torch.randn_like(some)
    parameters = [x, *block.parameters()]
    for a, b in zip(
        torch.autograd.grad((some * weight).sum(), parameters),
        torch.autograd.grad((whole * weight).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_width_that_no_head_count_divides_is_refused():
    with pytest.raises(ValueError, match="width 10 is not divisible by num_heads 4"):
        ViTBlock(10, 4)
