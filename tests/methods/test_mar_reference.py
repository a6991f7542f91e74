"""The fast path equals the plain one of benchmarks/references/mar.py: loss, gradients, samples; what is compiled."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from benchmarks.references.mar import Reference
from layers.cuda_graphs import Graphed
from layers.gather import take
from layers.heads.diffusion import DiffusionHead
from layers.tokenizers.pixels import PixelTokenizer
from lightning_modules.mar import HeadConfig, MARConfig, MARModule, MARObjective, MARSampling

LIMIT = torch._dynamo.config.recompile_limit  # graphs that torch.compile keeps of a function


def tiny(side=8, kind="diffusion", attention="bidirectional", depth=2, **objective) -> MARModule:
    """Every weight is random, so that zero initialisation hides nothing."""
    net = MARConfig(32, depth, 2, buffer_size=3, attn_dropout=0.0, proj_dropout=0.0, attention=attention)
    module = MARModule(PixelTokenizer(side, 2), 5, net, HeadConfig(kind, 16, 2, repeat=2), MARObjective(**objective))
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.2 if p.ndim > 1 else 0.1)
    return module.eval()


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_loss_and_every_gradient():
    """The plain path computes all tokens and masks; draws of tokens that are known must not matter."""
    module, reference = tiny(), Reference(tiny())
    reference.module.load_state_dict(module.state_dict())
    x, labels = torch.randn(3, 16, 12), torch.tensor([0, 4, 5])
    orders = torch.rand(3, 16).argsort(1)
    masked, known = orders[:, :11], orders[:, 11:]
    t, noise = torch.randint(0, 1000, (2, 3, 16)), torch.randn(2, 3, 16, 12)  # (M, B, L), (M, B, L, D)
    time = torch.stack([take(draw, masked) for draw in t], dim=1)
    fewer = torch.stack([take(draw, masked) for draw in noise], dim=1)
    ours = module.masked_loss(x, labels, masked, known, time, fewer)["loss"]
    plain = reference.masked_loss(x, labels, reference.mask(orders, 11), t, noise)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    ours.backward()
    plain.backward()
    for (name, a), b in zip(module.named_parameters(), reference.module.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm() + 1e-9, name


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize(("scale", "clip"), [(1.0, None), (3.0, None), (3.0, 1.0)])
@torch.no_grad()
def test_samples(schedule, scale, clip):
    module = tiny()
    module.head.clip_denoised = clip
    sampling = MARSampling(6, 12, cfg_scale=scale, cfg_schedule=schedule, temperature=0.9)
    labels, orders, drawn = torch.tensor([0, 1, 4]), torch.rand(3, 16).argsort(1), []

    def noise(draws, tokens, dim):
        rows = torch.randn(draws, 3 * tokens, dim)
        drawn.extend(rows)
        return rows

    def replay(rows, dim):
        row = drawn.pop(0)
        return torch.cat([row, torch.randn_like(row)]) if rows == 2 * len(row) else row  # the second half is unused

    ours = module.generate(labels, orders, noise, sampling)
    plain = Reference(module).generate(labels, orders, replay, sampling)
    assert not drawn
    torch.testing.assert_close(ours, plain, atol=2e-3, rtol=1e-3)  # 12 steps amplify rounding 3000-fold


@torch.no_grad()
def test_draws_of_its_own():
    module = tiny().train()
    batch = {"image": torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), "label": torch.arange(4)}
    assert Reference(module).loss(batch).isfinite()
    assert Reference(module.eval()).sample(torch.arange(3), MARSampling(4, 5, cfg_scale=2.0)).shape == (3, 16, 12)


@pytest.mark.parametrize("sizes", [{"kind": "flow"}, {"attention": "causal"}])
def test_what_the_official_code_has_not_is_refused(sizes):
    with pytest.raises(ValueError, match=r"bidirectional trunk and head\.kind=diffusion"):
        Reference(tiny(**sizes))


PHASES = {"training": ((True, 3),), "all": ((True, 3), (False, 3), (False, 2))}  # whether gradients, batch


def train_compiled(module: MARModule, counts: list[int], phases: str) -> list[int]:
    """Graphs made of trunk and head by steps with these numbers of masked tokens."""
    counters = CompileCounter(), CompileCounter()
    for part, counter in zip(module.compiled_modules(), counters, strict=True):
        part.compile(dynamic=module.dynamic_shapes(), backend=counter, fullgraph=True)
    for training, size in PHASES[phases]:  # the last batch of a validation is smaller
        module.train(training)
        for m in counts:
            x, labels = torch.randn(size, module.net.seq_len, 12), torch.arange(size)
            orders = torch.rand(size, module.net.seq_len).argsort(1)
            time, noise = torch.randint(0, 1000, (size, 2, m)), torch.randn(size, 2, m, 12)
            with torch.set_grad_enabled(training):
                module.masked_loss(x, labels, orders[:, :m], orders[:, m:], time, noise)
    return [counter.frame_count for counter in counters]


@pytest.mark.slow
def test_training_makes_one_graph_for_all_lengths(dynamo):
    module = tiny(side=16, depth=1)
    assert len(module.mask_counts()) == 20 and module.dynamic_shapes()
    assert train_compiled(module, module.mask_counts()[:8], "training") == [1, 1]


@pytest.mark.slow
def test_training_and_validation_make_fewer_graphs_than_are_kept(dynamo):
    """No known token, one, and any number, each with gradients and without: 6 graphs of the trunk, 2 of the head."""
    module = tiny(side=16, depth=1)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        assert train_compiled(module, module.mask_counts()[::-1], "all") == [6, 2]
    assert LIMIT >= 6, "torch.compile would go on eagerly, and say so in a warning only"


@pytest.mark.slow
def test_a_causal_trunk_is_compiled_for_its_one_length(dynamo):
    module = tiny(attention="causal", depth=1)
    assert not module.dynamic_shapes()
    assert train_compiled(module, [module.net.seq_len], "all")[0] == 3  # training, validation, its smaller last batch


@pytest.mark.parametrize(("multiple", "counts"), [(8, 3), (16, 2)])
def test_few_numbers_of_masked_tokens_are_compiled_each_by_itself(multiple, counts):
    module = tiny(side=16, mask_multiple=multiple)
    assert len(module.mask_counts()) == counts and not module.dynamic_shapes()


def test_mask_counts_are_those_that_are_drawn():
    for multiple in (1, 4, 24):
        module = tiny(side=16, mask_multiple=multiple)
        drawn = {module.num_masked(torch.Generator().manual_seed(seed)) for seed in range(600)}
        assert drawn == set(module.mask_counts())


@pytest.mark.slow
@torch.no_grad()
def test_a_head_s_step_is_compiled_once_for_all_numbers_of_rows(dynamo):
    """As `capture_sampling` prepares it, but for the capture, which needs CUDA."""
    head = DiffusionHead(4, 8, width=16, depth=2).eval()
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.2)
    counter, settings = CompileCounter(), {"cfg_scale": 2.0, "num_steps": 6}
    calls = [(torch.randn(r, 8), torch.randn(7, r, 4), torch.randn(r, 8)) for r in (1, 2, 3, 4, 7, 12)]
    expected = [head.sample(z, noise, uncond=u, **settings) for z, noise, u in calls]
    head._compiled = torch.compile(head._chain, backend=counter, fullgraph=True)
    for (z, noise, u), result in zip(calls, expected, strict=True):
        torch.testing.assert_close(head.sample(z, noise, uncond=u, **settings), result, rtol=0, atol=0)
    assert counter.frame_count <= 3  # one row, the first other number, any number


class FakeCapture:
    """Stands in for a device's: replays by calling, into the result's memory."""

    def __init__(self) -> None:
        self.captured = 0

    def __call__(self, call):
        self.captured += 1
        result = call()
        return lambda: result.copy_(call()), result


@torch.no_grad()
def test_graphed_trunk_and_head_give_the_same_samples_and_know_their_shapes():
    module, capture = tiny(), FakeCapture()
    sampling = MARSampling(6, 12, cfg_scale=3.0)

    def draw(labels, seed):
        return module.sample_tokens(torch.tensor(labels), sampling, torch.Generator().manual_seed(seed))

    expected = [draw([0, 4], 1), draw([3, 3], 2), draw([2], 3)]
    module._captured = Graphed(module.net, capture=capture)
    module.head._captured = Graphed(module.head._solve, capture=capture)
    first = draw([0, 4], 1)
    made = capture.captured
    second = draw([3, 3], 2)
    assert capture.captured == made and made <= 12  # 6 of the trunk, and of the head one for each number of rows
    torch.testing.assert_close([first, second, draw([2], 3)], expected, rtol=0, atol=0)
    assert capture.captured > made


@pytest.mark.slow
def test_compiled_sampling_prepares_trunk_and_head():
    module = tiny()
    module.prepare_sampling(compile=True)
    assert isinstance(module._captured, Graphed) and isinstance(module.head._captured, Graphed)
    assert {p.dtype for n, p in module.named_parameters() if n.endswith("mlp.0.weight")} == {torch.bfloat16}
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in tiny().named_parameters()]
