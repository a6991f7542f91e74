"""The fast path equals the plain one of benchmarks/references/jit.py: outputs, gradients, samples."""

import pytest
import torch

from benchmarks.bench import excite
from benchmarks.references.jit import PlainJiT, Reference
from layers.tokenizers.pixels import PixelTokenizer
from lightning_modules.jit import JiTConfig, JiTModule, JiTObjective, JiTSampling


def tiny(**objective) -> JiTModule:
    net = JiTConfig(32, 4, 2, bottleneck_dim=8, in_context_len=3, in_context_start=2)
    module = JiTModule(PixelTokenizer(16, 4), 5, net, JiTObjective(**objective))
    excite(module)
    return module.eval()


def test_forward_and_every_gradient():
    module = tiny()
    x, t, y = torch.randn(3, 16, 48), torch.rand(3), torch.tensor([0, 4, 5])
    results = []
    for net in (module.net, PlainJiT(module.net)):
        module.zero_grad()
        out = net(x, t, y)
        out.square().mean().backward()
        grads = {n: p.grad.clone() for n, p in module.net.named_parameters() if p.requires_grad}
        results.append((out.detach(), grads))
    (ours, our_grads), (plain, plain_grads) = results
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    for name, grad in plain_grads.items():
        assert (our_grads[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-9, name


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.1, 1.0), (0.25, 0.5)])
def test_samples(method, interval):
    """One batched pass, and none for the branch without label outside the interval, change nothing."""
    module = tiny(noise_scale=2.0)
    sampling, labels = JiTSampling(method, 8, 2.5, interval), torch.tensor([0, 1, 4])
    ours = module.sample_tokens(labels, sampling, torch.Generator().manual_seed(3))
    plain = Reference(module).sample(labels, sampling, torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("prediction", "loss"), [("x", "v"), ("eps", "eps"), ("v", "x")])
def test_loss(prediction, loss):
    module = tiny(prediction=prediction, loss=loss).train()
    batch = {"image": torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), "label": torch.arange(8) % 5}
    ours = module.training_loss(batch, torch.Generator().manual_seed(1))["loss"]
    torch.testing.assert_close(ours, Reference(module).loss(batch, torch.Generator().manual_seed(1)), rtol=1e-5, atol=0)
