"""Training on many processes that each keep a part of the weights: `--trainer.strategy=fsdp2`.

Weights, gradients, optimiser states and averages are cut along their first axis, one piece for each process (ZeRO,
Rajbhandari et al., arXiv 1910.02054), by torch's `fully_shard`. Unusual: only the training loss runs on pieces; for
all else (samples, validation, measurements) the weights are gathered first, so a module's other methods need not know.
Checkpoints hold whole tensors, as those of one process, so a run may go on under any other strategy.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from layers.blocks import AdaLNBlock, ViTBlock
from layers.flows.jet import ChannelCoupling, Jet, SpatialCoupling
from layers.gemma import GemmaBlock
from layers.networks.dart import DARTBlock
from layers.networks.givt import GIVTBlock
from layers.networks.rar import RARBlock
from layers.networks.vit import ViTLayer
from lightning_modules.adafactor import Adafactor
from lightning_modules.pieces import piece_like, whole_tree
from lightning_modules.weights import read_torch

NAME = "fsdp2"
# What is gathered for its own turn only, and the methods by which a loss calls it besides forward. Whatever is inside
# no such block is gathered once for the whole step, which is always right.
BLOCKS: dict[type[nn.Module], Sequence[str]] = {
    AdaLNBlock: (),
    ChannelCoupling: (),
    DARTBlock: (),
    GemmaBlock: (),
    GIVTBlock: (),
    RARBlock: ("thrifty",),
    SpatialCoupling: (),
    ViTBlock: ("rows", "causal"),
    ViTLayer: (),
}


class ShardedStrategy(DDPStrategy):
    """DDP, but that each process keeps a piece of the weights, and of all that has their size.

    reshard_after_forward: let a block's weights go after its turn and gather them again on the way back: less memory,
    half as much again to send.  shard_size: processes that share one copy (a node's, say); each such group has a copy
    of its own, so that only gradients go between them. None: all processes share one.
    """

    def __init__(self, reshard_after_forward: bool = True, shard_size: int | None = None) -> None:
        super().__init__()
        self.reshard_after_forward, self.shard_size = reshard_after_forward, shard_size

    def configure_ddp(self) -> None:
        """Cut the module, which lies on its device, instead of wrapping it."""
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            torch.distributed.broadcast(tensor.detach(), src=0)  # as DDP starts, too
        shard(self.model, self._mesh(), reshard_after_forward=self.reshard_after_forward)

    def _mesh(self) -> DeviceMesh:
        world = self.world_size
        size = world if self.shard_size is None else self.shard_size
        if size < 1 or world % size:
            raise ValueError(f"shard_size is {size}, which does not divide the {world} processes: choose a divisor")
        if size == world:
            return init_device_mesh(self.root_device.type, (world,))
        names = ("copies", "pieces")
        return init_device_mesh(self.root_device.type, (world // size, size), mesh_dim_names=names)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Every process has a part in it; the first one writes."""
        super().save_checkpoint(whole_tree(checkpoint, keep=self.is_global_zero), filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Mapped, not read: of moments and averages each process needs its piece only, and a node has many."""
        return read_torch(checkpoint_path)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """States of whole parameters become those of pieces."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(sharded_state(optimizer, state))


StrategyRegistry.register(
    NAME, ShardedStrategy, override=True, description="Pieces of weights, gradients and states on each process"
)


def prepare_strategy(module: nn.Module, trainer: L.Trainer) -> None:
    """Raise ValueError for a strategy, or a precision under one, that nothing here was made for.

    Under DDP buffers are left alone: they are constants, the same everywhere, and need not be sent at every step.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise ValueError(
            f"--trainer.strategy is {type(trainer.strategy).__name__}, under which nothing here was tried: use auto, "
            f"ddp or {NAME} (docs/scaling.md says which)"
        )
    if isinstance(trainer.strategy, ShardedStrategy) and trainer.precision == "16-mixed":
        raise ValueError(
            f"--trainer.precision=16-mixed scales losses by what one process sees of the gradients, which {NAME} cuts "
            f"in pieces: use bf16-mixed"
        )
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, [n for n, _ in module.named_buffers()])


def shard(module: nn.Module, mesh: DeviceMesh, *, reshard_after_forward: bool) -> None:
    """Cut the trainable parameters of a module and make its `training_loss` gather them. Frozen ones stay whole."""
    frozen = {p for p in module.parameters() if not p.requires_grad}
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": frozen}
    for block in blocks_of(module):
        methods = BLOCKS[type(block)]  # before it becomes another class
        fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
        for method in methods:
            register_fsdp_forward_method(block, method)
    fully_shard(module, reshard_after_forward=False, **options)
    register_fsdp_forward_method(module, "training_loss")
    _prefetch_siblings(module)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The outermost blocks that are trained. None inside a reversible flow, whose backward pass calls parts of them."""
    if isinstance(module, Jet) and module.config.backward == "reversible":
        return []
    if type(module) in BLOCKS and all(param.requires_grad for param in module.parameters()):
        return [module]
    return [block for child in module.children() for block in blocks_of(child)]


def _prefetch_siblings(module: FSDPModule) -> None:
    """On the way back each block has the one before it in its stack gathered; the first has none (the module is whole).

    torch's own choice follows the forward calls that it saw, also those of samples, which one process alone may draw:
    processes would then gather different blocks, and wait for each other for ever.
    """
    for part in _parts(module):
        part.set_modules_to_backward_prefetch([module])
    for stack in (m for m in module.modules() if isinstance(m, nn.ModuleList)):
        for before, block in pairwise(stack):
            if isinstance(before, FSDPModule) and isinstance(block, FSDPModule):
                block.set_modules_to_backward_prefetch([before])


# Whole weights for a while


@contextmanager
def gathered(module: L.LightningModule) -> Iterator[None]:
    """Inside, a sharded module holds its whole weights and sends nothing, so that any process may call any method.

    All processes must enter. The weights cannot be trained or exchanged inside. A module in one piece stays as it is.
    """
    gather(module)
    try:
        yield
    finally:
        release(module)


def gather(module: nn.Module) -> None:
    """Give each process the whole weights until `release`; all must call it."""
    for part in _parts(module):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


def release(module: nn.Module) -> None:
    """Back to pieces, which `named_parameters` then are. Sends nothing; for any time between steps, or after errors."""
    for part in _parts(module):
        part.set_reshard_after_forward(True, recurse=False)  # else a pass that was broken off would keep them
        part.reshard()
        part.set_reshard_after_forward(part is not module and _reshards(module), recurse=False)


def is_sharded(module: nn.Module) -> bool:
    """Whether this process has but a piece of the module."""
    return isinstance(module, FSDPModule)


def _parts(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)] if is_sharded(module) else []


def _reshards(module: L.LightningModule) -> bool:
    return module.trainer.strategy.reshard_after_forward


def sharded_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state dict with moments cut as their parameters. Adafactor's are means over axes: they stay."""
    if isinstance(optimizer, Adafactor):
        return state
    params = [param for group in optimizer.param_groups for param in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]

    def cut(value: Any, param: Tensor) -> Any:
        fits = isinstance(value, Tensor) and value.shape == param.shape
        return piece_like(value, param) if fits else value

    moments = {
        number: {name: cut(value, param) for name, value in state["state"][number].items()}
        for number, param in zip(numbers, params, strict=True)
        if number in state["state"]
    }
    return {**state, "state": moments}
