"""Jet's couplings: what they compute, inverse, volume, orders, precision; golden values in methods/test_jet.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.checkpoint import to_official, to_ours
from layers.flows.jet import Jet, JetConfig, jet_rules, normal_nats, stacked, token_order, unrolled

MIXED = ["channels"] * 4 + ["spatial"]
KINDS = pytest.mark.parametrize("kinds", [["channels"], MIXED], ids=["channels", "mixed"])


def jet(*, grid: tuple[int, int] = (2, 2), token_dim: int = 4, std: float = 0.3, **sizes) -> Jet:
    """A small flow whose last projections are not zero, unless std is."""
    torch.manual_seed(0)
    config = JetConfig(**{"depth": 3, "block_depth": 1, "width": 8, "num_heads": 2} | sizes)
    flow = Jet(config, grid=grid, token_dim=token_dim)
    for coupling in flow.couplings:
        for tensor in coupling.net.final_proj.parameters():
            nn.init.normal_(tensor, std=std)
    return flow


def released(kinds: list[str]) -> tuple[Jet, Tensor]:
    """As many couplings of as many blocks as published, JetFormer's where kinds are, but narrow; and tokens for it."""
    blocks = 2 if "spatial" in kinds else 4
    flow = jet(grid=(4, 4), token_dim=48, std=0.05, depth=32, block_depth=blocks, width=64, num_heads=4, kinds=kinds)
    return flow, torch.rand(2, 16, 48) * 2 - 1


@KINDS
@torch.no_grad()
def test_it_is_the_exact_identity_at_first(kinds):
    flow, x = jet(std=0.0, depth=5, kinds=kinds), torch.randn(3, 4, 4)
    z, logdet = flow(x)
    assert torch.equal(z, x) and logdet.tolist() == [0.0] * 3


@KINDS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@torch.no_grad()
def test_inverse_at_the_released_depth(kinds, dtype, tolerance):
    flow, x = released(kinds)
    flow, x = flow.to(dtype), x.to(dtype)
    z, logdet = flow(x)
    back, minus = flow.inverse(z)
    assert (back - x).abs().max() < tolerance
    torch.testing.assert_close(minus, -logdet)
    assert z.dtype == dtype and (z - x).abs().max() > 1 and logdet.abs().min() > 1, "an identity would pass as well"


@KINDS
def test_logdet_is_that_of_the_jacobian(kinds):
    flow = jet(depth=6, kinds=kinds).double().requires_grad_(False)
    for x in torch.randn(2, 1, 4, 4, dtype=torch.float64):
        jacobian = torch.autograd.functional.jacobian(lambda v: flow(v)[0], x).view(16, 16)
        expected = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(flow(x)[1][0], expected)
        assert expected.abs() > 0.1


@torch.no_grad()
def test_a_channel_coupling_by_hand():
    flow, x = jet(depth=1, kinds=["channels"], token_dim=6), torch.randn(2, 4, 6)
    (coupling,) = flow.couplings
    kept, moved = coupling.channel_order.tolist()[:3], coupling.channel_order.tolist()[3:]
    bias, raw = coupling.net(x[:, :, kept])
    expected, logdet = x.clone(), torch.zeros(2)
    for j, channel in enumerate(moved):
        scale = 2 / (1 + torch.exp(-raw[:, :, j]))
        expected[:, :, channel] = (x[:, :, channel] + bias[:, :, j]) * scale
        logdet += scale.log().sum(1)
    z, found = flow(x)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(found, logdet)
    assert torch.equal(z[:, :, kept], x[:, :, kept]) and sorted(kept + moved) == list(range(6))


@torch.no_grad()
def test_a_spatial_coupling_by_hand():
    flow = jet(depth=1, kinds=["spatial"], spatial=["hstripes"], token_dim=4)
    x = torch.randn(2, 4, 4)  # tokens 0 and 1 are the first row, 2 and 3 the second
    halves = torch.stack([x[:, 0, :2], x[:, 0, 2:], x[:, 1, :2], x[:, 1, 2:]], dim=1)  # (B, 4, 2)
    bias, raw = flow.couplings[0].net(halves)
    expected = x.clone()
    for n, (token, part) in enumerate([(2, 0), (2, 1), (3, 0), (3, 1)]):
        columns = slice(2 * part, 2 * part + 2)
        expected[:, token, columns] = (x[:, token, columns] + bias[:, n]) * 2 * raw[:, n].sigmoid()
    torch.testing.assert_close(flow(x)[0], expected)


# Which half is kept


@pytest.mark.parametrize(
    ("name", "kept"),
    [("vstripes", "x.x.x.x."), ("hstripes", "xxxx...."), ("checkerboard", "x.x..x.x")],
)
def test_orders_of_a_grid_of_two_rows(name, kept):
    expected = [i for i, letter in enumerate(kept) if letter == "x"]
    rest = [i for i, letter in enumerate(kept) if letter != "x"]
    assert token_order(name, (2, 4)) == expected + rest
    assert token_order(f"{name}-inv", (2, 4)) == rest + expected


def test_stripes_of_an_odd_width_are_of_the_index_as_in_the_official_formula():
    assert token_order("vstripes", (2, 3)) == [0, 2, 4, 1, 3, 5]


def test_kinds_and_orders_take_turns():
    flow = jet(depth=7, kinds=["channels", "spatial", "spatial"], spatial=["vstripes", "hstripes-inv"], grid=(2, 4))
    orders = [c.token_order.tolist() for c in flow.couplings if hasattr(c, "token_order")]
    assert [hasattr(c, "token_order") for c in flow.couplings] == [False, True, True] * 2 + [False]
    assert orders == [token_order(name, (2, 4)) for name in ("vstripes", "hstripes-inv") * 2]
    channels = [tuple(c.channel_order.tolist()) for c in flow.couplings if hasattr(c, "channel_order")]
    assert len(set(channels)) == 3, "each coupling has a permutation of its own"


def test_permutations_are_buffers_that_follow_their_seed_alone():
    def permutations(manual_seed: int, **sizes) -> dict[str, Tensor]:
        torch.manual_seed(manual_seed)
        flow = Jet(JetConfig(depth=5, block_depth=1, width=8, num_heads=2, **sizes), grid=(2, 2), token_dim=32)
        trained = {name for name, _ in flow.named_parameters()}
        buffers = dict(flow.named_buffers())
        assert {name.rpartition(".")[2] for name in buffers} <= {"channel_order", "token_order"}
        assert set(flow.state_dict()) == trained | set(buffers)
        return buffers

    first, second, other = permutations(0), permutations(1), permutations(0, permutation_seed=1)
    assert len(first) == 5 and all(buffer.dtype == torch.int64 and buffer.ndim == 1 for buffer in first.values())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["couplings.0.channel_order"], other["couplings.0.channel_order"])


# Backward passes


def gradients(
    flow: Jet, x: Tensor, *, autocast: bool = False, inside: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a loss that weighs latents and volume: with respect to x and to the parameters that are trained."""
    x = x.clone().requires_grad_()
    flow.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        z, logdet = flow(x)
        loss = (z.square() * torch.linspace(0, 1, z.numel()).view_as(z)).sum() - (logdet * logdet.detach()).sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return x.grad, {name: p.grad for name, p in flow.named_parameters() if p.requires_grad}


@KINDS
@pytest.mark.parametrize("backward", ["recompute", "reversible"])
def test_other_backward_passes_give_the_plain_gradients(kinds, backward):
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    flows = [jet(depth=6, token_dim=6, kinds=kinds, backward=way).double() for way in ("plain", backward)]
    for flow in flows:
        flow.couplings[2].requires_grad_(False)
    (dx, grads), (dx_other, others) = (gradients(flow, x) for flow in flows)
    torch.testing.assert_close(dx_other, dx, atol=1e-9, rtol=1e-9)
    assert set(grads) == set(others)
    for name, grad in grads.items():
        torch.testing.assert_close(others[name], grad, atol=1e-9, rtol=1e-9)
    assert torch.equal(flows[0](x)[0], flows[1](x)[0])


def test_reversible_needs_no_gradient_of_the_input_and_none_at_all():
    flow, x = jet(backward="reversible"), torch.randn(1, 4, 4)
    with torch.no_grad():
        assert not flow(x)[0].requires_grad
    flow(x)[1].sum().backward()
    assert all(p.grad is not None for p in flow.parameters())
    assert not flow.requires_grad_(False)(x)[0].requires_grad


def test_reversible_in_float32_at_the_released_depth():
    flow, x = released(MIXED)
    _, plain = gradients(flow, x)
    flow.config.backward = "reversible"
    _, reversible = gradients(flow, x)
    assert all(relative(reversible[name], plain[name]) < 1e-3 for name in plain if "final_proj" in name)


@pytest.mark.parametrize("inside", [False, True])
def test_reversible_under_autocast_is_as_near_the_truth_as_plain(inside):
    """With the backward pass in the region or not: weights cast without gradient must not be found by it."""
    x = torch.randn(4, 4, 8)
    sizes = {"depth": 8, "token_dim": 8, "width": 32}
    _, exact = gradients(jet(**sizes), x)
    _, plain = gradients(jet(**sizes), x, autocast=True, inside=inside)
    _, other = gradients(jet(backward="reversible", **sizes), x, autocast=True, inside=inside)
    for name in (n for n in exact if n.endswith("proj.weight")):
        assert relative(plain[name], exact[name]) < 0.1 and relative(other[name], exact[name]) < 0.1, name


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def kept_bytes(depth: int, backward: str) -> int:
    """Bytes that the forward pass keeps for the backward pass, parameters and permutations aside."""
    flow = jet(grid=(4, 4), token_dim=8, depth=depth, width=16, backward=backward)
    own = {t.untyped_storage().data_ptr() for t in [*flow.parameters(), *flow.buffers()]}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = flow(torch.randn(4, 16, 8))
    assert result[0].requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def test_reversible_keeps_one_tensor_whatever_the_depth():
    one = 4 * 16 * 8 * 4  # bytes of the tokens
    assert [kept_bytes(depth, "reversible") for depth in (2, 8)] == [one, one]
    plain = [kept_bytes(depth, "plain") for depth in (2, 8)]
    assert plain[1] > 3 * plain[0] and plain[1] > 100 * one
    assert one < kept_bytes(8, "recompute") < plain[1] / 5


# Precision


def test_under_autocast_the_last_projection_and_all_after_it_are_float32():
    flow, x = jet(token_dim=8), torch.randn(2, 4, 8)
    seen: dict[str, torch.dtype] = {}
    parts = {"first": flow.couplings[0].net.init_proj, "last": flow.couplings[0].net.final_proj}
    for name, part in parts.items():
        part.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output.dtype}))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        z, logdet = flow(x)
        back, _ = flow.inverse(z)
    assert seen == {"first": torch.bfloat16, "last": torch.float32}
    assert z.dtype == logdet.dtype == back.dtype == torch.float32
    assert (back - x).abs().max() < 1e-2, "what is rounded must be the network's inside alone"


@torch.no_grad()
def test_half_precision_tokens_are_computed_in_float32():
    flow, x = jet(), torch.randn(1, 4, 4).bfloat16()
    z, _ = flow(x)
    assert z.dtype == torch.float32 and torch.equal(z, flow(x.float())[0])


def test_normal_nats_is_the_density_of_a_standard_normal():
    z = torch.randn(3, 4, 5)
    expected = -torch.distributions.Normal(0.0, 1.0).log_prob(z).sum((1, 2))
    torch.testing.assert_close(normal_nats(z), expected)


# Official layout


def to_file(flow: Jet, official: str = "") -> dict[str, Tensor]:
    state = {f"flow.{name}": tensor for name, tensor in flow.state_dict().items()}
    return stacked(to_official(state, jet_rules("flow", num_heads=2, official=official)), official)


@pytest.mark.parametrize("official", ["", "params_adaptor/"])
def test_official_layout_and_back(official):
    flow = jet(depth=6, kinds=MIXED, grid=(2, 4))
    state = to_file(flow, official)
    masks = state[f"{official}channel_coupling_masks-FREEZE_ME"]
    assert masks.shape == (6, 4, 4) and masks.sum((1, 2)).tolist() == [4, 4, 4, 4, 0, 4]
    assert state[f"{official}spatial_coupling_masks-FREEZE_ME"].sum((1, 2)).tolist() == [0, 0, 0, 0, 8, 0]
    x = torch.randn(1, 2, 4)
    order = flow.couplings[0].channel_order
    assert torch.equal(x @ masks[0], x[..., order]), "the matrix does what the indices do"
    back = to_ours(unrolled(state, official), jet_rules("flow", num_heads=2, official=official))
    assert {name.removeprefix("flow.") for name in back} == set(flow.state_dict())
    assert all(torch.equal(back[f"flow.{name}"], tensor) for name, tensor in flow.state_dict().items())


@pytest.mark.parametrize("fault", ["twice", "fraction"])
def test_a_mask_that_is_no_permutation_is_refused(fault):
    state = to_file(jet())
    masks = state["channel_coupling_masks-FREEZE_ME"]
    masks[1] = F.one_hot(torch.tensor([0, 0, 1, 2]), 4).T if fault == "twice" else masks[1] * 0.5
    with pytest.raises(ValueError, match=r"channel_coupling_masks-FREEZE_ME\[1\] is no permutation matrix"):
        unrolled(state)


# Errors


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"token_dim": 5}, "tokens have 5 numbers"),
        ({"grid": (3, 3), "kinds": ["spatial"]}, "3x3 tokens cannot be halved by checkerboard"),
        ({"depth": 0}, "net.depth is 0"),
        ({"scale_factor": 0.0}, "net.scale_factor 0.0"),
        ({"kinds": ["rows"]}, r"net.kinds is \['rows'\]: name one or more of channels, spatial"),
        ({"kinds": []}, r"net.kinds is \[\]"),
        ({"spatial": ["stripes"]}, r"net.spatial is \['stripes'\]: name one or more of checkerboard"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        jet(**sizes)
