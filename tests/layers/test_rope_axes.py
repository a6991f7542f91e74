"""Rotary positions on three axes: products depend on differences axis by axis, and a slice on its axis alone."""

import pytest
import torch

from layers.rope import rotary_table, rotate_halves
from layers.rope_axes import axes_table, rotate_axes

WIDTHS = [16, 24, 24]


def product(q, k, place_q, place_k):
    """q . k of two tokens at these coordinates."""
    turned = (
        rotate_axes(
            x[None, None, None], axes_table(torch.tensor([place], dtype=torch.float64), WIDTHS).double(), WIDTHS
        )
        for x, place in ((q, place_q), (k, place_k))
    )
    a, b = (x.flatten() for x in turned)
    return (a * b).sum()


@pytest.mark.parametrize("shift", [(3.0, 0.0, 0.0), (0.0, 5.0, 0.0), (0.0, 0.0, -2.5), (1.0, 2.0, 3.0)])
def test_products_depend_on_differences_of_coordinates(shift):
    q, k = torch.randn(64).double(), torch.randn(64).double()
    places = (4.0, 7.0, 1.0), (2.0, 3.5, 9.0)
    moved = tuple(tuple(c + s for c, s in zip(place, shift, strict=True)) for place in places)
    torch.testing.assert_close(product(q, k, *moved), product(q, k, *places), atol=1e-5, rtol=0)
    assert (product(q, k, moved[0], places[1]) - product(q, k, *places)).abs() > 1e-2


@pytest.mark.parametrize("axis", range(3))
def test_a_coordinate_turns_its_own_slice_and_no_other(axis):
    x, place = torch.randn(1, 1, 1, 64), torch.tensor([[2.0, 3.0, 5.0]])
    moved = place.clone()
    moved[0, axis] += 1
    first, second = (rotate_axes(x, axes_table(p, WIDTHS), WIDTHS).split(WIDTHS, -1) for p in (place, moved))
    assert [bool((a != b).any()) for a, b in zip(first, second, strict=True)] == [i == axis for i in range(3)]


def test_frequencies_are_those_of_each_slice_and_halves_make_pairs():
    table = axes_table(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), WIDTHS)
    assert table.shape == (2, 2, 64)
    for token, (start, width) in enumerate(((0, 16), (16, 24))):
        angles = 10000.0 ** -(torch.arange(0, width, 2) / width)
        torch.testing.assert_close(table[0, token, start : start + width], angles.cos().repeat(2))
        torch.testing.assert_close(table[1, token, start : start + width], torch.cat([-angles.sin(), angles.sin()]))
    x = torch.zeros(1, 1, 2, 64)
    x[..., 0] = 1
    turned = rotate_axes(x, table, WIDTHS)[0, 0, 0]
    assert turned[8] == table[1, 0, 8] and turned.nonzero().flatten().tolist() == [0, 8]


def test_one_pass_equals_slice_by_slice():
    x, places = torch.randn(2, 3, 5, 64, requires_grad=True), torch.rand(5, 3) * 9
    ours = rotate_axes(x, axes_table(places, WIDTHS), WIDTHS)
    tables = (rotary_table(axis[None], width) for axis, width in zip(places.unbind(1), WIDTHS, strict=True))
    plain = torch.cat([rotate_halves(part, t) for part, t in zip(x.split(WIDTHS, -1), tables, strict=True)], dim=-1)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad((y**3).sum(), x)[0] for y in (ours, plain)))


def test_an_odd_slice_is_an_error():
    with pytest.raises(ValueError, match="even head dim, not 3"):
        axes_table(torch.zeros(1, 2), [4, 3])
