"""What stands between pixels and JetFormer's decoder: a bijection whose volume is right, however it is split."""

import pytest
import torch
from torch import Tensor, nn

from layers.flows.factored import FactorConfig, FactoredFlow
from layers.flows.jet import JetConfig

SPLITS = pytest.mark.parametrize("split", ["flow", "linear", "pca"])
DIMS = pytest.mark.parametrize("dim", [2, None])
C = 4


def factored(split: str, dim: int | None, **options: bool) -> FactoredFlow:
    """Two tokens of four numbers; nothing is the identity."""
    torch.manual_seed(0)
    flow = JetConfig(depth=4, block_depth=1, width=8, num_heads=2, kinds=["channels"])
    front = FactoredFlow(FactorConfig(dim=dim, split=split, **options), flow, grid=(1, 2), token_dim=C)
    for coupling in front.jet.couplings:
        for p in coupling.net.final_proj.parameters():
            nn.init.normal_(p, std=0.3)
    if split == "linear":
        nn.init.normal_(front.linear.weight)
    if split == "pca":
        front.linear.fit([torch.randn(50, C) @ torch.randn(C, C) + 1])
    return front.double()


def joined(front: FactoredFlow, x: Tensor) -> Tensor:
    latents = front(x)
    return torch.cat([latents.soft, latents.rest], dim=-1)


@SPLITS
@DIMS
@torch.no_grad()
def test_it_is_a_bijection(split, dim):
    front, x = factored(split, dim), torch.randn(3, 2, C, dtype=torch.float64)
    latents = front(x)
    assert latents.soft.shape[-1] == front.dim == (dim or C) and latents.rest.shape[-1] == C - front.dim
    torch.testing.assert_close(front.inverse(latents.soft, latents.rest), x)


@SPLITS
@DIMS
def test_logdet_is_that_of_the_jacobian(split, dim):
    front = factored(split, dim).requires_grad_(False)
    for x in torch.randn(2, 1, 2, C, dtype=torch.float64):
        jacobian = torch.autograd.functional.jacobian(lambda v: joined(front, v), x).view(2 * C, 2 * C)
        expected = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(front(x).logdet[0], expected)
        assert expected.abs() > 0.1


@pytest.mark.parametrize("split", ["linear", "pca"])
@torch.no_grad()
def test_a_flow_behind_the_split_does_not_see_the_rest(split):
    front, x = factored(split, 2), torch.randn(1, 2, C, dtype=torch.float64)
    mapped, _ = front.linear(x)
    assert torch.equal(front(x).rest, mapped[..., 2:])
    other = front.linear.inverse(torch.cat([mapped[..., :2], torch.randn_like(mapped[..., 2:])], dim=-1))[0]
    torch.testing.assert_close(front(other).soft, front(x).soft)


def test_a_frozen_flow_gets_no_gradient_and_a_linear_map_before_it_does():
    front = factored("linear", 2, frozen_flow=True)
    front(torch.randn(1, 2, C, dtype=torch.float64)).soft.sum().backward()
    assert [name for name, p in front.named_parameters() if p.grad is not None] == ["linear.weight"]


@pytest.mark.parametrize(
    ("split", "dim", "message"),
    [
        ("flow", 5, "factor.dim is 5, but tokens have 4 numbers: use 1 to 4"),
        ("flow", 0, "factor.dim is 0"),
        ("linear", 3, "tokens have 3 numbers"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(split, dim, message):
    with pytest.raises(ValueError, match=message):
        factored(split, dim)
