"""take and put."""

import pytest
import torch

from layers.gather import put, take

INDEX = torch.tensor([[3, 0], [1, 1]])


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3), (2, 4, 3, 5)])
def test_take_reads_rows_of_each_item(shape):
    x = torch.randn(shape)
    rows = take(x, INDEX)
    assert all(torch.equal(rows[b, r], x[b, INDEX[b, r]]) for b in range(2) for r in range(2))


def test_take_shares_a_table():
    table = torch.randn(1, 4, 3)
    assert torch.equal(take(table, INDEX), table[0][INDEX])


def test_take_of_no_rows_is_empty():
    assert take(torch.randn(2, 4, 3), INDEX[:, :0]).shape == (2, 0, 3)


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3)])
def test_put_writes_rows_and_leaves_the_rest(shape):
    x, index = torch.zeros(shape), torch.tensor([[3, 0], [1, 2]])
    rows = torch.randn(2, 2, *shape[2:])
    after = put(x, index, rows)
    assert torch.equal(take(after, index), rows) and torch.equal(x, torch.zeros(shape))
    assert after.abs().sum() == rows.abs().sum()


def test_put_casts_rows_to_the_target():
    assert (
        put(torch.zeros(1, 2, 3), torch.tensor([[1]]), torch.ones(1, 1, 3, dtype=torch.bfloat16)).dtype == torch.float32
    )
