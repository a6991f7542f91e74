"""AdaLNBlock."""

import pytest
import torch

from layers.blocks import AdaLNBlock
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
