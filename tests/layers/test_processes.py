"""Means over processes: two of them, with half of a batch each, get what one gets of the whole."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from layers.discriminator import DiscriminatorConfig, GlobalBatchNorm, PatchDiscriminator, adaptive_weight
from layers.processes import mean_over_processes

WORLD = 2


def test_one_process_has_its_own_values():
    x = torch.randn(3)
    assert mean_over_processes(x) is x


def losses(rank: int, world: int) -> list[torch.Tensor]:
    """Mean loss of a discriminator on this process's rows, the gradients, and the weight of two losses."""
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(DiscriminatorConfig(channels=4, num_layers=2)).double()
    for module in discriminator.modules():
        if isinstance(module, GlobalBatchNorm):
            module.weight.data.uniform_(0.5, 1.5)
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)[rank::world].requires_grad_()
    last = torch.nn.Parameter(torch.ones(3, 1, 1, dtype=torch.float64))
    logits = discriminator(x * last)
    weight = adaptive_weight((x * last).square().mean(), logits.mean(), last)
    loss = logits.tanh().mean()
    loss.backward()
    grads = [param.grad for param in discriminator.parameters()]
    return [mean_over_processes(value.detach()) for value in (loss, last.grad, *grads)] + [weight]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    options = {"init_method": f"file://{folder}/meet", "rank": rank, "world_size": WORLD}
    dist.init_process_group("gloo", **options)
    torch.save(losses(rank, WORLD), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_a_discriminator_as_one(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=WORLD)
    expected = losses(0, 1)
    for rank in range(WORLD):
        for actual, wanted in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(actual, wanted, atol=1e-10, rtol=1e-8)
