"""Rotary positions, on a grid in adjacent pairs and on a sequence in halves."""

import math

import pytest
import torch

from layers.rope import apply_rope, axial_rope, rotary_table, rotate_halves


def test_table_equals_its_formula_rows_in_the_first_half():
    dim, grid, prefix = 8, (2, 3), 2
    rope = axial_rope(dim, grid, num_prefix=prefix, theta=100.0)
    assert rope.shape == (2, prefix + 6, dim)
    for row in range(2):
        for col in range(3):
            for i in range(dim):
                place, j = (row, i // 2) if i < dim // 2 else (col, (i - dim // 2) // 2)
                angle = place * 100.0 ** (-2 * j / (dim // 2))
                cos, sin = rope[:, prefix + row * 3 + col, i].tolist()
                assert (cos, sin) == pytest.approx((math.cos(angle), math.sin(angle)), abs=1e-6)


def test_rotation_equals_multiplication_by_complex_numbers():
    x, rope = torch.randn(2, 3, 6, 8, dtype=torch.float64), axial_rope(8, (2, 3)).double()
    turn = torch.complex(rope[0, :, ::2], rope[1, :, ::2])  # (L, d/2)
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)
    torch.testing.assert_close(apply_rope(x, rope), expected, atol=1e-12, rtol=0)


def test_rotation_preserves_the_norm_of_every_pair():
    x, rope = torch.randn(2, 3, 16, 12), axial_rope(12, (4, 4))
    before, after = (y.unflatten(-1, (-1, 2)).norm(dim=-1) for y in (x, apply_rope(x, rope)))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_scores_depend_on_the_offset_only():
    """The same q and k at every place: q.k is equal wherever (row, col) differ by the same steps."""
    side, rope = 5, axial_rope(8, (5, 5)).double()
    q, k = (torch.randn(8, dtype=torch.float64).expand(1, 1, side * side, 8) for _ in range(2))
    scores = (apply_rope(q, rope) @ apply_rope(k, rope).transpose(-1, -2)).view(side, side, side, side)
    torch.testing.assert_close(scores[1:, 2:, 1:, 2:], scores[:-1, :-2, :-1, :-2], atol=1e-6, rtol=0)
    assert (scores[0, 0, 0, 1] - scores[0, 0, 1, 0]).abs() > 1e-3, "rows and columns must differ"


def test_prefix_is_not_rotated_and_does_not_move_the_others():
    x = torch.randn(1, 2, 3 + 4, 8)
    with_prefix, plain = axial_rope(8, (2, 2), num_prefix=3), axial_rope(8, (2, 2))
    turned = apply_rope(x, with_prefix)
    assert torch.equal(turned[:, :, :3], x[:, :, :3])
    assert torch.equal(turned[:, :, 3:], apply_rope(x[:, :, 3:], plain))


def test_bf16_input_is_rotated_in_float32_and_rounded_once():
    x, rope = torch.randn(2, 2, 64, 16).bfloat16(), axial_rope(16, (8, 8))
    turned = apply_rope(x, rope)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, apply_rope(x.float(), rope).bfloat16())


@pytest.mark.parametrize("dim", [2, 6, 10, 7])
def test_head_dim_must_be_divisible_by_4(dim):
    with pytest.raises(ValueError, match=f"divisible by 4, not {dim}"):
        axial_rope(dim, (2, 2))


def test_table_of_positions_equals_its_formula():
    positions, dim = torch.tensor([[0, 1, 2, 2], [-1, 0, 7, 300]]), 6
    table = rotary_table(positions, dim, theta=100.0)
    assert table.shape == (2, 2, 1, 4, 3)
    for b in range(2):
        for i in range(4):
            for m in range(3):
                angle = positions[b, i].item() * 100.0 ** (-2 * m / dim)
                cos, sin = table[:, b, 0, i, m].tolist()
                assert (cos, sin) == pytest.approx((math.cos(angle), math.sin(angle)), abs=2e-5)


def test_halves_turn_as_complex_numbers():
    x, table = torch.randn(2, 3, 5, 8, dtype=torch.float64), rotary_table(torch.arange(5)[None], 8).double()
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(*table)
    torch.testing.assert_close(
        rotate_halves(x, table), torch.cat([turned.real, turned.imag], dim=-1), atol=1e-12, rtol=0
    )


def test_scores_of_halves_depend_on_the_distance_only():
    q, k = (torch.randn(1, 1, 1, 8).expand(1, 1, 6, 8) for _ in range(2))
    scores = [
        rotate_halves(q, table) @ rotate_halves(k, table).mT
        for table in (rotary_table(torch.arange(6)[None] + start, 8) for start in (0, 50))
    ]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=0)
    assert (scores[0][0, 0, 0, 1] - scores[0][0, 0, 1, 0]).abs() > 1e-3


def test_bf16_halves_are_rotated_in_float32_and_rounded_once():
    x, table = torch.randn(2, 2, 64, 16).bfloat16(), rotary_table(torch.arange(64)[None], 16)
    assert torch.equal(rotate_halves(x, table), rotate_halves(x.float(), table).bfloat16())


def test_pairs_need_an_even_head_dim():
    with pytest.raises(ValueError, match="even head dim, not 7"):
        rotary_table(torch.arange(3)[None], 7)
