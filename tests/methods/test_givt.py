"""GIVT against the official code: golden cases are discovered, sizes and options are read from each case.

Here: trunk, loss, gradients, files, adapter, optimiser steps, manifest. Elsewhere: mixtures in layers/heads/
test_gmm_golden.py, samplers in test_givt_sampling.py, the VAE in test_givt_vae.py, UViM in test_uvim.py, and what needs
no golden file in test_givt_variants.py. Tolerances are those of the golden README.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.load import load_module
from layers.checkpoint import Rule, to_ours
from layers.flax_layout import unstack
from layers.flows.adapter import AdapterConfig, FlowAdapter, adapter_rules
from layers.networks.givt import GIVTConfig, unrolled
from layers.samplers.maskgit import mask_weights
from layers.tokenizers.base import Tokenizer, Tokens
from lightning_modules.givt import GIVTModule, GIVTObjective, HeadConfig
from lightning_modules.optim import OptimConfig, adamw, learning_rate, param_groups
from tests.golden_cases import Golden, case_id, golden_files, golden_paths, read_json

# Overrides that shrink any GIVT recipe; tests/smoke.py and the contract tests run every recipe with them.
TINY = {
    "data.class_path": "datamodules.synthetic.SyntheticData",
    "data.init_args.image_size": 16,
    "data.init_args.num_classes": 10,
    "model.init_args.num_classes": 10,
    "model.init_args.tokenizer.class_path": "layers.tokenizers.dequantised.DequantisedTokenizer",
    "model.init_args.tokenizer.init_args.image_size": 16,
    "model.init_args.tokenizer.init_args.patch_size": 4,
    "model.init_args.net.width": 32,
    "model.init_args.net.depth": 2,
    "model.init_args.net.num_heads": 2,
    "model.init_args.net.mlp_hidden": 64,
    "model.init_args.net.dropout": 0.0,
    "model.init_args.head.num_mixtures": 4,
    "model.init_args.adapter.bottleneck": 96,  # a multiple of the groups of 48 numbers' norms
    "model.init_args.sampling.num_iter": 4,
}

# The adapter of the large recipes, in two blocks; a recipe of vectors keeps its data and its tokenizer.
TINY_OF = {name: {"model.init_args.adapter.num_blocks": 2} for name in ("givt_l", "givt_l_512")} | {
    "givt_synthetic": {
        "data.class_path": "datamodules.synthetic.MixtureData",
        "data.init_args.image_size": 4,
        "model.init_args.tokenizer.class_path": "layers.tokenizers.vectors.VectorTokenizer",
        "model.init_args.tokenizer.init_args.image_size": 4,
        "model.init_args.tokenizer.init_args.token_dim": 2,
    },
}

METHOD = "givt"
# manifest.json's configurations and our recipes
RECIPES = {
    "causal_base_256": "givt_base",
    "causal_default_256": "givt",
    "causal_large_256_adapter": "givt_l",
    "causal_large_512_adapter": "givt_l_512",
    "maskgit_default_256": "givt_maskgit",
    "maskgit_default_512": "givt_maskgit_512",
}
# kinds of file by name; the ends keep "causal" from taking what is another kind
CAUSAL, MASKED = r"causal(?!_(grads|params|sample|adapter)).*", r"maskgit_(?!decode).*"
HERE = [
    CAUSAL,
    MASKED,
    "causal_grads.*",
    "causal_params_.*",
    "causal_adapter_train.*",
    "adapter_.*",
    "optim.*",
    "manifest",
]
SAMPLERS = [
    "causal_sample.*",
    "beam_.*",
    "maskgit_decode_.*",
    "mask_schedule.*",
]  # test_givt_sampling.py, test_maskgit.py
ELSEWHERE = [*SAMPLERS, "gmm.*", "dbcfg.*", "cnnvae_.*", "vae_ckpt_format.*", "uvim_.*", "index"]


class Vectors(Tokenizer):
    """A grid of vectors that are tokens already: golden sequences need not be square."""

    def __init__(self, grid: tuple[int, int], token_dim: int) -> None:
        super().__init__()
        self.grid, self.token_dim, self.image_size = grid, token_dim, grid[0]

    def init_args(self) -> dict[str, Any]:
        return {"grid": self.grid, "token_dim": self.token_dim}


def golden(kind: str, suffix: str = "safetensors"):
    """Parametrise over the files whose names are of this kind: kinds that are absent are simply not collected."""
    paths = [p for p in golden_paths(METHOD, f"**/*.{suffix}") if re.fullmatch(kind, p.stem)]
    return pytest.mark.parametrize("path", paths, ids=case_id)


def module_from(model: dict[str, Any], adapter: dict[str, Any] | None = None) -> GIVTModule:
    """The module of an official configuration; a field that is absent has the official default."""
    net = GIVTConfig(
        width=model["emb_dim"],
        depth=model["num_decoder_layers"],
        num_heads=model["num_heads"],
        mlp_hidden=model["mlp_dim"],
        dropout=model.get("dec_dropout_rate", 0.0),
        attention={"ar": "causal", "masked": "bidirectional"}[model.get("style", "ar")],
        mask_style=model.get("mask_style", "concat"),
    )
    flow = AdapterConfig(adapter["num_blocks"], adapter["num_channels_bottleneck"]) if adapter else AdapterConfig()
    grid = grid_of(model, adapter) if adapter else (1, model["seq_len"])
    objective = GIVTObjective(label_drop_prob=model.get("drop_labels_probability", 0.0))
    return GIVTModule(Vectors(grid, model["out_dim"]), model["num_labels"], net, head_of(model), flow, objective)


def grid_of(model: dict[str, Any], adapter: dict[str, Any]) -> tuple[int, int]:
    """What the case states, or the tokens of a square image."""
    if "grid_hw" in model:
        return tuple(model["grid_hw"])
    p, q = adapter.get("pixel_shuffle_patch_size", [1, 1])
    side = round((model["seq_len"] * p * q) ** 0.5)
    return side // p, side // q


def head_of(model: dict[str, Any]) -> HeadConfig:
    kind = "full" if model.get("multivariate") else "diagonal"
    return HeadConfig(
        num_mixtures=model["num_mixtures"],
        kind="per_channel" if model.get("per_channel_mixtures", True) and kind == "diagonal" else kind,
        scale="squareplus" if model.get("fix_square_plus", False) else "squareplus_unfixed",
        scale_min=model.get("scale_tol", 1e-6),
    )


def module_of(path: Path) -> GIVTModule:
    """The module of a golden file, in eval mode, with the parameters that the file holds."""
    config = read_json(path.with_suffix(".json"))
    module = module_from(config, config.get("adaptor"))
    module.load_weights(module.ours_from_official(params(Golden(path, partial=True))), origin=str(path))
    return module.eval()


def params(g: Golden, prefix: str = "params/") -> dict[str, Tensor]:
    return {name.removeprefix(prefix): g[name] for name in g.names() if name.startswith(prefix)}


def close(actual: Tensor, expected: Tensor, *, a: float = 2e-5, r: float = 1e-4) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=a, rtol=r)


def check_gradients(module: GIVTModule, expected: dict[str, Tensor], *, a: float = 1e-5, r: float = 1e-3) -> None:
    grads = module.official_state_dict({name: p.grad for name, p in module.named_parameters()})
    for name, tensor in unrolled(expected).items():
        close(grads[name], tensor, a=a, r=r)


def checked(g: Golden, name: str, actual: Tensor) -> None:
    """Compared where the case has it."""
    if name in g:
        close(actual, g[name])


# Causal


@golden(CAUSAL)
@torch.no_grad()
def test_golden_causal(path):
    module = module_of(path)
    with Golden(path) as g:
        assert params(g)
        z, labels = g["z"], g["labels"].long()
        nobody = torch.full_like(labels, module.net.null_label or 0)
        h, seen = hooked(module, lambda: module.net(z, labels))
        close(module.head.linear(h), g["logits"])
        check_distribution(g, module, h, z)
        close(module.causal_loss(Tokens(z), labels, {})["loss"], g["loss"][0])
        if "drop_mask" in g:
            dropped = torch.where(g["drop_mask"].bool(), nobody, labels)
            close(module.head.linear(module.net(z, dropped)), g["logits_drop"])
        checked(g, "logits_uncond", module.head.linear(module.net(z, nobody)))
        for name in (n for n in g.names() if n.startswith("act/")):
            close(seen[name.removeprefix("act/")], g[name])
        features = module.net.representations(z, labels)
        for name in (n for n in g.names() if n.startswith("reps/")):
            close(features[name.removeprefix("reps/")], g[name])
        check_cached(g, module, z, labels, nobody)


def check_distribution(g: Golden, module: GIVTModule, h: Tensor, z: Tensor) -> None:
    mixture = module.head.distribution(h)
    if "pdf/mix_logits_norm" in g:
        close(mixture.logits.log_softmax(-1), g["pdf/mix_logits_norm"])
    for ours, name in {"loc": "loc", "scale": "scale", "scale_tril": "scale_tri"}.items():
        if f"pdf/{name}" in g:
            close(getattr(mixture, ours), g[f"pdf/{name}"])
    close(mixture.log_prob(z), g["logprob"])


def hooked(module: GIVTModule, call) -> tuple[Tensor, dict[str, Tensor]]:
    """The call's result, and the values inside that the golden file may name."""
    seen, net = {}, module.net
    named: dict[str, torch.nn.Module] = {"final_norm": net.norm}
    for i, block in enumerate(net.blocks):
        parts = {"LayerNorm1": block.norm1, "SelfAttn": block.attn.proj, "LayerNorm3": block.norm3, "MLP": block.mlp}
        named |= {f"block{i}_{name}": part for name, part in (parts | {"out": block}).items()}

    def keep(name):
        return lambda _, __, output: seen.__setitem__(name, output)

    handles = [target.register_forward_hook(keep(name)) for name, target in named.items()]
    first = net.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.update(after_posemb=inputs[0]))
    try:
        return call(), seen
    finally:
        for handle in [*handles, first]:
            handle.remove()


def check_cached(g: Golden, module: GIVTModule, z: Tensor, labels: Tensor, nobody: Tensor) -> None:
    """One token at a time, each the recorded one; and what then lies in the cache."""
    for name, rows in (("logits_cached_uncond", nobody), ("logits_cached", labels)):
        cache = module.net.init_cache(len(z), dtype=torch.float32, device="cpu")
        h = [module.net.prefill(rows, cache)]
        h += [module.net.step(z[:, i], i, cache) for i in range(z.shape[1] - 1)]
        checked(g, name, module.head.linear(torch.stack(h, dim=1)))
    recorded = unstack(params(g, "cache_after_last_token/"), "decoder/EncDecBlock", "decoder/EncDecBlock{}", axis=0)
    for name, tensor in recorded.items():
        if name.endswith("cache_index"):
            assert tensor.long() == cache.own.filled
        else:
            layer, part = re.fullmatch(r"decoder/EncDecBlock(\d+)/SelfAttn/cached_(key|value)", name).groups()
            close(cache.own.store[int(layer), ["key", "value"].index(part)].transpose(1, 2), tensor)


@golden("causal_grads.*")
def test_golden_gradients(path):
    source = path.with_name(f"{read_json(path.with_suffix('.json'))['of']}.safetensors")
    module = module_of(source)
    with Golden(path) as g:
        loss = module.causal_loss(Tokens(g["z"]), g["labels"].long(), {})["loss"]
        close(loss, g["loss"][0])
        loss.backward()
        expected = params(g, "grads/")
        assert set(unrolled(expected)) == set(module.official_state_dict())
        check_gradients(module, expected)


@golden("causal_params_.*", "npz")
def test_golden_checkpoint_file(path):
    """Stacked or not, below params/ or not: the file is the case's parameters, and goes back to their names."""
    module = module_of(path.with_name(f"{path.stem.split('_params_')[0]}.safetensors"))
    expected = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for p in module.parameters():
        torch.nn.init.normal_(p)
    module.load_official(path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in module.state_dict().items())


@golden(f"{CAUSAL}|{MASKED}|causal_adapter_train.*")
def test_golden_parameters_go_back_unchanged(path):
    official, ours = unrolled(params(Golden(path, partial=True))), module_of(path).official_state_dict()
    assert set(ours) == set(official)
    assert all(torch.equal(ours[name], tensor) for name, tensor in official.items())


# Masked


@golden(MASKED)
def test_golden_masked(path):
    module, config = module_of(path), read_json(path.with_suffix(".json"))
    assert special_rows(module) == config.get("special_label_rows", special_rows(module))
    with Golden(path) as g:
        assert params(g)
        z, labels, mask = g["z"], g["labels"].long(), g["input_mask"].bool()

        def logits(labels: Tensor, mask: Tensor) -> Tensor:
            with torch.no_grad():
                return module.head.linear(module.net(z, labels, mask))

        close(logits(labels, mask), g["logits"])
        checked(g, "logits_all_masked", logits(labels, torch.ones_like(mask)))
        checked(g, "logits_none_masked", logits(labels, torch.zeros_like(mask)))
        if "drop_mask" in g:
            dropped = torch.where(g["drop_mask"].bool(), module.net.null_label, labels)
            close(logits(dropped, mask), g["logits_drop"])
        with torch.no_grad():
            close(-module.head.distribution(module.net(z, labels, mask)).log_prob(z), g["nll"])
        loss = module.masked_loss(z, labels, mask_weights(mask))["loss"]
        close(loss, g["loss"][0])
        loss.backward()
        check_gradients(module, params(g, "grads/"))


def special_rows(module: GIVTModule) -> dict[str, int]:
    rows = {name: module.num_classes + i for i, name in enumerate(module.net.config.special_rows)}
    return rows if module.net.null_label is None else rows | {"nolabel": module.net.null_label}


# Adapter


@golden("adapter_.*")
@torch.no_grad()
def test_golden_adapter(path):
    config = read_json(path.with_suffix(".json"))
    sizes = AdapterConfig(config["num_blocks"], config["num_channels_bottleneck"])
    adapter = FlowAdapter(sizes, config["num_channels"], tuple(config["grid_hw"]))
    with Golden(path) as g:
        ours = to_ours({f"params_adaptor/{name}": t for name, t in params(g).items()}, adapter_rules())
        adapter.load_state_dict({name.removeprefix("adapter."): t for name, t in ours.items()})
        y, logdet = adapter(g["x"])
        close(y, g["y"])
        close(adapter.inverse(g["y2"]), g["x2_inverse"])
        close(adapter.inverse(y), g["x"])
        close(logdet, g["logabsdet"].expand(len(logdet)), a=1e-4)  # of the numerical Jacobian there


@golden("causal_adapter_train.*")
def test_golden_training_with_adapter(path):
    module = module_of(path)
    with Golden(path) as g:
        assert params(g)
        close(module.adapter(g["vae_latent"])[0], g["adapted"])
        loss = module.causal_loss(Tokens(g["vae_latent"]), g["labels"].long(), {})["loss"]
        close(loss, g["loss"][0], a=1e-5)
        loss.backward()
        expected = params(g, "grads/")
        assert set(unrolled(expected)) == set(module.official_state_dict())
        check_gradients(module, expected, a=1e-5, r=2e-3)


# Optimiser


def adam_cases():
    cases = [
        pytest.param(path, name, id=f"{case_id(path)}-{name}")
        for path in golden_paths(METHOD, "**/optim*.safetensors")
        for name, config in read_json(path.with_suffix(".json")).items()
        if config["optax_name"].endswith("scale_by_adam")
    ]
    return pytest.mark.parametrize(("path", "name"), cases)


@adam_cases()
def test_golden_optimizer_steps(path, name):
    """AdamW with decay over learning rate, kernels only, is the official one; Adafactor is in test_adafactor.py."""
    config, g = read_json(path.with_suffix(".json"))[name], Golden(path, partial=True)
    unread = {key for key in g.names() if key.startswith(f"{name}/")} - {f"{name}/schedule"}
    schedule = official_schedule(config["schedule"], config["total_steps"])
    close(torch.tensor(schedule), g[f"{name}/schedule"], a=1e-6, r=1e-6)
    state = {key: torch.nn.Parameter(tensor.clone()) for key, tensor in params(g, "params0/").items()}
    optimizer = official_adam(state, config)
    for step in range(len({key.split("/")[0] for key in g.names() if key.startswith("grads_step")})):
        for key, grad in params(g, f"grads_step{step}/").items():
            state[key].grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(state.values(), config["grad_clip_norm"])
        for group in optimizer.param_groups:
            group["lr"] = schedule[step] * config["lr"]
        optimizer.step()
        for key, expected in params(g, f"{name}/params_after_{step + 1}/").items():
            close(state[key].detach(), expected, a=1e-6, r=1e-6)
            unread.remove(f"{name}/params_after_{step + 1}/{key}")
    assert unread == set()


@golden("optim.*")
def test_golden_optimizer_file_holds_nothing_else(path):
    """What lies below a run's name is checked to be read where the run is."""
    known = (*(f"{run}/" for run in read_json(path.with_suffix(".json"))), "params0/", "grads_step")
    assert [name for name in Golden(path, partial=True).names() if not name.startswith(known)] == []


def official_schedule(config: dict[str, Any], total: int) -> list[float]:
    """The factor of each step."""
    warmup = config["warmup_steps"] if "warmup_steps" in config else config["warmup_percent"] * total
    shape = {"warmup": warmup, "total": total, "schedule": config["decay_type"]}
    return [learning_rate(step, peak=1.0, **shape) for step in range(total)]


def official_adam(state: dict[str, torch.nn.Parameter], config: dict[str, Any]) -> torch.optim.Optimizer:
    """Our optimiser for parameters under official names, by the rules that our names of them meet."""
    sizes = {"emb_dim": 4, "num_decoder_layers": 1, "num_heads": 1, "mlp_dim": 4, "seq_len": 1, "out_dim": 2}
    module = module_from(sizes | {"num_labels": 1, "num_mixtures": 1})
    names = [Rule(official, rule.ours) for rule in module.official_rules() for official in alternatives(rule)]
    named = [(next(iter(to_ours({key: p}, names))), p) for key, p in state.items()]
    optim = OptimConfig(lr=config["lr"], betas=(0.9, config["optax"]["b2"]), weight_decay=config["wd"] / config["lr"])
    groups = param_groups(named, optim.weight_decay, no_weight_decay=module.no_weight_decay)
    return adamw(groups, optim, optim.lr)


def alternatives(rule: Rule) -> tuple[str, ...]:
    return (rule.official,) if isinstance(rule.official, str) else rule.official


def test_only_official_kernels_decay():
    """wd_mults of the official configuration: (".*/kernel$", 1.0), (".*", 0.0)."""
    sizes = {"emb_dim": 16, "num_decoder_layers": 2, "num_heads": 2, "mlp_dim": 8, "seq_len": 4, "out_dim": 8}
    adapter = {"num_blocks": 2, "num_channels_bottleneck": 16}
    module = module_from(sizes | {"num_labels": 3, "num_mixtures": 2, "drop_labels_probability": 0.1}, adapter)
    groups = param_groups(module.named_parameters(), 0.1, no_weight_decay=module.no_weight_decay)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    state = {name: torch.full_like(p, id(p) in decayed) for name, p in module.named_parameters()}
    for name, tensor in module.official_state_dict(state).items():
        assert bool(tensor.all()) == bool(tensor.any()) == name.endswith("/kernel"), name


# Manifest


def manifest_cases():
    """Configurations of GIVT in the manifests; those of UViM have no labels, those of the VAEs no tokens."""
    cases = [
        pytest.param(name, entry, id=f"{case_id(path)}-{name}")
        for path in golden_paths(METHOD, "**/manifest.json")
        for name, entry in read_json(path).items()
        if entry["model"].get("num_labels") and entry["params"]
    ]
    return pytest.mark.parametrize(("name", "entry"), cases)


@manifest_cases()
def test_golden_manifest(name, entry):
    expected = {key: torch.empty(shape, device="meta") for key, shape in entry["params"].items()}
    shapes = {key: tensor.shape for key, tensor in unrolled(expected).items()}
    with torch.device("meta"):
        modules = [module_from(entry["model"], entry["adaptor"])]
        modules += [load_module(RECIPES[name])] if name in RECIPES else []
    for module in modules:
        assert {key: tensor.shape for key, tensor in module.official_state_dict().items()} == shapes
        trained = sum(
            p.numel() for part in (module.net, module.head, module.adapter) if part for p in part.parameters()
        )
        assert trained == entry["num_params_total"]
    for module in modules[1:]:
        model, objective = entry["model"], module.objective
        assert module.net.config.dropout == model["dec_dropout_rate"]
        assert objective.label_drop_prob == model["drop_labels_probability"]
        assert objective.mask_rate_min == model["min_masking_rate_training"]
        assert module.tokenizer.seq_len == model["seq_len"] and module.tokenizer.token_dim == model["out_dim"]


def test_golden_no_file_is_left_over():
    """Every file of the golden folder belongs to a kind that a test reads."""
    pattern = re.compile(rf"({'|'.join([*HERE, *ELSEWHERE])})\.(safetensors|json|npz|msgpack)")
    assert [case_id(path) for path in golden_files(METHOD) if not pattern.fullmatch(path.name)] == []
