"""Steps that are not finite: skipped, reported with layers and rows, counted, and never saved."""

import json
import math
import multiprocessing
import signal
import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn

from datamodules.sampler import StatelessSampler
from datamodules.synthetic import SyntheticData
from lightning_modules.callbacks import finite
from lightning_modules.callbacks.checkpoint import AtomicCheckpointIO, LatestCheckpoint
from lightning_modules.callbacks.ema import EMA
from lightning_modules.callbacks.finite import FILE, FiniteSteps, in_a_line
from lightning_modules.callbacks.guard import Guard
from lightning_modules.optim import OptimConfig, adamw
from lightning_modules.weights import read_torch

ROWS, BATCH = 12, 4  # three batches an epoch


class Net(L.LightningModule):
    """Two linear layers. At the optimiser steps of `bad`, from 1, its loss is multiplied by the value."""

    def __init__(self, bad: dict[int, float], spoil: str = "loss") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1)
        self.bad, self.spoil = bad, spoil
        self.history: list[dict] = []  # weights, moments, average and images of each step

    def training_step(self, batch, batch_idx):
        self.images = batch["image"]
        loss = self.second(self.first(batch["image"].float().mean((2, 3)) / 255)).square().mean()
        return loss * (self._factor() if self.spoil == "loss" else 1.0)

    def _factor(self):
        return self.bad.get(self.trainer.global_step + 1, 1.0)

    def on_after_backward(self):
        if self.spoil == "gradient":
            self.second.weight.grad[0, 2] *= self._factor()

    def configure_optimizers(self):
        return adamw([{"params": list(self.parameters()), "weight_decay": 0.1}], OptimConfig(lr=0.1), 0.1)


class Watch(L.Callback):
    """Keeps what each batch left behind."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        state = trainer.optimizers[0].state
        pl_module.history.append(
            {
                "weights": [p.detach().clone() for p in pl_module.parameters()],
                "moments": [v.clone() for p in pl_module.parameters() for v in state[p].values()],
                "images": pl_module.images,
            }
        )


def fit(folder, bad, *, spoil="loss", steps=8, max_skips=10, save_every=1, callbacks=(), **options):
    """A run of `Net`; (module, trainer)."""
    module, ema = Net(bad, spoil), EMA([0.5])
    trainer = L.Trainer(
        callbacks=[ema, Guard(max_skips), Watch(), *callbacks, LatestCheckpoint(save_every)],
        plugins=[AtomicCheckpointIO()],
        max_steps=steps,
        max_epochs=-1,
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    data = SyntheticData(image_size=4, batch_size=BATCH, length=ROWS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(initial weights|validation_step|no .val_dataloader).*")
        trainer.fit(module, data)
    return module, trainer


def saved(folder):
    """The one checkpoint below a folder: (step, content)."""
    (path,) = folder.rglob("*.ckpt")
    return int(path.stem.partition("=")[2]), read_torch(path)


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def rows_shown(module, step):
    """Which rows of the set a step was given, found by their pixels."""
    every = SyntheticData(image_size=4, batch_size=BATCH, length=ROWS)
    every.setup()
    return [
        next(i for i, image in enumerate(every.train_set.images) if torch.equal(image, one))
        for one in module.history[step - 1]["images"]
    ]


@pytest.mark.parametrize("spoil", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_step_changes_neither_weights_nor_moments_and_training_goes_on(spoil, value, tmp_path):
    with pytest.warns(UserWarning, match="skipped, because it is not finite: step 5"):
        module, _ = fit(tmp_path, {5: value}, spoil=spoil)
    before, bad, after = module.history[3:6]
    assert equal(bad["weights"], before["weights"]) and equal(bad["moments"], before["moments"])
    assert not equal(after["weights"], bad["weights"])
    step, content = saved(tmp_path)
    average = content["callbacks"]["EMA"]["shadows"][0].values()
    assert step == 8 and all(t.isfinite().all() for t in [*content["state_dict"].values(), *average])


def test_the_report_names_step_layers_and_rows(tmp_path):
    with pytest.warns(UserWarning, match="skipped") as caught:
        module, _ = fit(tmp_path, {5: math.nan}, spoil="gradient")
    (text,) = [str(one.message) for one in caught if "skipped" in str(one.message)]
    rows = rows_shown(module, 5)
    assert f"rows {', '.join(map(str, rows))} of epoch 1" in text  # three steps an epoch
    assert "1 of 4 gradients nan or inf, largest second.weight nan, " in text
    (line,) = (tmp_path / FILE).read_text().splitlines()
    record = json.loads(line)
    assert record["step"] == 5 and record["rows"] == rows and record["epoch"] == 1
    assert math.isnan(record["gradient_norms"]["second.weight"]) and record["gradient_norms"]["first.weight"] > 0
    assert set(record["weight_norms"]) == {"first.weight", "first.bias", "second.weight", "second.bias"}


def test_where_every_gradient_is_bad_the_largest_weights_are_named():
    norms = {"a": math.nan, "b": math.inf}
    account = {"step": 3, "loss": math.nan, "epoch": 0, "gradient_norms": norms, "rows": list(range(20))}
    text = in_a_line(account | {"weight_norms": {"a": 2.0, "b": 3e9}})
    assert text == (
        "step 3, loss nan, all gradients nan or inf, largest weights b 3e+09, a 2, "
        "rows 0, 1, 2, 3, 4, 5, 6, 7 and 12 more of epoch 0"
    )


def test_too_many_bad_steps_end_the_run_with_the_last_good_checkpoint(tmp_path):
    bad = dict.fromkeys(range(4, 100), math.nan)
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match="3 times in 1000 steps") as error:
        fit(tmp_path, bad, max_skips=2)
    for part in ("guard.max_skips=2", "step 6", "--model.init_args.optim.lr", "last good checkpoint is", "=0000003"):
        assert part in str(error.value)
    step, content = saved(tmp_path)
    assert step == 3, "nothing may be saved after a step that was skipped"
    unspoiled, _ = fit(tmp_path / "unspoiled", {}, steps=3)
    assert equal(content["state_dict"].values(), unspoiled.history[-1]["weights"])


def test_no_skips_allowed_ends_the_run_at_the_first(tmp_path):
    with pytest.raises(ValueError, match="1 times in 1000 steps"):
        fit(tmp_path, {2: math.inf}, max_skips=0)
    assert saved(tmp_path)[0] == 1


def test_skips_far_apart_do_not_add_up(tmp_path, monkeypatch):
    bad = dict.fromkeys((2, 4, 6, 8), math.nan)
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match="2 times"):
        fit(tmp_path / "a", bad, max_skips=1)
    monkeypatch.setattr(finite, "WINDOW", 2)
    with pytest.warns(UserWarning, match="skipped"):
        _, trainer = fit(tmp_path / "b", bad, max_skips=1)
    assert trainer.global_step == 8


def test_a_save_that_falls_on_a_bad_step_is_made_up_for_by_the_next(tmp_path):
    steps = []

    class Saves(L.Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            steps.append(trainer.global_step)

    with pytest.warns(UserWarning, match="skipped"):
        fit(tmp_path, dict.fromkeys((3, 4), math.nan), save_every=3, steps=7, callbacks=[Saves()])
    assert steps == [5, 6, 7]


def test_the_last_step_is_saved_even_if_it_was_skipped(tmp_path):
    with pytest.warns(UserWarning, match="skipped"):
        module, _ = fit(tmp_path, {8: math.nan})
    step, content = saved(tmp_path)
    assert step == 8 and equal(content["state_dict"].values(), module.history[6]["weights"])


def test_all_batches_of_an_accumulated_step_are_named(tmp_path):
    with pytest.warns(UserWarning, match="skipped"):
        module, _ = fit(tmp_path, {2: math.nan}, steps=4, accumulate_grad_batches=2)
    record = json.loads((tmp_path / FILE).read_text())
    assert record["step"] == 2 and record["rows"] == [*rows_shown(module, 3), *rows_shown(module, 4)]


@pytest.mark.parametrize("kind", ["weights", "averages", "optimiser's moments"])
def test_nothing_is_saved_of_which_a_part_is_not_finite(kind, tmp_path):
    class Spoil(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 4:
                (average,) = next(c for c in trainer.callbacks if isinstance(c, EMA)).shadows
                moments = trainer.optimizers[0].state[pl_module.first.weight]["exp_avg_sq"]
                spoilt = {"weights": pl_module.first.weight.data, "averages": average["first.weight"]}
                spoilt.get(kind, moments)[0, 0] = math.nan

    with pytest.raises(ValueError, match=f"the {kind} are not finite at step 4"):
        fit(tmp_path, {}, callbacks=[Spoil()])
    assert saved(tmp_path)[0] == 3


def test_a_fused_optimiser_skips_without_being_waited_for():
    """As on CUDA: the mark lies in a tensor, and the steps before and after are those of a run without the bad one."""

    def train(gradients):
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1, fused=True)
        watch = FiniteSteps(10)
        watch.start(module)
        for gradient in gradients:
            module.weight.grad, module.bias.grad = gradient.expand(2, 3).clone(), torch.ones(2)
            watch.saw_loss(torch.zeros(()))
            watch.before_step(SimpleNamespace(global_step=0, world_size=1), optimizer)
            assert module.weight.grad is not None, "whether a step is bad is not asked on the host"
            optimizer.step()
        return [*module.parameters(), *(v for state in optimizer.state.values() for v in state.values())]

    good = [torch.tensor(1.0), torch.tensor(-3.0)]
    assert equal(train([good[0], torch.tensor(math.inf), good[1]]), train(good))


def test_handlers_of_signals_are_put_back(tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    fit(tmp_path, {}, steps=2)
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_negative_number_of_skips_is_refused():
    with pytest.raises(ValueError, match=r"guard\.max_skips is -1"):
        Guard(-1)


def one_of_two(rank, folder, answers):
    """A process whose loss is bad if it is the second; answers with whether it skipped, and with its report."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    module = nn.Linear(3, 2)
    sampler = StatelessSampler(ROWS, global_batch_size=BATCH, rank=rank, world_size=2)
    loader = SimpleNamespace(sampler=sampler, state_dict=lambda: {"epoch": 0, "done": 2})
    trainer = SimpleNamespace(
        global_step=3,
        world_size=2,
        is_global_zero=rank == 0,
        train_dataloader=loader,
        logger=None,
        default_root_dir=folder,
    )
    optimizer = torch.optim.AdamW(module.parameters())
    watch = FiniteSteps(10)
    watch.start(module)
    watch.saw_batch(trainer)
    module.weight.grad, module.bias.grad = torch.ones(2, 3), torch.ones(2)
    watch.saw_loss(torch.tensor([1.0, math.nan][rank]))
    watch.before_step(trainer, optimizer)
    watch.check(trainer)
    answers.put((rank, module.weight.grad is None, finite.rows_of(loader, [loader.state_dict()])))


def test_processes_skip_together_and_report_the_rows_of_the_one_that_was_bad(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=one_of_two, args=(rank, str(tmp_path), answers)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = sorted(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert [skipped for _, skipped, _ in found] == [True, True]
    record = json.loads((tmp_path / FILE).read_text())
    assert record["rows"] == found[1][2] and math.isnan(record["loss"]) and record["step"] == 4
