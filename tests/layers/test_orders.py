"""Scan orders: permutations of any grid, and what each name means; how many orders are random, and which."""

from itertools import pairwise
from typing import get_args

import pytest
import torch

from layers.orders import Scan, annealed_orders, random_ratio, scan_order

SCANS = get_args(Scan)


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (5, 1), (2, 2), (3, 4), (4, 4), (7, 3), (16, 16)])
def test_every_place_comes_once(name, grid):
    assert sorted(scan_order(name, grid)) == list(range(grid[0] * grid[1]))


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("raster", "0123 4567 89ab cdef"),
        ("alternate", "0123 7654 89ab fedc"),
        ("z_curve", "0145 2367 89cd abef"),
        ("subsample", "028a 139b 46ce 57df"),
        ("spiral_in", "fb73 2104 8cde a659"),
        ("spiral_out", "956a edc8 4012 37bf"),
    ],
)
def test_orders_of_sixteen_places(name, order):
    """Those of taming-transformers, checked by hand against its loops."""
    assert scan_order(name, (4, 4)) == [int(digit, 16) for digit in order.replace(" ", "")]


def test_a_spiral_of_another_shape_goes_along_the_edge_first():
    assert scan_order("spiral_in", (3, 4)) == [11, 7, 3, 2, 1, 0, 4, 8, 9, 10, 6, 5]


@pytest.mark.parametrize("name", ["raster", "alternate", "spiral_in", "spiral_out"])
def test_neighbours_in_time_are_neighbours_in_space(name):
    """All of these go step by step, but raster, which jumps back at the end of a row."""
    places = [divmod(place, 6) for place in scan_order(name, (6, 6))]
    steps = [abs(a - c) + abs(b - d) for (a, b), (c, d) in pairwise(places)]
    assert max(steps) == (6 if name == "raster" else 1)


def test_a_subsample_begins_with_a_coarse_picture():
    """After a quarter of the tokens every 2x2 cell has one."""
    places = [divmod(place, 8) for place in scan_order("subsample", (8, 8))[:16]]
    assert {(row // 2, column // 2) for row, column in places} == {(r, c) for r in range(4) for c in range(4)}


def test_an_unknown_order_names_those_there_are():
    with pytest.raises(ValueError, match="the scan order is 'hilbert': use raster, z_curve, subsample"):
        scan_order("hilbert", (4, 4))


def test_the_share_of_random_orders_falls_in_between():
    """Official: 1 before the start, 0 after the end, linear in steps."""
    shares = [random_ratio(step, start=4, end=8) for step in range(11)]
    assert shares == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0]
    assert [random_ratio(step, start=3, end=3) for step in range(5)] == [1, 1, 1, 0, 0]
    assert random_ratio(0, start=0, end=0) == 0


def test_each_item_has_a_coin_of_its_own():
    scan, keys = torch.tensor([2, 0, 3, 1]), torch.rand(6, 4)
    coins = torch.tensor([0.0, 0.3, 0.49, 0.5, 0.7, 0.99])
    orders = annealed_orders(coins, keys, scan, 0.5)
    assert torch.equal(orders[:3], keys[:3].argsort(1)) and torch.equal(orders[3:], scan.expand(3, -1))
    assert torch.equal(annealed_orders(coins, keys, scan, 0.0), scan.expand(6, -1))
    assert torch.equal(annealed_orders(coins, keys, scan, 1.0), keys.argsort(1))


def test_random_orders_are_uniform():
    """All 24 permutations of 4 places occur, each about as often."""
    orders = annealed_orders(torch.zeros(24_000), torch.rand(24_000, 4), torch.arange(4), 1.0)
    _, counts = orders.unique(dim=0, return_counts=True)
    assert len(counts) == 24 and counts.min() > 850 and counts.max() < 1150
