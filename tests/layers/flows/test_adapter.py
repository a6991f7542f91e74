"""The flow adapter: invertible, volume preserving, float32 under autocast; golden values in methods/test_givt.py."""

import pytest
import torch

from layers.flows.adapter import AdapterConfig, FlowAdapter


def adapter(channels=4, grid=(2, 3), blocks=3, bottleneck=16):
    return FlowAdapter(AdapterConfig(blocks, bottleneck), channels, grid)


@torch.no_grad()
def test_inverse_gives_back_what_went_in_and_the_volume_stays():
    flow = adapter().double()
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    y, logdet = flow(x)
    assert y.shape == x.shape and logdet.tolist() == [0.0]
    torch.testing.assert_close(flow.inverse(y), x)
    jacobian = torch.func.jacfwd(lambda v: flow(v.view_as(x))[0].flatten())(x.flatten())
    assert torch.linalg.slogdet(jacobian).logabsdet.abs() < 1e-9
    assert (jacobian - torch.eye(24)).abs().max() > 0.1, "an identity would pass as well"


@torch.no_grad()
def test_autocast_does_not_reach_it():
    flow, x = adapter(), torch.randn(2, 6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = flow(x)
        back = flow.inverse(y)
    assert y.dtype == torch.float32 and torch.equal(y, flow(x)[0])
    torch.testing.assert_close(back, x)


@torch.no_grad()
def test_one_block_by_hand_on_a_grid_of_rows_and_columns():
    flow, x = adapter(grid=(2, 3), blocks=1), torch.randn(1, 6, 4)
    maps = torch.stack([torch.stack([x[0, 3 * row + column] for column in range(3)], -1) for row in range(2)], -2)[None]
    first, second = maps[:, :2], maps[:, 2:]  # halves of the channels
    out = torch.cat([second, first + flow.blocks[0](second)], dim=1)
    expected = torch.stack([out[0, :, row, column] for row in range(2) for column in range(3)])
    torch.testing.assert_close(flow(x)[0][0], expected)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="tokens have 5 numbers: the adapter couples two halves"):
        adapter(channels=5)
    with pytest.raises(ValueError, match=r"adapter.bottleneck is 20: half of it must be a multiple of its 4 groups"):
        adapter(channels=8, bottleneck=20)
