"""big_vision's Adafactor against its own numbers; and what those cannot show: fused attention, resuming."""

import copy
import re

import pytest
import torch
from torch import nn

from lightning_modules.adafactor import Adafactor, factored_sides
from lightning_modules.optim import OptimConfig, learning_rate, make_optimizer, param_groups
from tests.golden_cases import Golden, case_id, golden_paths, read_json


def runs(path):
    """(name in the file, configuration) of each run that used Adafactor."""
    configs = read_json(path.with_suffix(".json"))
    return [(name, c) for name, c in configs.items() if c.get("optax_name", "").endswith("adafactor")]


GOLDEN_RUNS = [(p, name, c) for p in golden_paths("givt", "**/optim*.safetensors") for name, c in runs(p)]


def multiplier(config):
    """The first pattern that a name matches says what its learning rate is multiplied by."""
    rules = config.get("lr_mults") or []
    return lambda name, param: next((m for pattern, m in rules if re.fullmatch(pattern, name)), 1.0)


@pytest.mark.parametrize(("path", "run", "config"), GOLDEN_RUNS, ids=[f"{case_id(p)}-{r}" for p, r, _ in GOLDEN_RUNS])
def test_golden_steps(path, run, config):
    tensors, lr = Golden(path, partial=True), config["lr"]
    unread = {name for name in tensors.names() if name.startswith(f"{run}/")}

    def read(prefix):
        found = {n.removeprefix(prefix): tensors[n] for n in sorted(unread) if n.startswith(prefix)}
        unread.difference_update(prefix + n for n in found)
        return found

    params = {name: nn.Parameter(tensor.clone()) for name, tensor in read(f"{run}/params0/").items()}
    optim = OptimConfig(
        lr=lr,
        optimizer="adafactor",
        betas=(0.9, config.get("optax", {}).get("beta2_cap", 0.999)),
        weight_decay=config.get("wd", 0.0) / lr,  # official decay is not multiplied by the learning rate
    )
    exceptions = {"no_weight_decay": lambda n, p: not n.endswith("/kernel"), "lr_multiplier": multiplier(config)}
    optimizer = make_optimizer(param_groups(params.items(), optim.weight_decay, **exceptions), optim, lr)
    start, schedule = [group["lr"] for group in optimizer.param_groups], read(f"{run}/schedule")[""]
    for step, factor in enumerate(schedule.tolist()):
        grads = read(f"{run}/grads_step{step}/")
        for name, grad in grads.items():
            params[name].grad = grad
        for group, rate in zip(optimizer.param_groups, start, strict=True):
            group["lr"] = rate * factor
        if grads:
            optimizer.step()
        for name, expected in read(f"{run}/params_after_{step + 1}/").items():
            torch.testing.assert_close(params[name].detach(), expected, atol=1e-6, rtol=1e-6)
    assert unread == set()


@pytest.mark.parametrize(("path", "run", "config"), GOLDEN_RUNS, ids=[f"{case_id(p)}-{r}" for p, r, _ in GOLDEN_RUNS])
def test_golden_schedule(path, run, config):
    schedule, total = config["schedule"], config["total_steps"]
    warmup = schedule.get("warmup_steps", schedule.get("warmup_percent", 0.0) * total)
    expected = Golden(path, partial=True)[f"{run}/schedule"]
    ours = [learning_rate(s, peak=1.0, warmup=warmup, total=total, schedule="cosine") for s in range(len(expected))]
    torch.testing.assert_close(torch.tensor(ours), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((40,), None),
        ((31, 64), None),
        ((32, 64), (0, 1)),
        ((64, 32), (1, 0)),
        ((32, 32), (0, 1)),
        ((1024, 16, 64), (2, 0)),
        ((16, 16, 3, 1024), None),
    ],
)
def test_the_two_longest_sides_are_factored_if_both_are_long(shape, sides):
    assert factored_sides(shape) == sides


def test_fused_attention_is_updated_as_its_parts_are():
    """Query, key and value of 2 heads in one matrix, against three official kernels [E, N, d]."""
    width, heads, dim = 64, 2, 32
    kernels = [nn.Parameter(torch.randn(width, heads, dim)) for _ in range(3)]
    fused = nn.Parameter(torch.cat([kernel.detach().flatten(1).T for kernel in kernels]))
    options = {"lr": 0.1, "weight_decay": 0.01}
    ours = Adafactor([fused], shapes={fused: (3, heads, dim, width)}, **options)
    theirs = Adafactor(kernels, **options)
    for _ in range(3):
        for kernel in kernels:
            kernel.grad = torch.randn_like(kernel)
        fused.grad = torch.cat([kernel.grad.flatten(1).T for kernel in kernels])
        ours.step()
        theirs.step()
    expected = torch.cat([kernel.detach().flatten(1).T for kernel in kernels])
    torch.testing.assert_close(fused.detach(), expected, atol=1e-5, rtol=1e-5)


def test_a_resumed_run_is_the_unbroken_one_bit_for_bit():
    first = nn.Parameter(torch.randn(40, 36)), nn.Parameter(torch.randn(36))
    unbroken = Adafactor(first, lr=0.1)
    for p in first:
        p.grad = torch.randn_like(p)
    unbroken.step()
    second = tuple(nn.Parameter(p.detach().clone()) for p in first)
    resumed = Adafactor(second, lr=0.1)
    resumed.load_state_dict(copy.deepcopy(unbroken.state_dict()))
    for p, q in zip(first, second, strict=True):
        p.grad = q.grad = torch.randn_like(p)
    unbroken.step()
    resumed.step()
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    assert {s["momentum"].dtype for s in resumed.state.values()} == {torch.bfloat16}


def test_a_parameter_without_gradient_stays():
    param = nn.Parameter(torch.ones(3))
    Adafactor([param], lr=0.1, weight_decay=1.0).step()
    assert torch.equal(param, torch.ones(3))
