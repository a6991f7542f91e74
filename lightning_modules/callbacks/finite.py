"""What becomes of a step whose loss or gradient is not finite: it changes nothing, and it is reported.

The report names the step, the layers with the largest norms and the rows of the data; all of it is appended to
skipped_steps.jsonl in the run's folder. Too many such steps end the run.
"""

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from copy import copy
from itertools import islice
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_modules.callbacks.checkpoint import latest_checkpoint
from lightning_modules.paths import run_folder, shown

WINDOW = 1000  # optimiser steps over which skipped ones are counted
FILE = "skipped_steps.jsonl"
SHOWN_LAYERS, SHOWN_ROWS = 3, 8


class Step(NamedTuple):
    """One optimiser step, as it was before the optimiser acted. Tensors lie on the device: nobody waited for them."""

    number: int
    loss: Tensor  # () of this process
    norms: Tensor  # (P,) of this process's gradients, or of its shards of them
    bad: Tensor  # () float32, 1 if any process found something that is not finite
    positions: list[dict[str, int]]  # where the loader stood after each of the step's batches


class FiniteSteps:
    """Skips steps that are not finite: neither weights nor the optimiser's moments change, while schedule and data go
    on. More than `max_skips` within WINDOW steps raise ValueError.

    Fused optimisers are told on the device, and whether a step was skipped is looked up later (`check`); the others
    are asked to wait for the gradient's norm, which costs nothing on a CPU.
    """

    def __init__(self, max_skips: int) -> None:
        self.max_skips = max_skips
        self._params: dict[str, nn.Parameter] = {}
        self._loss: Tensor | None = None
        self._positions: list[dict[str, int]] = []
        self._steps: list[Step] = []  # taken, not looked at yet
        self._skipped: deque[int] = deque()
        self._last_is_bad = False

    def start(self, module: L.LightningModule) -> None:
        """Training begins, or goes on, with these parameters."""
        self._params = {name: param for name, param in module.named_parameters() if param.requires_grad}

    def saw_batch(self, trainer: L.Trainer) -> None:
        """A batch was read."""
        if hasattr(trainer.train_dataloader, "state_dict"):
            self._positions.append(trainer.train_dataloader.state_dict())

    def saw_loss(self, loss: Tensor) -> None:
        """A batch's share of the step's loss was computed."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def before_step(self, trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are there: if anything is not finite, keep the optimiser from using them."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._params.values()]
        norms = torch.stack(torch._foreach_norm(_local(grads)))
        bad = (~(norms.isfinite().all() & self._loss.isfinite())).float()
        if trainer.world_size > 1:  # all skip, or none: their weights would differ
            torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        self._steps.append(Step(trainer.global_step + 1, self._loss, norms, bad, self._positions))
        self._loss, self._positions = None, []
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = bad  # as GradScaler does: a fused kernel leaves out a step that is marked so
        elif bad:
            optimizer.zero_grad()

    def check(self, trainer: L.Trainer) -> None:
        """Look at the steps since the last check; on a device this waits for it. Report those that were skipped.

        Raises ValueError if they are too many.
        """
        steps, self._steps = self._steps, []
        flags = torch.stack([step.bad for step in steps]).tolist() if steps else []
        for step, bad in zip(steps, flags, strict=True):
            self._last_is_bad = bool(bad)
            if bad:
                self._count(trainer, step)

    def skipping(self, trainer: L.Trainer) -> bool:
        """Whether the last step was skipped."""
        self.check(trainer)
        return self._last_is_bad

    def check_saved(self, trainer: L.Trainer, averages: Sequence[Mapping[str, Tensor]]) -> None:
        """The last line of defence: raises ValueError if a weight, an average or a moment is not finite."""
        states = [state.items() for optimizer in trainer.optimizers for state in optimizer.state.values()]
        kept = {
            "weights": list(self._params.values()),
            "averages": [tensor for average in averages for tensor in average.values()],
            "optimiser's moments": [v for state in states for _, v in state if isinstance(v, Tensor)],
        }
        for kind, tensors in kept.items():
            norms = torch._foreach_norm([tensor.detach() for tensor in _local(tensors)]) if tensors else []
            bad = bool(norms) and not torch.stack([norm.isfinite() for norm in norms]).all().item()
            if trainer.strategy.reduce_boolean_decision(bad, all=False):
                raise ValueError(
                    f"the {kind} are not finite at step {trainer.global_step}, so they are not saved: lower the "
                    f"learning rate (--model.init_args.optim.lr); {last_good(trainer)}"
                )

    def _count(self, trainer: L.Trainer, step: Step) -> None:
        self._skipped.append(step.number)
        while self._skipped[0] <= step.number - WINDOW:
            self._skipped.popleft()
        account = self._account(trainer, step)
        if len(self._skipped) > self.max_skips:
            raise ValueError(
                f"the loss or gradient is not finite, {len(self._skipped)} times in {WINDOW} steps "
                f"(guard.max_skips={self.max_skips}): {account}; lower --model.init_args.optim.lr, use "
                f"--trainer.precision=32-true or look at these rows; {last_good(trainer)}"
            )
        rank_zero_warn(f"skipped, because it is not finite: {account}")

    def _account(self, trainer: L.Trainer, step: Step) -> str:
        """The step in a line; on the first process also in full, in the run's folder."""
        # in float64, where the norm of weights that are barely finite is no infinity
        weights = torch.stack(torch._foreach_norm([p.detach().double() for p in _local(list(self._params.values()))]))
        own = {
            "loss": step.loss.item(),
            "rows": rows_of(trainer.train_dataloader, step.positions),
            "gradients": step.norms.tolist(),
            "weights": weights.tolist(),
        }
        processes = _gather(trainer, own)
        suspects = [one for one in processes if not math.isfinite(one["loss"])] or processes
        full = {
            "step": step.number,
            "epoch": step.positions[0]["epoch"] if step.positions else trainer.current_epoch,
            "loss": suspects[0]["loss"],
            "rows": [row for one in suspects for row in one["rows"]],
            "gradient_norms": self._norms([one["gradients"] for one in processes]),
            "weight_norms": self._norms([one["weights"] for one in processes]),
        }
        if trainer.is_global_zero:
            run_folder(trainer).mkdir(parents=True, exist_ok=True)
            with (run_folder(trainer) / FILE).open("a") as file:
                print(json.dumps(full), file=file)
        return in_a_line(full) + (f" (all: {shown(run_folder(trainer) / FILE)})" if trainer.is_global_zero else "")

    def _norms(self, processes: list[list[float]]) -> dict[str, float]:
        """By name, of whole tensors: a process of a sharded run knows its shards."""
        sharded = any(hasattr(param, "to_local") for param in self._params.values())
        parts = torch.tensor(processes if sharded else processes[:1], dtype=torch.float64)  # (processes, P)
        return dict(zip(self._params, parts.norm(dim=0).tolist(), strict=True))


def in_a_line(account: Mapping[str, Any]) -> str:
    """A skipped step for a person: of the gradients if they tell layers apart, else of the weights."""
    gradients, rows = account["gradient_norms"], account["rows"]
    bad = [name for name, norm in gradients.items() if not math.isfinite(norm)]
    if len(bad) == len(gradients):
        layers = f"all gradients nan or inf, largest weights {largest(account['weight_norms'])}"
    else:
        layers = f"{len(bad)} of {len(gradients)} gradients nan or inf, largest {largest(gradients)}"
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    read = (
        f"rows {', '.join(map(str, rows[:SHOWN_ROWS]))}{more} of epoch {account['epoch']}" if rows else "rows unknown"
    )
    return f"step {account['step']}, loss {account['loss']:.4g}, {layers}, {read}"


def largest(norms: Mapping[str, float]) -> str:
    """The names with the largest values; nan is larger than all."""
    order = sorted(norms, key=lambda name: -math.inf if math.isnan(norms[name]) else -norms[name])
    return ", ".join(f"{name} {norms[name]:.2g}" for name in order[:SHOWN_LAYERS])


def last_good(trainer: L.Trainer) -> str:
    """Which checkpoint a run that ends like this leaves behind, as a clause."""
    latest = latest_checkpoint(trainer)
    path = latest and (latest.newest or trainer.ckpt_path)
    return f"the last good checkpoint is {shown(path)}" if path else "no checkpoint was saved yet"


def rows_of(loader: Any, positions: Sequence[Mapping[str, int]]) -> list[int]:
    """Rows of the training set in the batches after which the loader stood at `positions`; a pure function of them."""
    rows = []
    for position in positions:
        sampler = copy(loader.sampler)
        sampler.set_epoch(position["epoch"])
        sampler.start = position["done"] - 1
        rows += [key.index for key in islice(sampler, sampler.batch_size)]
    return rows


def _gather(trainer: L.Trainer, value: Any) -> list[Any]:
    """The value of every process."""
    values = [value] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def _local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this process holds of tensors that may be sharded."""
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
