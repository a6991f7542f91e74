"""What only a CUDA device can show: no waits in a step, CUDA graphs that equal eager, bf16 near float32, memory."""

import pytest
import torch

from benchmarks.bench import autocast, excite, our_step, random_batch
from benchmarks.references.jit import PlainJiT
from experiments.load import load_module

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
