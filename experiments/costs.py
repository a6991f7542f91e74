"""Counts a recipe on the meta device: FLOPs of training and sampling, bytes that the backward pass keeps.

Two FLOPs per multiply-accumulate of matmuls, convolutions and attention. Any GenerativeModule will do whose
`training_loss` and `sample` read no value of a tensor on the host; nothing is computed and no GPU is needed.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from experiments.load import instantiate
from lightning_modules.base import GenerativeModule
from lightning_modules.callbacks.throughput import count_flops

# MAR masks a share of the tokens that is drawn on the host at every step: all counts take this draw, near the median
MASKING_SEED = 10
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
# What torch.compile's partitioner saves, over the inputs and outputs of matmuls and attention: 117.1/99.1 MB per image
# of JiT-B/16, 309.0/261.7 MB of L/16 (bf16, torch 2.15)
COMPILED_KEEPS = 1.18
# Batches that bytes are counted of, of a size that devices hold. Of a few images a head that works in chunks has one
# chunk, whose outputs are kept, of more it keeps none (layers/heads/chunked.py): a second image may then add less than
# nothing
COUNTED_BATCHES = (64, 65)
# Steps of causal networks, one token at a time with a cache, and what a step does besides its arithmetic
STEPS: dict[str, Callable[..., Any]] = {
    "step": lambda *args: None,
    "step_image": lambda token, cache: cache.own.advance(1),
}


class Activations(NamedTuple):
    """Bytes kept for the backward pass: per image by eager code, per image by compiled code (an estimate), and,
    whatever the batch, the low-precision copies of the weights that autocast makes."""

    eager: float
    compiled: float
    weight_copies: float


class Storages:
    """A set of tensors' memory: views count once, `known` ones not at all."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._held: dict[int, torch.UntypedStorage] = {}  # held, because the address of a freed one is used again

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._held[storage._cdata] = storage
        return tensor

    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self._held.values())


class MatmulTensors(TorchDispatchMode):
    """Collects what enters and leaves matmuls, convolutions and attention: the rest is cheap to compute again."""

    OPS = frozenset({*flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu})

    def __init__(self, found: Storages) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in self.OPS:
            for leaf in tree_leaves((args, kwargs, out)):
                if isinstance(leaf, Tensor):
                    self.found.add(leaf)
        return out


def build(config: dict[str, Any]) -> GenerativeModule:
    """The module of a merged recipe, on the meta device."""
    with torch.device("meta"):
        module = instantiate(config["model"], "model")
    return _without_files(module.to("meta"))


def _without_files(module: GenerativeModule) -> GenerativeModule:
    """Nothing is computed, so a tokenizer whose weights are not at hand will do."""
    if hasattr(module.tokenizer, "loaded"):
        module.tokenizer.loaded = True
    return module


def is_cached(config: dict[str, Any]) -> bool:
    """Whether a recipe trains on what its tokenizer made beforehand."""
    return "images" in (config["data"].get("init_args") or {})


def count_activations(config: dict[str, Any]) -> Activations:
    """With fake tensors, which have shapes and types but no memory, and which autocast treats as it does real ones.

    Per image: the difference of two batches.
    """
    precision = config["trainer"].get("precision", "32-true")
    with FakeTensorMode():
        module = _without_files(instantiate(config["model"], "model").train())
        batches = [module.blank_batch(size, "cpu", cached=is_cached(config)) for size in COUNTED_BATCHES]
        fewer, more = (_kept_bytes(module, batch, precision) for batch in batches)
    eager, matmuls = (b - a for a, b in zip(fewer, more, strict=True))
    copies = max(0, fewer[0] - COUNTED_BATCHES[0] * eager)
    return Activations(eager, min(eager, COMPILED_KEEPS * matmuls), copies)


def _kept_bytes(module: GenerativeModule, batch: dict[str, Tensor], precision: str) -> tuple[int, int]:
    """What one forward pass of a batch keeps: all that autograd saves, and tensors of matmuls alone."""
    saved, matmuls = (Storages([*module.parameters(), *module.buffers()]) for _ in range(2))
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor)
    autocast = torch.autocast("cpu", AUTOCAST.get(precision), enabled=precision in AUTOCAST)
    random.seed(MASKING_SEED)
    with hooks, MatmulTensors(matmuls), autocast:
        module.training_loss(batch)
    return saved.nbytes(), matmuls.nbytes()


def training_flops(module: GenerativeModule, *, cached: bool = False) -> tuple[float, float]:
    """FLOPs per image of the loss, and of a training step: three forwards, but one of a frozen tokenizer."""
    batch = module.blank_batch(2, "meta", cached=cached)
    random.seed(MASKING_SEED)
    with torch.no_grad():
        forward = count_flops(lambda: module.training_loss(batch)) / 2
        frozen = count_flops(lambda: module.tokenizer(batch)) / 2 if module.tokenizer.frozen else 0.0
    return forward, 3 * (forward - frozen) + frozen


def sampling_flops(module: GenerativeModule) -> int:
    """FLOPs of one image by the module's sampler and its settings; of an autoencoder, there and back.

    A network that is called again with the same shapes is not run again, its count is added once more: a sampler runs
    hundreds of times what takes a second even without arithmetic.
    """
    repeated = 0

    def counted_once(forward: Callable[..., Any]) -> Callable[..., Any]:
        seen: dict[str, tuple[Any, int]] = {}

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal repeated
            key = repr(tree_map(_signature, (args, kwargs)))
            if key in seen:
                repeated += seen[key][1]
                return seen[key][0]
            before = repeated
            with FlopCounterMode(display=False) as counter:
                out = forward(*args, **kwargs)
            seen[key] = (out, counter.get_total_flops() + repeated - before)
            return out

        return call

    def counted_at_both_ends(step: Callable[..., Any], last: int, skip: Callable[..., Any]) -> Callable[..., Any]:
        """A causal network's step for tokens 0..last: what it costs grows linearly with the token's number. `skip` does
        to the step's arguments what is left to do where it is not run."""
        ends: list[int] = []
        out, index = None, -1

        def call(*args: Any) -> Any:
            nonlocal repeated, out, index
            index += 1
            if index not in (0, last):
                skip(*args)
                return out
            with FlopCounterMode(display=False) as counter:
                out = step(*args)
            ends.append(counter.get_total_flops())
            if index == last > 0:
                repeated += (last - 1) * sum(ends) // 2
            return out

        return call

    parts = [(part, "forward") for part in module.compiled_modules()]
    parts += [(module.head, "sample")] if hasattr(module, "head") else []  # all of a token's steps
    for part, name in parts:
        setattr(part, name, counted_once(getattr(part, name)))
    net = getattr(module, "net", None)
    for name, skip in STEPS.items():
        if hasattr(net, name):
            setattr(net, name, counted_at_both_ends(getattr(net, name), module.tokenizer.seq_len - 2, skip))
            parts.append((net, name))

    def draw() -> None:
        if not hasattr(module, "reconstruct"):
            module.sample([0])
            return
        batch = module.blank_batch(1, "meta")
        module.reconstruct(module.packed(batch) if hasattr(module, "packed") else batch["image"])

    try:
        return count_flops(draw) + repeated
    finally:
        for part, name in parts:
            delattr(part, name)  # the class's own again


def _signature(value: Any) -> Any:
    """What a result on the meta device depends on: not on numbers such as a guidance scale."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    return float if isinstance(value, float) else value
