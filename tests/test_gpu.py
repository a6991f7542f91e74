"""What only a CUDA device can show: no waits in a step, CUDA graphs that equal eager, bf16 near float32, memory."""

import pytest
import torch

from benchmarks.bench import autocast, excite, our_step, random_batch
from benchmarks.references.jit import PlainJiT
from experiments.load import load_module
from layers.cuda_graphs import Graphed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMALL = [
    "--model.init_args.net.width=256",
    "--model.init_args.net.depth=4",
    "--model.init_args.net.num_heads=4",
    "--model.init_args.net.in_context_start=2",
    "--model.init_args.sampling.num_steps=8",
]


@pytest.fixture
def module():
    torch.manual_seed(0)
    built = load_module("jit", SMALL).to("cuda")
    excite(built)
    return built


def test_training_step_never_waits_for_the_device(module):
    step = our_step(module.train(), random_batch(module, 8, "cuda"))
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_sampler_never_waits_for_the_device(module):
    labels = torch.arange(4, device="cuda")
    noise = torch.randn(4, module.tokenizer.seq_len, module.tokenizer.token_dim, device="cuda")
    with torch.no_grad(), autocast("cuda"):
        module.solve(noise, labels, module.sampling)
        torch.cuda.set_sync_debug_mode("error")
        try:
            module.solve(noise, labels, module.sampling)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def sample(module) -> torch.Tensor:
    with autocast("cuda"):
        return module.sample(torch.arange(4), generator=torch.Generator("cuda").manual_seed(0))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def test_weights_cast_once_give_the_same_samples_and_graphs_nearly_so(module):
    plain = sample(module)
    module.prepare_sampling()
    assert torch.equal(sample(module), plain)
    module.prepare_sampling(compile=True)
    assert relative(sample(module), plain) < 2e-2
    torch.testing.assert_close(sample(module), sample(module), rtol=0, atol=0)


def test_bf16_is_near_float32_and_the_plain_path_in_forward_and_gradient(module):
    x = torch.randn(8, module.tokenizer.seq_len, module.tokenizer.token_dim, device="cuda")
    t, y = torch.rand(8, device="cuda"), torch.arange(8, device="cuda")
    results = {}
    for name, net, half in (
        ("ours", module.net, True),
        ("plain", PlainJiT(module.net), True),
        ("exact", module.net, False),
    ):
        module.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            out = net(x, t, y).float()
        (out * x).mean().backward()
        results[name] = out.detach(), module.net.blocks[1].attn.qkv.weight.grad.clone()
    for part in (0, 1):
        assert relative(results["ours"][part], results["exact"][part]) < 2e-2
        assert relative(results["ours"][part], results["plain"][part]) < 2e-2


def test_compiled_training_step_follows_the_eager_one():
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = load_module("jit", SMALL).to("cuda").train()
        excite(module)
        batch = random_batch(module, 8, "cuda")
        if compiled:
            module.net.compile(dynamic=False)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
        generator, curve = torch.Generator("cuda").manual_seed(0), []
        for _ in range(5):
            with autocast("cuda"):
                loss = module.training_loss(batch, generator)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


MAR_SMALL = [
    "--model.init_args.net.width=256",
    "--model.init_args.net.depth=3",
    "--model.init_args.head.width=256",
    "--model.init_args.sampling.num_iter=8",
    "--model.init_args.sampling.num_steps=20",
]


@pytest.fixture
def mar():
    torch.manual_seed(0)
    built = load_module("mar_digits", MAR_SMALL).to("cuda")
    excite(built)
    return built


def test_mar_training_step_never_waits_for_the_device(mar):
    step = our_step(mar.train(), random_batch(mar, 8, "cuda"))
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("graphed", [False, True])
def test_mar_sampler_never_waits_for_the_device(mar, graphed):
    mar.eval()
    if graphed:
        mar.prepare_sampling(compile=True)
    labels = torch.arange(4, device="cuda")
    with torch.no_grad(), autocast("cuda"):
        mar.sample_tokens(labels, mar.sampling)
        torch.cuda.set_sync_debug_mode("error")
        try:
            mar.sample_tokens(labels, mar.sampling)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_mar_graphs_of_trunk_and_head_equal_eager(mar):
    """float32, each call by itself, so that nothing is amplified from step to step or token to token."""
    mar.eval()
    labels, orders = torch.arange(8, device="cuda"), mar.orders(torch.rand(8, 16, device="cuda"))
    graphed = Graphed(mar.net)
    for count in (0, 1, 5, 5, 12):  # a shape that occurs again is replayed with other values
        known, wanted = orders[:, :count], orders[:, count : count + 2].contiguous()
        x = torch.randn(8, count, mar.tokenizer.token_dim, device="cuda")
        assert relative(graphed(x, known, wanted, labels), mar.net(x, known, wanted, labels)) < 1e-5
    settings = {"cfg_scale": 2.0, "num_steps": 20}
    shape = mar.head.noise_shape(20, "ddpm")
    calls = []
    for rows in (1, 8, 8, 24):
        z, uncond = torch.randn(2, rows, mar.net.decoder_width, device="cuda")
        calls.append((z, torch.randn(shape[0], rows, shape[1], device="cuda"), uncond))
    eager = [mar.head.sample(z, noise, uncond=u, **settings) for z, noise, u in calls]
    mar.head.capture_sampling()
    for (z, noise, u), expected in zip(calls, eager, strict=True):
        assert relative(mar.head.sample(z, noise, uncond=u, **settings), expected) < 1e-3


def test_mar_prepared_sampling_repeats_itself(mar):
    mar.prepare_sampling(compile=True)
    first = sample(mar)
    assert first.isfinite().all()
    torch.testing.assert_close(sample(mar), first, rtol=0, atol=0)


def test_mar_compiled_training_step_follows_the_eager_one():
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = load_module("mar_digits", [*MAR_SMALL, "--model.init_args.net.proj_dropout=0"]).to("cuda").train()
        excite(module)
        batch = random_batch(module, 8, "cuda")
        if compiled:
            for part in module.compiled_modules():
                part.compile(dynamic=module.dynamic_shapes())
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
        generator, curve = torch.Generator("cuda"), []
        for seed in range(5):  # each with another number of masked tokens
            with autocast("cuda"):
                loss = module.training_loss(batch, generator.manual_seed(seed))["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[1] == pytest.approx(losses[0], rel=5e-2)
