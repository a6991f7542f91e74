"""DART's network: what sees what, against one pass with an explicit mask; caches, conditions, sizes, work."""

from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layers.networks import dart
from layers.networks.dart import DART, Condition, DARTConfig, Layout, Stage, attend
from layers.networks.dart_decoding import DARTDecoder
from lightning_modules.callbacks.throughput import count_flops

T, GRID, D, E = 3, (2, 3), 5, 32
K = GRID[0] * GRID[1]
P = 4  # tokens of a text
CONFIG = {"width": E, "depth": 2, "num_heads": 2, "mlp_hidden": 48}
KINDS = {
    "class": {"num_classes": 4},
    "steps": {"num_classes": 4, "step_embed": True},
    "text": {"text_dim": 7, "text_len": P},
    "ar": {"num_classes": 4, "causal": True},
    "ar_text": {"text_dim": 7, "text_len": P, "causal": True},
    "fine": {"num_classes": 4, "fine": 2},
    "fine_text": {"text_dim": 7, "text_len": P, "fine": 2},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind: str) -> DART:
    """A network whose every parameter does something, in float64."""
    options = dict(KINDS[kind])
    config = DARTConfig(**CONFIG, step_embed=options.pop("step_embed", False))
    stages = [Stage(T, GRID)]
    if fine := options.pop("fine", 0):
        stages.append(Stage(fine, (2 * GRID[0], 2 * GRID[1])))
    net = DART(config, stages=stages, token_dim=D, **options)
    for param in net.parameters():
        torch.nn.init.normal_(param, std=0.3)
    return net.double().eval()


def length(net: DART) -> int:
    return sum(net.layout.blocks)


def condition(net: DART, batch: int = 2) -> Condition:
    torch.manual_seed(5)
    if net.num_prefix:
        mask = torch.arange(P) < torch.tensor([[P], [2]])
        return net.of_texts(torch.randn(batch, P, 7).double(), mask)
    return net.of_classes(torch.arange(batch))


def visible(layout: Layout) -> Tensor:
    """The mask that a layout stands for, rows being queries."""
    size = layout.prefix + sum(layout.blocks)
    if layout.causal:
        mask = torch.ones(size, size, dtype=torch.bool).tril()
        mask[: layout.prefix, : layout.prefix] = True
        return mask
    mask = torch.zeros(size, size, dtype=torch.bool)
    for start, end in pairwise(accumulate((n for n in (layout.prefix, *layout.blocks) if n), initial=0)):
        mask[start:end, :end] = True
    return mask


def attend_with_mask(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """The oracle: one full pass under an explicit mask."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible(layout))


LAYOUTS = [Layout((2, 2, 2)), Layout((3, 3), prefix=2), Layout((2, 2, 8)), Layout((6,), 3, True), Layout((4,), 0, True)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_positive_where_the_mask_allows_and_nowhere_else(layout):
    mask = visible(layout)
    q, k = torch.randn(2, 1, 3, len(mask), 4).unbind(0)
    values = torch.eye(len(mask)).expand(1, 3, -1, -1)  # the output is the row of weights
    assert torch.equal((attend(q, k, values, layout) > 0)[0, 0], mask)


@kinds
def test_outputs_and_gradients_equal_one_full_pass_with_a_mask(kind, monkeypatch):
    net = make(kind)
    x = torch.randn(2, length(net), D).double().requires_grad_()

    def run() -> list[Tensor]:
        out = net(x, condition(net))
        return [out, *torch.autograd.grad(out.square().sum(), [x, *net.blocks.parameters()])]

    found = run()
    monkeypatch.setattr(dart, "attend", attend_with_mask)
    for ours, expected in zip(found, run(), strict=True):  # norms are float32 islands
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def changed(net: DART, x: Tensor, places: Tensor | slice) -> Tensor:
    """Which rows of h change with these tokens."""
    other = x.clone()
    other[:, places] += 1
    with torch.no_grad():
        a, b = (net(y, condition(net)) for y in (x, other))
    return (a - b).abs().amax((0, 2)) > 1e-9


@pytest.mark.parametrize("kind", ["class", "steps", "text"])
@pytest.mark.parametrize("block", range(T))
def test_a_copy_changes_its_own_outputs_and_those_of_cleaner_copies(kind, block):
    net = make(kind)
    rows = changed(net, torch.randn(2, T * K, D).double(), slice(block * K, block * K + K))
    assert rows.tolist() == [i // K >= block for i in range(T * K)]


@pytest.mark.parametrize("kind", ["ar", "ar_text"])
@pytest.mark.parametrize("place", [0, K - 1, K, K + 2, T * K, T * K + K - 2])
def test_a_token_changes_no_prediction_of_itself_nor_of_any_before_it(kind, place):
    """Row j predicts token K + j of the sequence, from those before it."""
    net = make(kind)
    rows = changed(net, torch.randn(2, length(net), D).double(), torch.tensor([place]))
    assert rows.tolist() == [K + j > place for j in range(T * K)]


@pytest.mark.parametrize("kind", ["class", "text"])
def test_a_copy_is_a_set_of_tokens_with_places(kind):
    net, block = make(kind), 1
    x = torch.randn(2, T * K, D).double()
    order = torch.arange(T * K)
    order[block * K : block * K + K] = block * K + torch.randperm(K)
    with torch.no_grad():
        plain = net(x, condition(net))
        net.rope = torch.cat([net.rope[:, : net.num_prefix], net.rope[:, net.num_prefix :][:, order]], dim=1)
        torch.testing.assert_close(net(x[:, order], condition(net)), plain[:, order])


def pieces(net: DART) -> list[int]:
    """How a sampler hands the tokens over."""
    return [K] + [1] * (T * K - 1) if net.causal else list(net.layout.blocks)


@kinds
@torch.no_grad()
def test_steps_with_a_cache_equal_the_whole_pass(kind):
    net = make(kind).float()
    x = torch.randn(2, length(net), D)
    where = condition(net.double())
    where = Condition(*(None if t is None else t.float() for t in where))
    expected = net.float()(x, where)
    advance = DARTDecoder(net).start(where, 2)
    found = torch.cat([advance(part) for part in x[:, : sum(pieces(net))].split(pieces(net), dim=1)], dim=1)
    first = K - 1 if net.causal else 0
    torch.testing.assert_close(found[:, first:], expected, atol=1e-5, rtol=1e-4)


class Replay:
    """Stands for CUDA's capture: it runs the call again, on the places of its arguments."""

    def __init__(self):
        self.captured = 0

    def __call__(self, call):
        self.captured += 1
        result = call()
        return lambda: result.copy_(call()), result


@pytest.mark.parametrize("kind", ["class", "fine_text"])
@torch.no_grad()
def test_captured_steps_equal_plain_ones_sample_after_sample(kind):
    net = make(kind)
    net = net.float()
    decoder, plain, capture = DARTDecoder(net), DARTDecoder(net), Replay()
    decoder.capture(capture)
    for _ in range(2):
        where = Condition(*(None if t is None else torch.randn_like(t).float() for t in condition(make(kind))))
        parts = torch.randn(2, length(net), D).split(pieces(net), dim=1)
        ours, expected = decoder.start(where, 2), plain.start(where, 2)
        for part in parts:
            torch.testing.assert_close(ours(part), expected(part))
    assert capture.captured == len(pieces(net))  # one per step, none for the second sample


def test_text_that_is_no_word_is_not_looked_at():
    net = make("text")
    features, mask = torch.randn(1, P, 7).double(), torch.tensor([[True, True, False, False]])
    first = net.of_texts(features, mask).prefix
    features[:, 2:] += 1
    assert torch.equal(net.of_texts(features, mask).prefix, first)
    assert torch.equal(first[0, 2], net.no_text) and torch.equal(first[0, 3], net.no_text)


def test_positions_of_a_prefix_are_zero_and_fine_tokens_lie_between_coarse_ones():
    coordinates = make("fine_text")._coordinates()
    assert torch.equal(coordinates[:P], torch.zeros(P, 3))
    coarse, fine = coordinates[P : P + K], coordinates[P + T * K : P + T * K + 4 * K]
    assert coarse[:, 0].unique().tolist() == [0] and fine[:, 0].unique().tolist() == [T]
    assert coarse[:, 1].unique().tolist() == [0, 1] and coarse[:, 2].unique().tolist() == [0, 1, 2]
    assert fine[:, 1].unique().tolist() == [-0.25, 0.25, 0.75, 1.25]
    assert len(coordinates) == P + T * K + 2 * 4 * K


def test_steps_count_from_the_noisiest_copy_and_raster_within_it():
    coordinates = make("ar")._coordinates()
    assert coordinates[:, 0].tolist() == [i // K for i in range(T * K + K - 1)]
    assert coordinates[:4].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0]]


def test_a_fresh_network_predicts_zero_and_passes_its_input_on():
    net = DART(DARTConfig(**CONFIG), stages=[Stage(T, GRID)], token_dim=D, num_classes=3)
    x = torch.randn(2, T * K, D)
    h = net(x, net.of_classes(torch.tensor([0, 2])))
    assert torch.equal(net.linear(h), torch.zeros(2, T * K, D))
    torch.testing.assert_close(h, dart.BareRMSNorm()(net.x_embedder(x)))
    assert 0.8 * dart.INIT_STD < net.blocks[0].attn.qkv.weight.std() < dart.INIT_STD
    assert net.blocks[0].mlp.w12.weight.abs().max() <= 2 * dart.INIT_STD * 1.001


def test_recomputed_blocks_change_no_gradient():
    net = make("class").train()
    x = torch.randn(2, T * K, D).double()

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(net(x, condition(net)).square().sum(), net.parameters(), allow_unused=True))

    plain = gradients()
    net.config.grad_checkpointing = True
    for ours, expected in zip(gradients(), plain, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected)


def test_a_block_compiles_without_a_break():
    net = make("class").float()
    block = torch.compile(net.blocks[0], backend="eager", fullgraph=True)
    x, vectors = torch.randn(2, T * K, E), torch.randn(2, 1, 6, E)
    torch.testing.assert_close(block(x, vectors, net.rope, net.layout), net.blocks[0](x, vectors, net.rope, net.layout))


def test_attention_does_the_work_of_the_visible_blocks_only():
    steps, block, dim = 16, 32, 16
    q, k, v = torch.zeros(3, 1, 2, steps * block, dim, device="meta").unbind(0)
    whole = count_flops(lambda: F.scaled_dot_product_attention(q, k, v))
    ours = count_flops(lambda: attend(q, k, v, Layout((block,) * steps)))
    assert ours / whole == pytest.approx((steps + 1) / (2 * steps), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 40, "num_heads": 2}, "net.width 40 in net.num_heads 2 heads: each must have a multiple of 16"),
        ({"width": 33, "num_heads": 2}, "net.width 33"),
        ({"width": 32, "num_heads": 0}, "net.num_heads is 0"),
        ({"width": 32, "num_heads": 2, "mlp_hidden": -1}, "net.mlp_hidden is -1"),
    ],
)
def test_sizes_that_cannot_be_built_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DARTConfig(**options)


def test_default_width_of_the_swiglu():
    assert [DARTConfig(width=w, num_heads=w // 64).hidden for w in (384, 768, 1024, 1152)] == [1024, 2048, 2816, 3072]
