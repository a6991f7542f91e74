"""Jet against the official code: golden cases are discovered, sizes and options are read from each case.

Here: flow, gradients, likelihood, images from latents, manifest, initial statistics, and the module around it. What a
coupling computes without golden values: layers/flows/test_jet.py. Tolerances are those of the golden README.
"""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from einops import rearrange
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from experiments.load import load_module
from layers.checkpoint import to_ours
from layers.flows.jet import Jet, JetConfig, jet_rules, unrolled
from layers.likelihood import bits_per_dim
from layers.patch import patchify, unpatchify
from layers.tokenizers.dequantised import DequantisedTokenizer
from layers.tokenizers.pixels import PixelTokenizer
from layers.tokenizers.vectors import VectorTokenizer
from lightning_modules.jet import JetModule, JetSampling
from lightning_modules.optim import param_groups
from lightning_modules.sharding import prepare_strategy
from tests.golden_cases import Golden, case_id, golden_paths, read_json

# Overrides that shrink any Jet recipe; tests/smoke.py and the contract tests run every recipe with them.
TINY = {
    "data.class_path": "datamodules.synthetic.SyntheticData",
    "data.init_args.image_size": 8,
    "data.init_args.num_classes": 10,
    "model.init_args.num_classes": 10,
    "model.init_args.tokenizer.init_args.image_size": 8,
    "model.init_args.tokenizer.init_args.patch_size": 4,
    "model.init_args.net.depth": 10,
    "model.init_args.net.block_depth": 1,
    "model.init_args.net.width": 32,
    "model.init_args.net.num_heads": 2,
}

METHOD = "jetformer"
FLOW = "params_adaptor/"  # where JetFormer's files hold the flow
OFFICIAL_KINDS = ["channels", "channels", "spatial"]  # defaults of the stand-alone model
OFFICIAL_SPATIAL = ["checkerboard", "checkerboard-inv"]


def golden(pattern: str):
    """Parametrise over the files of this kind: kinds that are absent are simply not collected."""
    return pytest.mark.parametrize("path", golden_paths(METHOD, f"**/{pattern}.safetensors"), ids=case_id)


def config_of(flow: dict[str, Any], *, alone: bool) -> JetConfig:
    """Our sizes of an official configuration; JetFormer's own has channel couplings only."""
    return JetConfig(
        depth=flow["depth"],
        block_depth=flow["block_depth"],
        width=flow["emb_dim"],
        num_heads=flow["num_heads"],
        kinds=list(flow.get("kinds", OFFICIAL_KINDS if alone else ["channels"])),
        spatial=list(flow.get("scp", flow.get("spatial_coupling_projs", OFFICIAL_SPATIAL))),
        scale_factor=flow.get("scale_factor", 2.0),
    )


def params(g: Golden, prefix: str = "param/") -> dict[str, Tensor]:
    return {name.removeprefix(prefix): g[name] for name in g.names() if name.startswith(prefix)}


def close(actual: Tensor, expected: Tensor, *, a: float = 2e-5, r: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=a, rtol=r)


# Flow


class Case:
    """A flow's golden file: the module with its parameters, on tokens, and images as tokens."""

    def __init__(self, path: Path, *, backward: str = "plain") -> None:
        flow = read_json(path.with_suffix(".json"))
        self.g, self.patch = Golden(path), flow["ps"]
        height, width, channels = self.g["in/x"].shape[1:]
        assert height == width, "official code unpatchifies squares only"
        config = config_of(flow, alone=True)
        config.backward = backward
        tokens = VectorTokenizer(height // self.patch, channels * self.patch**2)
        self.module = JetModule(tokens, net=config)
        state = self.module.ours_from_official(params(Golden(path, partial=True)))
        self.module.load_weights(state, origin=str(path))

    def __getitem__(self, name: str) -> Tensor:
        """An array; images (.., H, W, C) as tokens (.., N, C)."""
        return self.tokens(self.g[name])

    def tokens(self, x: Tensor) -> Tensor:
        sizes = {"p": self.patch, "q": self.patch}
        return x if x.ndim < 4 else rearrange(x, "... (h p) (w q) c -> ... (h w) (p q c)", **sizes)


@golden("flow_*")
@torch.no_grad()
def test_golden_flow(path):
    """Forward, every coupling, inverse, likelihood, and the parameters back; gradients are below."""
    case = Case(path)
    with case.g as g:
        net, x = case.module.net, case["in/x"]
        z, logdet = net(x)
        close(z, case["out/z"])
        close(logdet, g["out/logdet"], a=1e-6, r=2e-6)
        for coupling, expected in zip(net.couplings, case["out/z_after_coupling"], strict=True):
            x, _ = coupling(x)
            close(x, expected)
        check_inverse(case, z)
        if "out/bits_per_dim_standard_normal_prior" in g:
            dims = case["in/x"][0].numel()
            scaled = torch.full((len(x),), -dims * math.log(127.5))  # from levels to [-1, 1]
            bits = bits_per_dim(-case.module.nats(case["in/x"]), scaled, dims)
            close(bits.float(), g["out/bits_per_dim_standard_normal_prior"], a=2e-6, r=0)
        state, expected = case.module.official_state_dict(), params(g)
        assert set(state) == set(expected) and all(torch.equal(state[name], expected[name]) for name in expected)
        check_gradients(path, g)


def check_inverse(case: Case, z: Tensor) -> None:
    net, g = case.module.net, case.g
    back, minus = net.inverse(z)
    close(back, case["out/x_roundtrip"])
    close(back, case["in/x"])
    close(minus, g["out/logdet_inverse"], a=1e-6, r=2e-6)
    x, logdet = net.inverse(case["in/z_sample"])
    close(x, case["out/x_from_z_sample"])
    close(logdet, g["out/logdet_from_z_sample"], a=1e-6, r=2e-6)


@torch.enable_grad()
def check_gradients(path: Path, g: Golden) -> None:
    """By each of the backward passes: 1e-4 of a tensor's largest; keys' biases have none in truth."""
    expected = params(g, "grad/param/")
    for backward in ("plain", "recompute", "reversible"):
        case = Case(path, backward=backward)
        x = case["in/x"].clone().requires_grad_()
        z, logdet = case.module.net(x)
        ((z * case.tokens(g["in/cotangent_z"])).sum() + (logdet * g["in/cotangent_logdet"]).sum()).backward()
        grads = case.module.official_state_dict({name: p.grad for name, p in case.module.named_parameters()})
        assert set(grads) == set(expected)
        within(x.grad, case.tokens(g["grad/x"]), "x")
        for name, tensor in expected.items():
            within(grads[name], tensor, name)


def within(actual: Tensor, expected: Tensor, name: str) -> None:
    allowed = 1e-5 if name.endswith("key/bias") else 1e-4 * expected.abs().max()
    assert (actual - expected).abs().max() <= allowed, name


@golden("flow_*")
def test_golden_permutations_of_tokens_are_those_that_we_make(path):
    """Only the channels' are drawn at random."""
    flow = read_json(path.with_suffix(".json"))
    case = Case(path)
    fresh = Jet(config_of(flow, alone=True), grid=case.module.tokenizer.grid, token_dim=case["in/x"].shape[2])
    for ours, theirs in zip(fresh.couplings, case.module.net.couplings, strict=True):
        assert type(ours) is type(theirs)
        if hasattr(ours, "token_order"):
            assert torch.equal(ours.token_order, theirs.token_order)


# Images from latents


@golden("decode_images_*")
@torch.no_grad()
def test_golden_images_from_latents(path):
    source, prefix = re.fullmatch(r"(\S+) param/(\S*)\*", read_json(path.with_suffix(".json"))["flow_params"]).groups()
    config = read_json(path.with_name(source).with_suffix(".json"))
    with Golden(path) as g:
        size, patch = g["out/images"].shape[1], config["patch"]
        flow = flow_of(config["flow"], path.with_name(source), prefix, size // patch, g["in/latents"].shape[2])
        for name in ("", "_random"):
            tokens, _ = flow.inverse(g[f"in/latents{name}"])
            images = unpatchify(tokens, patch, (size // patch, size // patch)).clamp(-1, 1)
            close(images, rearrange(g[f"out/images{name}"], "b h w c -> b c h w"))


def flow_of(flow: dict[str, Any], source: Path, prefix: str, side: int, token_dim: int) -> Jet:
    """The flow within another model's parameters, which lie below `prefix`."""
    jet = Jet(config_of(flow, alone=False), grid=(side, side), token_dim=token_dim)
    state = {n: t for n, t in params(Golden(source, partial=True)).items() if n.startswith(prefix)}
    rules = jet_rules("flow", num_heads=flow["num_heads"], official=prefix)
    ours = to_ours(unrolled(state, prefix), rules)
    jet.load_state_dict({name.removeprefix("flow."): tensor for name, tensor in ours.items()})
    return jet


# Manifest


def manifest_cases(config: str = ""):
    """Entries of all manifests, or those of one official configuration."""
    cases = [
        pytest.param(entry, id=f"{case_id(path)}-{name}")
        for path in golden_paths(METHOD, "**/manifest.json")
        for name, entry in read_json(path).items()
        if config in ("", entry["config"])
    ]
    return pytest.mark.parametrize("entry", cases)


@manifest_cases()
def test_golden_manifest(entry):
    """Names and shapes of the flow, of Jet alone and inside JetFormer, and how many of its parameters are trained."""
    alone = "flow" not in entry
    shapes = {n: tuple(shape) for n, shape in entry["params"].items() if alone or n.startswith(FLOW)}
    masks = {n: shape for n, shape in shapes.items() if "FREEZE_ME" in n}
    module = module_of_shapes(entry["model" if alone else "flow"], shapes, alone=alone)
    state = module.official_state_dict()
    assert {("" if alone else FLOW) + n: tuple(tensor.shape) for n, tensor in state.items()} == shapes
    trained, counts = sum(p.numel() for p in module.net.parameters()), entry["param_counts"]
    frozen = sum(math.prod(shape) for shape in masks.values())
    assert frozen == counts["frozen" if alone else "flow_frozen_masks"]
    assert trained == (counts["total"] - counts["frozen"] if alone else counts["flow_trainable"])


def module_of_shapes(flow: dict[str, Any], shapes: dict[str, tuple[int, ...]], *, alone: bool) -> JetModule:
    """A module without memory whose grid and tokens are those of the masks."""
    tokens, channels = (shapes[next(n for n in shapes if kind in n)][1] for kind in ("spatial_c", "channel_c"))
    with torch.device("meta"):
        return JetModule(VectorTokenizer(math.isqrt(tokens), channels), net=config_of(flow, alone=alone))


@manifest_cases("jet/imagenet64")
def test_golden_manifest_of_our_recipe(entry):
    with torch.device("meta"):
        module = load_module("jet")
    shapes = {n: list(tensor.shape) for n, tensor in module.official_state_dict().items()}
    assert shapes == entry["params"]
    kept = config_of(entry["model"], alone=True)
    kept.backward = "recompute"
    assert module.net.config == kept


# Initial statistics


def init_cases():
    cases = [
        pytest.param(entry, id=f"{case_id(path)}-{name}")
        for path in golden_paths(METHOD, "**/init_stats.json")
        for name, entry in read_json(path).items()
    ]
    return pytest.mark.parametrize("entry", cases)


@init_cases()
@torch.no_grad()
def test_golden_initial_statistics(entry):
    """Deviations within six of their own; extremes of distributions that are bounded within 5 %."""
    side, found = entry["res"] // entry["patch"], 0
    tokenizer = DequantisedTokenizer(entry["res"], entry["patch"])
    module = JetModule(tokenizer, net=config_of(entry["flow"], alone=False))
    assert tokenizer.grid == (side, side)
    for name, tensor in module.official_state_dict().items():
        stats, found = entry["params"][f"{FLOW}{name}"], found + 1
        std, slack = stats["std"], 6 / math.sqrt(2 * tensor.numel())
        assert list(tensor.shape) == stats["shape"]
        assert tensor.std(correction=0).item() == pytest.approx(std, rel=slack, abs=1e-12), name
        assert tensor.mean().item() == pytest.approx(stats["mean"], abs=9 * std / math.sqrt(tensor.numel()) + 1e-7), (
            name
        )
        if tensor.abs().max() < 2.4 * std or stats["max"] < 2.4 * std:
            assert tensor.abs().max().item() == pytest.approx(stats["max"], rel=0.05), name
    assert found == sum(name.startswith(FLOW) for name in entry["params"])


# Module


def tiny(tokenizer=None, **arguments) -> JetModule:
    sizes = {"depth": 3, "block_depth": 1, "width": 16, "num_heads": 2}
    torch.manual_seed(0)
    module = JetModule(tokenizer or DequantisedTokenizer(8, 4), 10, JetConfig(**sizes), **arguments)
    for coupling in module.net.couplings:
        torch.nn.init.normal_(coupling.net.final_proj.weight, std=0.3)
    return module


def batch_of(images: Tensor) -> dict[str, Tensor]:
    return {"image": images, "label": torch.zeros(len(images), dtype=torch.int64)}


def test_loss_of_the_identity_is_that_of_the_pixels_under_a_normal_prior():
    module = JetModule(DequantisedTokenizer(8, 4), 10, JetConfig(depth=2, block_depth=1, width=16, num_heads=2))
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    losses = module.training_loss(batch_of(images), torch.Generator().manual_seed(0))
    middle = (images.double() + 0.5) / 127.5 - 1  # of each level's interval, to which the noise adds its variance
    nats = 0.5 * (middle.square().mean() + 1 / 12 / 127.5**2) + 0.5 * math.log(2 * math.pi) + math.log(127.5)
    assert losses["loss"].item() == pytest.approx(nats.item() / math.log(2), abs=1e-3)
    assert losses["loss"].dtype == torch.float32 and losses["bpd"].item() == pytest.approx(losses["loss"].item())


@torch.no_grad()
def test_density_integrates_to_one():
    """Over the plane of two numbers, by a grid of cells: couplings, prior and volume in one figure."""
    module = tiny(VectorTokenizer(1, 2))
    module.net.couplings[0].net.final_proj.bias.copy_(torch.tensor([0.5, 1.0]))
    axis = torch.linspace(-9, 9, 301)
    points = torch.cartesian_prod(axis, axis)[:, None]  # (301^2, 1, 2)
    density = torch.cat([(-module.nats(part)).exp() for part in points.split(2**16)])
    assert (density.sum() * (axis[1] - axis[0]) ** 2).item() == pytest.approx(1, abs=1e-3)


def test_tokens_without_a_density_are_refused():
    module = tiny(PixelTokenizer(8, 4))
    with pytest.raises(ValueError, match=r"PixelTokenizer has no density: use .*DequantisedTokenizer"):
        module.training_loss(batch_of(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)))


@torch.no_grad()
def test_samples_are_the_inverse_of_tempered_noise():
    module, labels = tiny(), torch.tensor([3, 1])
    noise = torch.randn(2, 4, 48)
    for temperature in (1.0, 0.5, 0.0):
        x = module.sample_tokens(labels, JetSampling(temperature), lambda shape: noise)
        torch.testing.assert_close(module.net(x)[0], temperature * noise, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"sampling.temperature is -1.0"):
        JetSampling(-1.0)


@torch.no_grad()
def test_an_image_survives_the_way_there_and_back():
    module, images = tiny(), torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    tokens = module.tokens(batch_of(images), torch.Generator().manual_seed(0))
    z, _ = module.net(tokens.x)
    back = module.tokenizer.decode(module.net.inverse(z)[0])
    assert torch.equal(((back + 1) * 127.5).round().to(torch.uint8), images)
    torch.testing.assert_close(patchify(back, 4), tokens.x, atol=1 / 127.5, rtol=0)


@torch.no_grad()
def test_weights_cast_once_give_the_same_samples():
    module = tiny().eval()

    def draw() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module.sample([0, 1], generator=torch.Generator().manual_seed(0))

    before = draw()
    module.prepare_sampling()
    assert torch.equal(draw(), before)
    dtypes = {name.rpartition(".")[0]: p.dtype for name, p in module.net.couplings[0].net.named_parameters()}
    assert dtypes["final_proj"] == torch.float32 and dtypes["init_proj"] == torch.bfloat16


def test_permutations_are_no_business_of_optimiser_or_ddp(tmp_path):
    module = tiny()
    names = [name for name, _ in module.named_buffers()]
    assert len(names) == 3
    grouped = param_groups(module.named_parameters(), 0.1, no_weight_decay=module.no_weight_decay)
    count = sum(p.numel() for group in grouped for p in group["params"])
    assert count == sum(p.numel() for p in module.net.parameters())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        prepare_strategy(module, SimpleNamespace(strategy=DDPStrategy(), precision="32-true"))
        parallel = DistributedDataParallel(module)
        assert parallel.parameters_to_ignore == set(names) and not parallel.modules_buffers
    finally:
        torch.distributed.destroy_process_group()


def test_official_file_loads_and_is_written_back(tmp_path):
    """One array for all couplings; another model's file says what differs."""
    first, second = tiny(), tiny()
    for p in second.parameters():
        torch.nn.init.normal_(p)
    for coupling in second.net.couplings:
        coupling.channel_order.copy_(torch.arange(48))
    save_file(first.official_state_dict(), tmp_path / "jet.safetensors")
    second.load_official(tmp_path / "jet.safetensors")
    assert all(torch.equal(second.state_dict()[name], tensor) for name, tensor in first.state_dict().items())
    spatial = JetModule(DequantisedTokenizer(8, 4), 10, JetConfig(3, 1, 16, 2, kinds=["spatial"]))
    with pytest.raises(ValueError, match=r"missing .*token_order.* unknown .*channel_order"):
        spatial.load_official(tmp_path / "jet.safetensors")


def test_a_checkpoint_of_another_kind_of_coupling_is_not_taken_for_it():
    """Where tokens are as many as their numbers, the indices of both kinds look alike."""
    square = VectorTokenizer(2, 4)
    channels, spatial = (JetModule(square, 10, JetConfig(2, 1, 16, 2, kinds=[k])) for k in ("channels", "spatial"))
    with pytest.raises(ValueError, match="channel_order"):
        spatial.load_weights(channels.state_dict(), origin="x")
