"""Optimiser groups and schedules."""

import math

import lightning as L
import pytest
import torch
from torch import nn

from datamodules.synthetic import SyntheticData
from layers.tokenizers.pixels import PixelTokenizer
from lightning_modules.adafactor import Adafactor
from lightning_modules.jit import JiTConfig, JiTModule
from lightning_modules.optim import OptimConfig, adamw, learning_rate, make_optimizer, param_groups


@pytest.mark.parametrize("given", [{}, {"lr": 1e-3, "blr": 1e-4}])
def test_exactly_one_of_lr_and_blr_must_be_given(given):
    with pytest.raises(ValueError, match=r"exactly one of optim\.lr"):
        OptimConfig(**given)


def test_two_lengths_of_warmup_are_an_error_naming_both():
    with pytest.raises(ValueError, match=r"warmup_steps \(10\) and warmup_epochs \(2\)"):
        OptimConfig(lr=1e-3, warmup_steps=10, warmup_epochs=2)


@pytest.mark.parametrize("name", ["lr", "min_lr", "weight_decay", "warmup_steps", "warmup_epochs"])
def test_what_cannot_be_negative_is_named(name):
    with pytest.raises(ValueError, match=f"optim.{name} is -1: it cannot be negative"):
        OptimConfig(**{"lr": 1e-3} | {name: -1})


@pytest.mark.parametrize(("config", "rate"), [({"lr": 3e-4}, 3e-4), ({"blr": 5e-5}, 2e-4)])
def test_base_rate_is_per_256_images_of_the_global_batch(config, rate):
    assert OptimConfig(**config).peak_lr(1024) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        ({}, 0),
        ({"warmup_steps": 7}, 7),
        ({"warmup_steps": 0}, 0),
        ({"warmup_epochs": 5}, 6255),
        ({"warmup_epochs": 0.5}, 625.5),
    ],
)
def test_warmup_is_counted_in_optimiser_steps(config, steps):
    assert OptimConfig(lr=1.0, **config).warmup(1251) == steps


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warmup_is_linear_from_zero_and_reaches_the_peak(schedule):
    rates = [learning_rate(s, peak=0.4, warmup=4, total=100, schedule=schedule, min_lr=0.1) for s in range(5)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_constant_schedule_stays_at_the_peak_forever():
    assert {learning_rate(s, peak=0.3, warmup=2, total=10) for s in (2, 5, 10, 1000)} == {0.3}


@pytest.mark.parametrize("at", [10, 25, 55, 99, 100])
def test_cosine_is_half_a_period_from_peak_to_min(at):
    rate = learning_rate(at, peak=2.0, warmup=10, total=100, schedule="cosine", min_lr=0.5)
    assert rate == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi * (at - 10) / 90)) / 2)


def test_cosine_ends_at_min_and_stays_there():
    ends = [learning_rate(s, peak=2.0, warmup=10, total=100, schedule="cosine", min_lr=0.5) for s in (100, 101, 500)]
    assert ends == pytest.approx([0.5, 0.5, 0.5], abs=1e-12)


def test_a_run_that_is_all_warmup_does_not_divide_by_zero():
    assert learning_rate(10, peak=2.0, warmup=10, total=10, schedule="cosine") == pytest.approx(2.0)


def named():
    matrix, bias, gain, table, frozen = (nn.Parameter(torch.ones(s)) for s in ((2, 2), (2, 2), 3, (4, 2), (2, 2)))
    frozen.requires_grad_(False)
    return {"a.weight": matrix, "a.bias": bias, "gain": gain, "head.weight": table, "fixed": frozen}


def test_groups_are_without_decay_first_then_with_and_leave_out_the_frozen():
    params = named()
    free, decayed = param_groups(params.items(), 0.02, no_weight_decay=lambda name, p: name.startswith("head."))
    assert [id(p) for p in free["params"]] == [id(params[n]) for n in ("a.bias", "gain", "head.weight")]
    assert [id(p) for p in decayed["params"]] == [id(params["a.weight"])]
    assert (free["weight_decay"], decayed["weight_decay"]) == (0.0, 0.02)


def test_adamw_steps_equal_the_written_out_rule():
    """Two steps of Loshchilov & Hutter's Algorithm 2 on a matrix (with decay) and a vector (without)."""
    config = OptimConfig(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3)
    params = {"w": nn.Parameter(torch.randn(2, 3)), "g": nn.Parameter(torch.randn(3))}
    optimizer = adamw(param_groups(params.items(), 0.3, no_weight_decay=lambda n, p: False), config, 0.1)
    plain = {n: (p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for n, p in params.items()}
    for step in (1, 2):
        for name, p in params.items():
            p.grad = torch.randn_like(p)
            w, m, v = plain[name]
            m, v = 0.8 * m + 0.2 * p.grad, 0.9 * v + 0.1 * p.grad**2
            w = w * (1 - 0.1 * (0.3 if name == "w" else 0.0))
            w = w - 0.1 * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-3)
            plain[name] = (w, m, v)
        optimizer.step()
    for name, p in params.items():
        torch.testing.assert_close(p.detach(), plain[name][0], atol=1e-6, rtol=1e-5)


class Rates(L.Callback):
    """The rate at the start of every batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, *args):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("max_epochs", [3, -1])
@pytest.mark.parametrize(
    ("accumulate", "warmup", "expected"),
    [
        (1, {"warmup_steps": 4}, [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]),
        (2, {"warmup_steps": 2}, [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]),
        (2, {"warmup_epochs": 1}, [0.0, 0.0, 0.25, 0.25, 0.5, 0.5]),  # 32 images in global batches of 8
    ],
)
def test_a_run_warms_up_in_optimiser_steps_to_the_rate_of_its_global_batch(
    tmp_path, accumulate, warmup, expected, max_epochs
):
    optim = OptimConfig(blr=32.0, **warmup)  # 1 at 8 images
    net = JiTConfig(width=8, depth=1, num_heads=1, bottleneck_dim=4, in_context_len=0)
    module, rates = JiTModule(PixelTokenizer(4, 2), 10, net, optim=optim), Rates()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(
        callbacks=[rates],
        devices=1,
        max_epochs=max_epochs,
        max_steps=len(expected) // accumulate,
        accumulate_grad_batches=accumulate,
        limit_val_batches=0,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
        **quiet,
    )
    trainer.fit(module, datamodule=SyntheticData(image_size=4, batch_size=8, num_classes=10, length=32))
    assert rates.seen == pytest.approx(expected)


def test_multiplied_rates_come_first_and_their_decay_stays_what_it_is():
    """One step's decay is rate x weight_decay: the multiplier cancels, as in big_vision."""
    params = named()
    groups = param_groups(
        params.items(),
        0.02,
        no_weight_decay=lambda name, p: False,
        lr_multiplier=lambda name, p: 0.1 if name.startswith("a.") else 1.0,
    )
    optimizer = make_optimizer(groups, OptimConfig(lr=1.0), 1.0)
    found = [(group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    assert found == [(0.1, 0.0, 1), (0.1, pytest.approx(0.2), 1), (1.0, 0.0, 1), (1.0, 0.02, 1)]


def test_a_multiplier_of_zero_names_the_parameter():
    with pytest.raises(ValueError, match=r"multiplier of gain is 0\.0: freeze it"):
        param_groups(
            named().items(),
            0.0,
            no_weight_decay=lambda n, p: False,
            lr_multiplier=lambda n, p: 0.0 * (n == "gain") + (n != "gain"),
        )


@pytest.mark.parametrize(("name", "cls"), [("adamw", torch.optim.AdamW), ("adafactor", Adafactor)])
def test_recipe_names_the_optimiser(name, cls):
    config = OptimConfig(lr=0.1, optimizer=name, betas=(0.8, 0.9), weight_decay=0.3)
    groups = param_groups(named().items(), config.weight_decay, no_weight_decay=lambda n, p: False)
    optimizer = make_optimizer(groups, config, 0.1)
    assert type(optimizer) is cls
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.3]
