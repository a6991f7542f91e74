"""From flax's parameters to ours and back: names with "/", kernels [in, out], attention by heads, layers in one array.

Rules for the modules of big_vision's models (GIVT, UViM, JetFormer): each `*_rules` takes an official prefix and ours,
in which `*` stands for the same text, and lists `Rule`s that work both ways. Pure functions of tensors.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from layers.checkpoint import Rule

State = dict[str, Tensor]


# Layers of one array


def unstack(state: Mapping[str, Tensor], stacked: str, unrolled: str, *, axis: int) -> State:
    """The layers of a scanned module apart: "stacked/rest" [.., depth, ..] -> "unrolled/rest" with the number for `{}`.

    unstack(s, "decoder/Block", "decoder/Block{}", axis=1) makes decoder/Block0/MLP/kernel [in, out] and so on of
    decoder/Block/MLP/kernel [in, depth, out]. Other names stay, so a state that is unrolled already is not changed.
    """
    result: State = {}
    for name, tensor in state.items():
        if not name.startswith(f"{stacked}/"):
            result[name] = tensor
            continue
        rest = name.removeprefix(stacked)
        result |= {unrolled.format(i) + rest: layer for i, layer in enumerate(tensor.unbind(axis))}
    return result


def stack(state: Mapping[str, Tensor], stacked: str, unrolled: str, *, axis: int) -> State:
    """The inverse of `unstack`, layers in the order of their numbers."""
    pattern = re.compile(re.escape(unrolled).replace(r"\{\}", r"(\d+)") + "(/.*)")
    result: State = {}
    layers: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        if match := pattern.fullmatch(name):
            layers.setdefault(stacked + match.group(2), {})[int(match.group(1))] = tensor
        else:
            result[name] = tensor
    return result | {name: torch.stack([parts[i] for i in sorted(parts)], dim=axis) for name, parts in layers.items()}


# Modules


def linear_rules(official: str, ours: str) -> list[Rule]:
    """A Dense layer: kernel [in, out] -> weight (out, in); bias."""
    kernel = Rule(f"{official}/kernel", f"{ours}.weight", lambda w: w.T.contiguous(), lambda w: w.T.contiguous())
    return [kernel, Rule(f"{official}/bias", f"{ours}.bias")]


def conv_rules(official: str, ours: str) -> list[Rule]:
    """A Conv layer: kernel [h, w, in, out] -> weight (out, in, h, w); bias."""
    forth, back = (lambda w: w.permute(3, 2, 0, 1).contiguous()), (lambda w: w.permute(2, 3, 1, 0).contiguous())
    return [Rule(f"{official}/kernel", f"{ours}.weight", forth, back), Rule(f"{official}/bias", f"{ours}.bias")]


def norm_rules(official: str, ours: str) -> list[Rule]:
    """A LayerNorm or GroupNorm: scale -> weight; bias."""
    return [Rule(f"{official}/scale", f"{ours}.weight"), Rule(f"{official}/bias", f"{ours}.bias")]


def heads_in_rules(official: str, ours: str, names: tuple[str, ...], *, num_heads: int) -> list[Rule]:
    """Projections to heads, `names` of them as one linear map: official/name/kernel [E, N, d] each -> ours.weight.

    ("query", "key", "value") fuses self-attention; ("query",) and ("key", "value") serve attention to a memory, and
    also multi-query attention, whose keys and values have one head (num_heads=1). Biases [N, d] likewise. Applying
    them raises ValueError for kernels of another number of heads, which once flattened nobody could tell.
    """

    def kernels(*parts: Tensor) -> Tensor:
        found = parts[0].shape[1]
        if found != num_heads:
            raise ValueError(
                f"the checkpoint's attention has {found} heads, this model {num_heads}: set "
                f"--model.init_args.net.num_heads"
            )
        return torch.cat([kernel.flatten(1).T for kernel in parts])

    def kernels_back(weight: Tensor) -> list[Tensor]:
        return [part.T.unflatten(1, (num_heads, -1)).contiguous() for part in weight.chunk(len(names))]

    def biases(*parts: Tensor) -> Tensor:
        return torch.cat([bias.flatten() for bias in parts])

    def biases_back(bias: Tensor) -> list[Tensor]:
        return [part.unflatten(0, (num_heads, -1)).contiguous() for part in bias.chunk(len(names))]

    return [
        Rule(tuple(f"{official}/{name}/kernel" for name in names), f"{ours}.weight", kernels, kernels_back),
        Rule(tuple(f"{official}/{name}/bias" for name in names), f"{ours}.bias", biases, biases_back),
    ]


def heads_out_rules(official: str, ours: str, *, num_heads: int) -> list[Rule]:
    """The projection from heads: kernel [N, d, E] -> weight (E, N d); bias."""

    def back(weight: Tensor) -> Tensor:
        return weight.T.unflatten(0, (num_heads, -1)).contiguous()

    forth = Rule(f"{official}/kernel", f"{ours}.weight", lambda w: w.flatten(0, 1).T.contiguous(), back)
    return [forth, Rule(f"{official}/bias", f"{ours}.bias")]


def self_attention_rules(official: str, ours: str, *, num_heads: int) -> list[Rule]:
    """Attention with query, key, value fused into ours.qkv, and out as ours.proj; biases where there are any."""
    fused = heads_in_rules(official, f"{ours}.qkv", ("query", "key", "value"), num_heads=num_heads)
    return [*fused, *heads_out_rules(f"{official}/out", f"{ours}.proj", num_heads=num_heads)]


def cross_attention_rules(official: str, ours: str, *, num_heads: int) -> list[Rule]:
    """Attention to a memory with ours.q, ours.kv (key and value fused) and ours.proj."""
    q = heads_in_rules(official, f"{ours}.q", ("query",), num_heads=num_heads)
    kv = heads_in_rules(official, f"{ours}.kv", ("key", "value"), num_heads=num_heads)
    return [*q, *kv, *heads_out_rules(f"{official}/out", f"{ours}.proj", num_heads=num_heads)]
