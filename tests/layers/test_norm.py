"""RMSNorm and modulation."""

import pytest
import torch

from layers.norm import OffsetRMSNorm, RMSNorm, modulate


def test_rmsnorm_equals_its_formula():
    x, norm = torch.randn(2, 3, 8, dtype=torch.float64).float() * 5, RMSNorm(8, eps=0.1)
    torch.nn.init.normal_(norm.weight)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), expected, atol=1e-6, rtol=1e-6)


def test_rmsnorm_default_eps_is_the_papers():
    x = torch.full((1, 4), 1e-3)
    torch.testing.assert_close(RMSNorm(4)(x), x / (2e-6) ** 0.5)  # mean square 1e-6 + eps 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rmsnorm_rounds_only_its_result(dtype):
    """Statistics and the product with the weight are float32: squares of 1e3 overflow float16."""
    x, norm = (torch.randn(4, 64) * 1e3).to(dtype), RMSNorm(64)
    torch.nn.init.normal_(norm.weight)
    exact = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    assert norm(x).dtype == dtype
    difference = (norm(x).float() - exact).abs() / exact.abs()
    assert difference.max() <= torch.finfo(dtype).eps / 2 * 1.01  # one rounding


def test_offset_rmsnorm_is_rmsnorm_with_weight_one_plus_scale():
    x, norm, plain = torch.randn(2, 3, 8) * 5, OffsetRMSNorm(8), RMSNorm(8)
    torch.testing.assert_close(norm(x), plain(x))  # as it begins
    torch.nn.init.normal_(norm.scale)
    plain.load_state_dict({"weight": 1 + norm.scale.detach()})
    assert torch.equal(norm(x), plain(x))
    assert torch.equal(norm(x.bfloat16()), plain(x.bfloat16()))


def test_modulate_scales_and_shifts_each_image_by_its_own_vector():
    x, shift, scale = torch.randn(2, 3, 4), torch.randn(2, 4), torch.randn(2, 4)
    for b in range(2):
        for token in range(3):
            expected = x[b, token] * (1 + scale[b]) + shift[b]
            torch.testing.assert_close(modulate(x, shift, scale)[b, token], expected, atol=1e-6, rtol=1e-6)
