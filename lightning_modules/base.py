"""GenerativeModule: what every method shares, so that a method's file holds only the method.

A method writes `training_loss`, `sample_tokens`, `official_rules` and builds `self.net`. In: batches of uint8 images
(B, 3, H, W) with int64 labels (B,), or `raw` rows of a cache. Out: losses, and float images (B, 3, H, W) in [-1, 1].
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Generator, Tensor, nn

from layers.checkpoint import check_fit
from layers.precision import cast_linear_
from layers.processes import several_processes
from layers.random import Generators, mix_seed, row_generators
from layers.tokenizers.base import Tokenizer, Tokens
from layers.tokenizers.base import to_uint8 as to_uint8
from lightning_modules.cache_check import check_cache
from lightning_modules.config import as_config, as_tokenizer, tokenizer_config
from lightning_modules.optim import OptimConfig, learning_rate, make_optimizer, param_groups
from lightning_modules.pieces import whole
from lightning_modules.pretrained import Pretrained
from lightning_modules.protocol import Protocol
from lightning_modules.sharding import gather, is_sharded, prepare_strategy, release
from lightning_modules.tokenizer_weights import load_tokenizer_weights, with_frozen, without_frozen

Batch = dict[str, Any]


class GenerativeModule(Pretrained, L.LightningModule):
    """Base of every method. Arguments common to all:

    tokenizer: images <-> tokens.  num_classes: labels are 0..num_classes-1.  optim: optimiser and schedule.
    sampling: the method's sampler settings.  init_from: official file to start from (`init_key` picks the weights in
    it).  init_classes: "keep" the file's class table, or start a "new" one (its null row is kept).
    compile: torch.compile the network on CUDA, in place; elsewhere it runs eagerly, and says so.
    """

    PROTOCOL: ClassVar[Protocol | None] = None  # how the paper evaluated
    UNCONDITIONAL: ClassVar[tuple[str, ...]] = ()  # settings below init_args for data of one class: "sampling.x=1"

    net: nn.Module

    def __init__(
        self,
        tokenizer: Tokenizer | Mapping[str, Any],
        num_classes: int,
        optim: OptimConfig | Mapping[str, Any],
        sampling: Any,
        *,
        init_from: str | None,
        init_key: str | None,
        init_classes: Literal["keep", "new"],
        compile: bool,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}: use 1 with one label 0 for unconditional data")
        self.tokenizer = as_tokenizer(tokenizer)
        self.num_classes = num_classes
        self.optim = as_config(OptimConfig, optim)
        self.sampling = sampling
        self.init_from, self.init_key, self.init_classes = init_from, init_key, init_classes
        self.compile_enabled = compile
        self._generator: Generator | None = None

    # What a method writes

    def training_loss(self, batch: Batch, generator: Generator | None = None) -> dict[str, Tensor]:
        """{"loss": scalar, ...}; every value is logged."""
        raise NotImplementedError

    def sample_tokens(self, labels: Tensor, sampling: Any, generator: Generators = None) -> Tensor:
        """int64 labels (B,) -> tokens (B, L, D)."""
        raise NotImplementedError

    def check_sampling(self, sampling: Any) -> None:
        """Raise ValueError for sampler settings that cannot work with this model; asked before the first step."""

    def no_weight_decay(self, name: str, param: nn.Parameter) -> bool:
        """Parameters without weight decay besides 1-D ones and biases."""
        return False

    def lr_multiplier(self, name: str, param: nn.Parameter) -> float:
        """What a parameter's learning rate is multiplied by."""
        return 1.0

    def factored_shape(self, name: str, param: nn.Parameter) -> Sequence[int]:
        """The shape in which Adafactor factors a parameter: the official one, where ours is stored in another."""
        return param.shape

    def compiled_modules(self) -> list[nn.Module]:
        """What `compile: true` compiles: modules that training calls (`module(...)`)."""
        return [self.net]

    def dynamic_shapes(self) -> bool:
        """Whether shapes differ from step to step, so that they are compiled once for any size, not once for each."""
        return False

    def blank_batch(self, size: int, device: torch.device | str, *, cached: bool = False) -> Batch:
        """What costs are counted on (experiments/costs.py): black images of class 0, or what a cache holds of them."""
        side = self.tokenizer.image_size
        image = torch.zeros(size, 3, side, side, dtype=torch.uint8, device=device)
        label = torch.zeros(size, dtype=torch.int64, device=device)
        if not cached:
            return {"image": image, "label": label}
        with torch.no_grad():
            return {"raw": self.tokenizer.encode_image(image), "label": label}

    def save_arguments(self, **arguments: Any) -> None:
        """Store constructor arguments as plain values, so that checkpoints load with weights_only=True."""
        self.save_hyperparameters({name: _plain(value) for name, value in arguments.items()})

    # Training

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A frozen tokenizer is a file of its own: checkpoints hold no copy of it."""
        checkpoint["state_dict"] = without_frozen(checkpoint["state_dict"], self.tokenizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A resumed run must have the sizes that the checkpoint was trained with."""
        correct_epochs(checkpoint.get("loops", {}).get("fit_loop", {}))
        checkpoint["state_dict"] = with_frozen(checkpoint["state_dict"], self.tokenizer)
        check_fit(
            checkpoint["state_dict"], self.state_dict(), origin=f"the checkpoint {self.trainer.ckpt_path} (CKPT=)"
        )

    def setup(self, stage: str) -> None:
        if self.trainer.precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"--trainer.precision={self.trainer.precision} would round small updates away: use bf16-mixed, "
                f"which keeps weights and averages in float32"
            )
        prepare_strategy(self, self.trainer)
        load_tokenizer_weights(self.tokenizer)
        check_cache(self, self.trainer.datamodule)
        if self.init_from and self.is_first_start(stage):
            self.load_official(self.init_from, key=self.init_key)
        self.check_sampling(self.sampling)  # not only at the first grid of samples

    def is_first_start(self, stage: str) -> bool:
        """Whether training begins here, not goes on from a checkpoint: the moment to load what it starts from."""
        return stage == "fit" and self.trainer.ckpt_path is None

    def on_fit_start(self) -> None:
        if self.compile_enabled and self.device.type != "cuda":
            rank_zero_info(f"compile: true acts on CUDA only, {self.device.type} runs eagerly")
        elif self.compile_enabled and is_sharded(self):
            rank_zero_info("compile: true acts on whole weights only, --trainer.strategy=fsdp2 runs eagerly")
        elif self.compile_enabled:
            for module in self.compiled_modules():
                module.compile(dynamic=self.dynamic_shapes())  # in place: parameter names stay

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Check labels while they are still on the host, where it costs no wait for the device."""
        if "label" in batch:
            self.checked_labels(batch["label"])
        return batch

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Reseed from (seed, rank, epoch, batch): a resumed run draws the dropout that the unbroken one did."""
        torch.manual_seed(self._seed("train", self.global_rank, batch_idx))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self.training_loss(batch, self._step_generator("train", batch_idx))
        values = {f"train/{name}": value.detach() for name, value in losses.items()}
        if self._logs_this_step():
            # the mean over ranks, only when it is written: an all-reduce at every step would be paid for nothing; of
            # copies, because it is done in place and each rank's own loss tells whose batch was bad
            reduce = self.trainer.strategy.reduce
            values = {name: reduce(value.clone(), reduce_op="mean") for name, value in values.items()}
        self.log_dict(values, batch_size=batch_rows(batch), prog_bar=True)
        return losses["loss"]

    def on_validation_epoch_start(self) -> None:
        self._val_sums: dict[str, Tensor] = {}
        gather(self)  # once: processes may differ in their number of batches

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        rows = batch_rows(batch)
        losses = self.training_loss(batch, self._step_generator("val", batch_idx))
        for name, value in (losses | {"rows": torch.ones((), device=self.device)}).items():
            self._val_sums[name] = self._val_sums.get(name, 0) + value.detach().float() * rows

    def on_validation_epoch_end(self) -> None:
        """Means over images, exact for uneven ranks, where Lightning's own truncate the number of rows."""
        sums = sum_over_ranks({name: value.item() for name, value in self._val_sums.items()})
        release(self)
        rows = sums.pop("rows", 0)
        self.log_dict({f"val/{name}": value / rows for name, value in sums.items()}, prog_bar=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """uint8 images (B, 3, H, W) for the batch's labels."""
        generator = self._step_generator("predict", batch_idx)
        return to_uint8(self.sample(batch["label"], generator=generator))

    def tokens(self, batch: Batch, generator: Generator | None) -> Tokens:
        """The batch's tokens; the tokenizer's own noise is drawn like all other training noise."""
        return self.tokenizer(batch, lambda shape: self.global_rows(torch.randn, *shape, generator=generator))

    def global_rows(self, draw: Callable[..., Tensor], batch: int, *shape: int, generator: Generator | None) -> Tensor:
        """This rank's rows of one draw for the global batch: (batch, *shape).

        The sampler deals rows in turn, so row j of rank r is row j*world + r: with the same generator on every rank,
        the noise of an image does not depend on how many processes share the batch. A last batch that is not full takes
        the first rows of a full draw.
        """
        trainer = self._trainer
        if trainer is None:
            return draw(batch, *shape, generator=generator, device=self.device)
        world, full = trainer.world_size, getattr(trainer.datamodule, "batch_size", 0)
        rows = max(batch * world, full // trainer.accumulate_grad_batches)
        return draw(rows, *shape, generator=generator, device=self.device)[self.global_rank :: world][:batch]

    def _step_generator(self, kind: str, batch_idx: int) -> Generator:
        if self._generator is None or self._generator.device != self.device:
            self._generator = Generator(self.device)
        return self._generator.manual_seed(self._seed(kind, 0, batch_idx))

    def _row_generators(self, kind: str, batch_idx: int, rows: int) -> list[Generator]:
        """One for each row of a batch of validation, by the row's number in the set: whichever process reads it."""
        trainer = self.trainer
        first = batch_idx * (trainer.datamodule.batch_size // trainer.accumulate_grad_batches) + self.global_rank
        numbers = [first + row * trainer.world_size for row in range(rows)]
        return row_generators(self._seed(kind, 0, 0), numbers, device=self.device)

    def _seed(self, kind: str, rank: int, batch_idx: int) -> int:
        # validation draws the same noise at every epoch, so that its losses compare
        epoch = self.current_epoch if kind == "train" else 0
        return mix_seed(int(os.environ.get("PL_GLOBAL_SEED", 0)), sum(kind.encode()), rank, epoch, batch_idx)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient's norm and the learning rate, where the logger writes."""
        if self._logs_this_step():
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            norm = whole(torch.nn.utils.get_total_norm(grads))
            self.log_dict({"train/grad_norm": norm, "train/lr": optimizer.param_groups[-1]["lr"]})

    def _logs_this_step(self) -> bool:
        every = self.trainer.log_every_n_steps  # 0 switches logging off
        return every > 0 and (self.trainer.global_step + 1) % every == 0

    def writes_figures(self) -> bool:
        """Whether figures beside the loss are written of this batch: in validation, and at logged steps."""
        return not self.training or (self._trainer is not None and self._logs_this_step())

    def configure_optimizers(self) -> dict[str, Any]:
        config, trainer = self.optim, self.trainer
        if not hasattr(trainer.datamodule, "steps_per_epoch"):
            raise ValueError("training needs a data module of ours: schedules follow its batch size and epoch length")
        lr = config.peak_lr(trainer.datamodule.batch_size)
        total, steps_per_epoch = planned_steps(trainer)
        warmup = config.warmup(steps_per_epoch)
        exceptions = {"no_weight_decay": self.no_weight_decay, "lr_multiplier": self.lr_multiplier}
        groups = param_groups(self.named_parameters(), config.weight_decay, **exceptions)
        shapes = {param: self.factored_shape(name, param) for name, param in self.named_parameters()}

        def factor(step: int) -> float:
            rate = learning_rate(
                step, peak=lr, warmup=warmup, total=total, schedule=config.schedule, min_lr=config.min_lr
            )
            return rate / lr

        optimizer = make_optimizer(groups, config, lr, shapes=shapes)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Sampling

    @torch.no_grad()
    def sample(self, labels: Tensor | Sequence[int], sampling: Any = None, generator: Generators = None) -> Tensor:
        """Images for labels: int64 (B,) -> float32 (B, 3, H, W), nominally in [-1, 1]; see `to_uint8`.

        `sampling` overrides the module's settings. `generator`: one for the batch, or a sequence with one per image.
        Raises ValueError for a label outside 0..num_classes-1.
        """
        labels = self.checked_labels(labels)
        with eval_mode(self):
            tokens = self.sample_tokens(labels.to(self.device), sampling or self.sampling, generator)
            return self.tokenizer.decode(tokens).float()

    def checked_labels(self, labels: Tensor | Sequence[int]) -> Tensor:
        """int64 labels. Raises ValueError for one outside 0..num_classes-1, and for none."""
        labels = torch.as_tensor(labels, dtype=torch.int64)
        if not labels.numel():
            raise ValueError("there are no labels: give one for each image to draw")
        if not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(self._label_error(labels))
        return labels

    def prepare_sampling(self, *, compile: bool = False) -> None:
        """Make this module a fast bf16 sampler, for good: linear weights are cast once. Call `sample` under autocast.

        `compile` captures each evaluation as a CUDA graph, which takes a while: it is for many images.
        """
        for module in self.compiled_modules():
            cast_linear_(module, torch.bfloat16)
        if compile:
            for module in self.compiled_modules():
                module.compile(mode="reduce-overhead", dynamic=False)

    def _label_error(self, labels: Tensor) -> str:
        bad = labels[(labels < 0) | (labels >= self.num_classes)][0].item()
        return f"label {bad} is out of range: this model has classes 0..{self.num_classes - 1} (num_classes)"


def planned_steps(trainer: L.Trainer) -> tuple[float, int]:
    """Optimiser steps of the whole run (inf if nothing bounds it) and of one epoch, from the data module.

    Not `trainer.estimated_stepping_batches`: it sets up the loader, and one that is set up before a checkpoint is
    restored begins its epoch anew instead of going on within it.
    """
    steps_per_epoch = trainer.datamodule.steps_per_epoch()
    epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else math.inf
    steps = trainer.max_steps if trainer.max_steps != -1 else math.inf
    return min(steps, epochs * steps_per_epoch), steps_per_epoch


def correct_epochs(fit_loop: dict[str, Any]) -> None:
    """Count a saved loop's epochs as the loader does, in place.

    Lightning counts one too few from the second resume on, if the run had stopped at the last step of an epoch each
    time: it takes the epoch that it goes on with for the one that was stopped in.
    """
    loaders = fit_loop.get("state_dict", {}).get("combined_loader")
    batches = fit_loop["epoch_loop.batch_progress"]["total"] if loaders else {}
    if loaders and batches["completed"] == batches["processed"] - 1:  # saved at a batch's end, not at an epoch's
        epoch = loaders[0]["epoch"]
        for count in fit_loop["epoch_progress"].values():
            count |= {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Sums by name; a rank may lack a name, or have none at all."""
    ranks = [values]
    if several_processes():
        ranks = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(ranks, values)
    names = dict.fromkeys(name for rank in ranks for name in rank)
    return {name: sum(rank.get(name, 0.0) for rank in ranks) for name in names}


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, the mode of before afterwards."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def batch_rows(batch: Batch) -> int:
    """Number of images in a batch."""
    return len(next(iter(batch.values())))


def _plain(value: Any) -> Any:
    if isinstance(value, Tokenizer):
        return tokenizer_config(value)
    return asdict(value) if is_dataclass(value) else value
