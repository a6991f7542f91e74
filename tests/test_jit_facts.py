"""JiT's published and countable facts: sizes, FLOPs, forwards per image, compilation, the fresh network, dropout."""

from functools import cache

import pytest
import torch

from experiments import recipes
from experiments.load import load_module
from lightning_modules.callbacks.throughput import count_flops
from lightning_modules.jit import JiTModule, JiTSampling
from tests.lightning_modules.test_init_from import CONFIG
from tests.methods.test_jit import module_from

# parameters with the fixed position table, multiply-accumulates of one forward in 1e9: counted on the official module
SIZES = {
    "jit": (131_320_320, 25.2),
    "jit_b16": (131_320_320, 25.2),
    "jit_b32": (133_387_008, 25.8),
    "jit_l16": (459_139_808, 87.9),
    "jit_l32": (461_796_320, 88.6),
    "jit_h16": (952_842_048, 181.9),
    "jit_h32": (956_383_296, 182.9),
    "jit_g16": (2_007_555_984, 383.7),
    "jit_g32": (2_011_981_968, 384.9),
}
# blocks with dropout, rate of the recipe
DROPOUT = {
    "jit": (range(3, 9), 0.0),
    "jit_l16": (range(6, 18), 0.0),
    "jit_h16": (range(8, 24), 0.2),
    "jit_h32": (range(8, 24), 0.2),
    "jit_g16": (range(10, 30), 0.2),
    "jit_g32": (range(10, 30), 0.2),
}
TINY = {**CONFIG, "depth": 4}


def tiny(*, fresh: bool = False, **changes) -> JiTModule:
    module = module_from({**TINY, **changes})
    if not fresh:
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return module


def inputs():
    return torch.randn(3, 4, 192), torch.tensor([0.1, 0.5, 0.99]), torch.tensor([0, 4, 5])


@cache
def on_meta(experiment: str) -> JiTModule:
    with torch.device("meta"):
        return load_module(experiment)


OFFLINE = ("jit_digits", "jit_openmoji", "jit_photos", "jit_shapes")


def test_every_imagenet_recipe_is_in_the_table():
    assert sorted(SIZES) == [name for name in recipes.names() if name.split("_")[0] == "jit" and name not in OFFLINE]


@pytest.mark.parametrize("experiment", SIZES)
def test_recipe_has_the_published_number_of_parameters(experiment):
    module = on_meta(experiment)
    assert sum(p.numel() for p in module.parameters()) == SIZES[experiment][0]
    width = module.net.config.width
    assert sum(p.numel() for p in module.parameters() if not p.requires_grad) == 256 * width


@pytest.mark.parametrize("experiment", ["jit", *(pytest.param(n, marks=pytest.mark.slow) for n in SIZES if n != "jit")])
def test_one_forward_costs_the_published_flops(experiment):
    net = on_meta(experiment).net
    x = torch.empty(1, 256, net.final_layer.linear.out_features, device="meta")
    t, labels = torch.empty(1, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
    assert count_flops(lambda: net(x, t, labels)) == pytest.approx(2e9 * SIZES[experiment][1], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("experiment", "gflops"), [("jit", 50.45), ("jit_l16", 175.89)])
def test_one_forward_costs_the_flops_counted_on_the_official_code(experiment, gflops):
    net = on_meta(experiment).net
    x, t = torch.empty(2, 256, 768, device="meta"), torch.empty(2, device="meta")
    labels = torch.empty(2, dtype=torch.int64, device="meta")
    assert count_flops(lambda: net(x, t, labels)) / 2e9 == pytest.approx(gflops, rel=1e-3)


@pytest.mark.parametrize(
    ("method", "cfg_scale", "interval", "forwards"),
    [
        ("heun", 3.0, (0.1, 1.0), 187),  # 99 evaluations, 11 of them at t <= 0.1
        ("heun", 3.0, (0.0, 1.0), 198),
        ("heun", 1.0, (0.1, 1.0), 99),
        ("heun", 1.0, (0.0, 1.0), 99),
        ("euler", 3.0, (0.1, 1.0), 94),
        ("euler", 3.0, (0.0, 1.0), 100),
    ],
)
def test_forwards_per_image(method, cfg_scale, interval, forwards):
    """A batched pair of branches counts as two."""
    module, rows = tiny(depth=1, in_context_len=0), []
    module.net.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    with torch.no_grad():
        module.sample([0, 4], JiTSampling(method, 50, cfg_scale, interval), torch.Generator().manual_seed(0))
    assert sum(rows) == 2 * forwards
    assert len(rows) == (99 if method == "heun" else 50)


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_network_compiles_without_a_graph_break_and_equals_eager(dynamo):
    net = tiny(depth=2).net
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    args = inputs()
    with torch.no_grad():
        assert torch.equal(compiled(*args), net(*args))


@pytest.mark.slow
def test_compiling_in_place_keeps_names_and_outputs(dynamo):
    module, args = tiny(depth=2), inputs()
    before = list(module.state_dict())
    with torch.no_grad():
        expected = module.net(*args)
        for part in module.compiled_modules():
            part.compile(backend="eager", fullgraph=True)
        assert torch.equal(module.net(*args), expected)
    assert list(module.state_dict()) == before
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in tiny(depth=2).named_parameters()]


@pytest.mark.parametrize("changes", [{}, {"in_context_len": 0}])
def test_fresh_network_returns_exactly_zero(changes):
    module = tiny(fresh=True, **changes)
    with torch.no_grad():
        out = module.net(*inputs())
    assert torch.equal(out, torch.zeros(3, 4, 192))


@pytest.mark.parametrize("experiment", DROPOUT)
def test_recipe_has_dropout_in_the_middle_half_only(experiment):
    net, (middle, rate) = on_meta(experiment).net, DROPOUT[experiment]
    for i, block in enumerate(net.blocks):
        expected = rate if i in middle else 0.0
        assert (block.attn.proj_dropout.p, block.mlp.dropout.p, block.attn.attn_dropout) == (expected, expected, 0.0), i


@pytest.mark.parametrize(
    ("depth", "middle"), [(4, {1, 2}), (5, {1, 2}), (6, {1, 2}), (7, {1, 2}), (8, {2, 3, 4, 5}), (3, set())]
)
@pytest.mark.parametrize("kind", ["attn_dropout", "proj_dropout"])
def test_blocks_that_draw_dropout_are_the_middle_half(depth, middle, kind):
    """In train mode two passes of one block over the same input differ there and nowhere else; in eval mode nowhere."""
    net = tiny(depth=depth, **{kind: 0.5}).net
    x, c, rope = torch.randn(2, 4, 32), torch.randn(2, 32), net.rope[:, 2:]

    def drawing():
        return {i for i, block in enumerate(net.blocks) if not torch.equal(block(x, c, rope), block(x, c, rope))}

    with torch.no_grad():
        assert net.train() and drawing() == middle
        assert net.eval() and drawing() == set()
