"""Draws that do not depend on the batch."""

from itertools import product

import pytest
import torch

from layers.random import mix_seed, randn, row_generators


@pytest.mark.parametrize("indices", [[2], [0, 1, 2, 3], [3, 2], range(7)])
def test_row_of_an_image_depends_on_seed_and_index_only(indices):
    alone = {i: randn((1, 3, 5), row_generators(7, [i], device="cpu"), device="cpu")[0] for i in indices}
    together = randn((len(indices), 3, 5), row_generators(7, indices, device="cpu"), device="cpu")
    for row, i in zip(together, indices, strict=True):
        assert torch.equal(row, alone[i])
        assert not torch.equal(row, randn((1, 3, 5), row_generators(8, [i], device="cpu"), device="cpu")[0])


def test_rows_differ_and_are_standard_normal():
    rows = randn((64, 1000), row_generators(0, range(64), device="cpu"), device="cpu")
    assert rows.dtype == torch.float32
    assert abs(rows.mean()) < 0.02 and abs(rows.std() - 1) < 0.02
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.2


def test_single_generator_is_torchs_own_draw():
    expected = torch.randn(2, 3, generator=torch.Generator().manual_seed(4))
    assert torch.equal(randn((2, 3), torch.Generator().manual_seed(4), device="cpu"), expected)


def test_without_a_generator_the_global_one_is_used():
    torch.manual_seed(1)
    expected = torch.randn(2, 3)
    torch.manual_seed(1)
    assert torch.equal(randn((2, 3), None, device="cpu"), expected)


def test_number_of_generators_must_be_the_number_of_rows():
    with pytest.raises(ValueError, match="2 generators for 3 rows"):
        randn((3, 4), row_generators(0, [0, 1], device="cpu"), device="cpu")


def test_mixed_seeds_are_distinct_fit_63_bits_and_repeat():
    parts = [*product(range(12), repeat=3), *product(range(12), repeat=2), *((i,) for i in range(12))]
    seeds = {mix_seed(*p) for p in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mix_seed(1, 2) == mix_seed(1, 2) != mix_seed(2, 1)


def test_neighbouring_seeds_differ_in_about_half_of_their_bits():
    flips = [(mix_seed(0, i) ^ mix_seed(0, i + 1)).bit_count() for i in range(200)]
    assert 28 < sum(flips) / len(flips) < 35
