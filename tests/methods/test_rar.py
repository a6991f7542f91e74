"""RAR against the official code: golden cases are discovered, sizes and options are read from each case.

Here: forward, loss, gradients, optimiser steps, cached decoding, samples, schedules, manifests. Elsewhere: the
tokenizer in layers/tokenizers/test_maskgit_vq.py, and what needs no golden file in test_rar_variants.py. Tolerances are
those of the golden README.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from experiments.load import load_config, load_module
from layers.guidance import power_cosine_scale
from layers.networks.rar import PREFIX, RARCache, RARConfig
from layers.orders import random_ratio
from layers.tokenizers.base import Tokenizer, Tokens
from lightning_modules.optim import OptimConfig, adamw, learning_rate, param_groups
from lightning_modules.rar import RARModule, RARObjective, RARSampling
from tests.golden_cases import Golden, case_id, golden_files, golden_paths, read_json

# Overrides that shrink any RAR recipe; tests/smoke.py and the contract tests run every recipe with them.
TINY = {
    "data.class_path": "datamodules.synthetic.SyntheticData",
    "data.init_args.image_size": 16,
    "data.init_args.num_classes": 10,
    "model.init_args.num_classes": 10,
    # as a whole: keys of one class are checked against the recipe's own
    "model.init_args.tokenizer": {
        "class_path": "layers.tokenizers.levels.LevelsTokenizer",
        "init_args": {"image_size": 16, "patch_size": 4, "levels": 64},
    },
    "model.init_args.net.width": 32,
    "model.init_args.net.depth": 2,
    "model.init_args.net.num_heads": 2,
    "model.init_args.net.mlp_hidden": 64,
    "model.init_args.net.attn_dropout": 0.0,
    "model.init_args.net.proj_dropout": 0.0,
    "model.init_args.objective.anneal_start": 1,
    "model.init_args.objective.anneal_end": 3,
}

METHOD = "rar"
RECIPES = {
    "b": "rar",
    "l": "rar_l",
    "xl": "rar_xl",
    "xxl": "rar_xxl",
}  # manifest_rar_<name>.json, and in schedules.json
DEMO = "demo_constant"  # the demo's guidance in schedules.json, which is no recipe's
# files of a case, and of the tokenizer, which another test reads
KINDS = [r"rar_\w+_(config|weights\w*|io|train)", "schedules", r"manifest_rar_\w+", r"vq_\w+", r"manifest_maskgit_\w+"]


class Ids(Tokenizer):
    """Ids that are tokens already: golden sequences need not be square."""

    def __init__(self, length: int, vocab_size: int) -> None:
        super().__init__()
        self.grid, self.image_size, self.token_dim, self.vocab_size = (1, length), length, 1, vocab_size

    def init_args(self) -> dict[str, Any]:
        return {"length": self.seq_len, "vocab_size": self.vocab_size}

    def encode_raw(self, raw: Tensor, generator=None) -> Tokens:
        return Tokens(raw.long())


def golden(pattern: str):
    """Parametrise over the files that match: kinds that are absent are simply not collected."""
    return pytest.mark.parametrize("path", golden_paths(METHOD, f"**/{pattern}"), ids=case_id)


def recipe_optim() -> OptimConfig:
    return OptimConfig(**load_config("rar")["model"]["init_args"]["optim"])


def case_name(path: Path) -> str:
    """ "rar_tiny" of rar_tiny_io.safetensors."""
    return re.fullmatch(r"(rar_\w+?)_(config|weights\w*|io|train)", path.stem).group(1)


def model_case(path: Path) -> tuple[dict, RARModule]:
    """Configuration and module of the case that a file belongs to, in eval mode and with the case's weights."""
    name = case_name(path)
    config = read_json(path.with_name(f"{name}_config.json"))
    module = module_from(config)
    module.load_weights(module.ours_from_official(official_weights(path, name)), origin=str(path))
    assert module.net.first_class + module.num_classes == config["none_condition_id"]
    return config, module.eval()


def official_weights(path: Path, name: str) -> dict[str, Tensor]:
    files = sorted(path.parent.glob(f"{name}_weights*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def module_from(config: dict) -> RARModule:
    net = RARConfig(
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_hidden=config["intermediate_size"],
        attn_dropout=config.get("attn_drop", 0.0),  # no array was made with dropout
        proj_dropout=config.get("dropout", 0.0),
    )
    ids = Ids(config["image_seq_len"], config["codebook_size"])
    return RARModule(ids, config["condition_num_classes"], net, optim=recipe_optim())


def sampling_of(config: dict, **changes: float) -> RARSampling:
    """The case's sampler settings. Guidance 0 is off officially; here that is 1."""
    settings = {
        "cfg_scale": config["guidance_scale"] or 1.0,
        "cfg_power": config["guidance_scale_pow"],
        "temperature": config["randomize_temperature"],
    }
    return RARSampling(**settings | changes)


def close(actual: Tensor, expected: Tensor, *, a: float = 2e-5, r: float = 0.0) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=a, rtol=r)


# One file of arrays: forward, backward, decoding, samples


@golden("rar_*_io.safetensors")
def test_golden_arrays(path):
    config, module = model_case(path)
    with Golden(path) as g:
        for kind in sorted({name.split(".")[0] for name in g.names() if name.endswith(".logits")}):  # raster, perm
            orders = orders_of(g, kind)
            check_forward(g, module, kind, orders)
            check_gradients(g, module, kind, orders)
        check_decoding(g, module, sampling_of(config))
        check_samples(g, module, config)


def orders_of(g: Golden, kind: str) -> Tensor:
    name = f"orders_{kind}"
    return g[name] if name in g else torch.arange(g["input_ids"].shape[1]).expand_as(g["input_ids"])


@torch.no_grad()
def check_forward(g: Golden, module: RARModule, kind: str, orders: Tensor) -> None:
    """The official code also computes the place of the last token, whose output it drops."""
    net, labels = module.net, g["condition_ids_lastdropped"] - module.net.first_class
    ids = g["input_ids"].gather(1, orders)
    assert torch.equal(ids, g[f"{kind}.labels"])
    x = g[f"{kind}.x_embed"]
    close(net.embed(ids[:, :-1], orders, labels), x[:, :-1])
    close(net.embeddings(ids[:, -1]) + net.pos_embed[0, orders[:, -1] + PREFIX], x[:, -1])
    close(net.condition(labels, x.shape[1]), g[f"{kind}.cond_c"])
    *blocks, logits = block_outputs(module, ids, orders, labels)
    for i, out in enumerate(blocks):
        close(out, g[f"{kind}.x_block{i}"][:, :-1])
    close(logits, g[f"{kind}.logits"][:, :-1])
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    close(nll, g[f"{kind}.token_nll"])


def block_outputs(module: RARModule, ids: Tensor, orders: Tensor, labels: Tensor) -> list[Tensor]:
    """What the blocks give, and last the logits."""
    seen: list[Tensor] = []
    handles = [block.register_forward_hook(lambda *args: seen.append(args[-1])) for block in module.net.blocks]
    logits = module.net(ids[:, :-1], orders, labels)
    for handle in handles:
        handle.remove()
    return [*seen, logits]


def check_gradients(g: Golden, module: RARModule, kind: str, orders: Tensor) -> None:
    """The loss, too, and the share of tokens that are the likeliest."""
    module.zero_grad()
    terms = module.order_loss(g["input_ids"], g["condition_ids_lastdropped"] - module.net.first_class, orders)
    close(terms["loss"].detach(), g[f"{kind}.loss"], a=1e-5)
    close(terms["accuracy"], g[f"{kind}.correct_tokens"], a=1e-6)
    terms["loss"].backward()
    grads = module.official_state_dict({name: p.grad for name, p in module.named_parameters()})
    for name in (n for n in g.names() if n.startswith(f"{kind}.grad.")):
        grad = first_rows(grads, name.removeprefix(f"{kind}.grad."), g[name].shape)
        if name.endswith("k_norm.bias"):  # cancels in the softmax
            assert max(grad.abs().max(), g[name].abs().max()) < 1e-7
        else:
            close(grad, g[name], a=1e-6, r=1e-3)
    if f"{kind}.grad_norm" in g:
        close(torch.stack([grad.norm() for grad in grads.values()]).norm(), g[f"{kind}.grad_norm"], a=1e-5)


def first_rows(state: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    """An entry; of a table "<name>.first_rows" its first rows, after which there must be nothing but zeros."""
    if not name.endswith(".first_rows"):
        return state[name]
    table = state[name.removesuffix(".first_rows")]
    assert not table[:, shape[1] :].any()
    return table[:, : shape[1]]


@torch.no_grad()
def teacher_forced(module: RARModule, ids: Tensor, labels: Tensor) -> tuple[Tensor, RARCache]:
    """Logits (L, B, V) of each step with the tokens (B, L) that are given, and the cache then."""
    cache = module.net.init_cache(labels, module.scan, dtype=torch.float32)
    logits = [module.net.prefill(labels, cache)]
    logits += [module.net.step(ids[:, i], i, cache) for i in range(ids.shape[1] - 1)]
    return torch.stack(logits), cache


@torch.no_grad()
def check_decoding(g: Golden, module: RARModule, sampling: RARSampling) -> None:
    """With given tokens, both branches: cached, and in one full pass."""
    net, (size, length) = module.net, g["input_ids"].shape
    labels, ids = torch.cat([g["condition_ids"], g["none_ids"]]) - net.first_class, torch.cat([g["input_ids"]] * 2)
    assert torch.equal(labels[:size], g["class_ids"]) and set(labels[size:].tolist()) == {module.num_classes}
    logits, cache = teacher_forced(module, ids, labels)
    whole = net(ids[:, :-1], module.scan.expand_as(ids), labels).transpose(0, 1)
    for name in ("decode.logits_cached", "decode.logits_uncached"):
        close(logits, g[name])
        close(whole, g[name])
    scales = [power_cosine_scale(sampling.cfg_scale, j, length, sampling.cfg_power) for j in range(length)]
    close(torch.tensor(scales), g["decode.cfg_scale"], a=1e-5)
    close(guided(module, logits, sampling), g["decode.logits_cfg"], a=5e-4)
    for name in g.names():
        if found := re.fullmatch(r"decode\.(k|v)_cache_block(\d+)", name):
            close(cache.own.store[int(found[2]), "kv".index(found[1])], g[name])
    assert cache.own.filled == length + 1 == cache.own.length


def guided(module: RARModule, logits: Tensor, sampling: RARSampling) -> Tensor:
    """(L, 2B, V) -> (L, B, V)."""
    return torch.stack([module.guided(rows, len(rows) // 2, j, sampling) for j, rows in enumerate(logits)])


@torch.no_grad()
def check_samples(g: Golden, module: RARModule, config: dict) -> None:
    """Ids are equal. Official draws are argmax(p / noise), ours the likeliest after Gumbel noise, -log noise."""
    labels = g["class_ids"]
    names = [n.removeprefix("sample.") for n in g.names() if re.match(r"sample\.(greedy|tokens)_", n)]
    for name in names:
        noise = -g["sample.exp_noise"].log() if name.startswith("tokens") else torch.zeros(module.net.seq_len, 1, 1)
        tokens = module.generate(labels, lambda j, noise=noise: noise[j], sampling_named(config, name))
        assert torch.equal(tokens, g[f"sample.{name}"]), name
    if "sample.probs_cfg" in g:
        sampling, rows = sampling_of(config), torch.cat([labels, torch.full_like(labels, module.num_classes)])
        logits, _ = teacher_forced(module, torch.cat([g["sample.tokens_cfg"]] * 2), rows)
        close((guided(module, logits, sampling) / sampling.temperature).softmax(-1), g["sample.probs_cfg"], a=1e-4)


def sampling_named(config: dict, name: str) -> RARSampling:
    """Settings by the golden README: "..._nocfg": guidance off, temperature 1; "..._const4_pow0": other guidance."""
    if name.endswith("_nocfg"):
        return sampling_of(config, cfg_scale=1.0, temperature=1.0)
    found = re.search(r"_const([\d.]+)_pow([\d.]+)$", name)
    return sampling_of(config, **({"cfg_scale": float(found[1]), "cfg_power": float(found[2])} if found else {}))


# Optimiser and files


@golden("rar_*_train.safetensors")
def test_golden_optimizer_steps(path):
    _, module = model_case(path)
    module.train()
    optim, clip = module.optim, load_config("rar")["trainer"]["gradient_clip_val"]
    groups = param_groups(module.named_parameters(), optim.weight_decay, no_weight_decay=module.no_weight_decay)
    optimizer = adamw(groups, optim, optim.lr)
    with Golden(path) as g:
        check_warmup(g["lr"], optim)
        for step, lr in enumerate(g["lr"].tolist()):
            for group in optimizer.param_groups:
                group["lr"] = lr
            labels = torch.where(g["drop"][step], module.num_classes, g["class_ids"][step])
            loss = module.order_loss(g["input_ids"][step], labels, g["orders"][step])["loss"]
            close(loss.detach(), g["loss"][step], a=1e-5)
            optimizer.zero_grad()
            loss.backward()
            close(torch.nn.utils.clip_grad_norm_(module.parameters(), clip), g["grad_norm"][step], a=1e-5)
            optimizer.step()
        final = module.official_state_dict()
        for name in (n for n in g.names() if n.startswith("final.")):
            key = name.removeprefix("final.")
            table = final[key.removesuffix(".first_rows")]
            close(table[:, : g[name].shape[1]] if table.ndim == 3 else table, g[name], a=2e-6)


def check_warmup(rates: Tensor, optim: OptimConfig) -> None:
    """The first rates, up to the peak, are ours; how long the decay is, the file does not say."""
    warmup = round(optim.lr / rates[1].item())
    ours = [learning_rate(step, peak=optim.lr, warmup=warmup, total=10 * warmup) for step in range(warmup + 1)]
    assert rates[: warmup + 1].tolist() == pytest.approx(ours[: len(rates)], abs=1e-12)


@golden("rar_*_weights*.safetensors")
def test_golden_weights_go_back_unchanged(path):
    _, module = model_case(path)
    state, expected = module.official_state_dict(), official_weights(path, case_name(path))
    assert sorted(state) == sorted(expected)
    with Golden(path) as g:
        assert all(torch.equal(state[name], g[name]) for name in g.names())


# Schedules and sizes


@golden("schedules.json")
def test_golden_schedules(path):
    expected, module = read_json(path), meta_recipe("rar")
    assert set(expected) == {"random_ratio", "lr", "cfg", "weight_decay"}
    objective, optim, total = module.objective, module.optim, load_config("rar")["trainer"]["max_steps"]
    for step, value in expected["random_ratio"].items():
        ours = random_ratio(int(step), start=objective.anneal_start, end=objective.anneal_end)
        assert ours == pytest.approx(value, abs=1e-12), step
    shape = {"warmup": optim.warmup_steps, "total": total, "schedule": optim.schedule, "min_lr": optim.min_lr}
    for step, value in expected["lr"].items():
        assert learning_rate(int(step), peak=optim.lr, **shape) == pytest.approx(value, rel=1e-9), step
    for name, entry in expected["cfg"].items():
        scale, power, values = entry["guidance_scale"], entry["guidance_scale_pow"], entry["cfg_scale"]
        ours = [power_cosine_scale(scale, step, len(values), power) for step in range(len(values))]
        assert ours == pytest.approx(values, abs=1e-5), name
        if name != DEMO:
            sampling = meta_recipe(RECIPES[name.removeprefix("rar_")]).sampling
            assert sampling == RARSampling(entry["temperature"], scale, power)


@golden("schedules.json")
def test_golden_param_groups(path):
    """`blocks.*` is any block."""
    expected, module = read_json(path)["weight_decay"], meta_recipe("rar")
    groups = param_groups(module.named_parameters(), 1.0, no_weight_decay=module.no_weight_decay)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    found: dict[str, set[str]] = {"decay": set(), "no_decay": set()}
    for name, p in module.named_parameters():
        official = name.removeprefix("net.")
        if not name.startswith("tokenizer."):
            found["decay" if id(p) in decayed else "no_decay"].add(re.sub(r"^blocks\.\d+", "blocks.*", official))
    assert {key: sorted(names) for key, names in found.items()} == expected


@golden("manifest_rar_*.json")
def test_golden_manifest(path):
    expected = {name: tuple(shape) for name, shape in read_json(path).items()}
    module = meta_recipe(RECIPES[path.stem.removeprefix("manifest_rar_")])
    assert {name: tuple(t.shape) for name, t in module.official_state_dict().items()} == expected


def meta_recipe(name: str) -> RARModule:
    with torch.device("meta"):
        return load_module(name)


@pytest.mark.parametrize(
    ("name", "count"), [("b", 260_923_648), ("l", 461_668_352), ("xl", 955_425_024), ("xxl", 1_498_520_704)]
)
def test_sizes_are_the_published_ones(name, count):
    module = meta_recipe(RECIPES[name])
    assert sum(p.numel() for p in module.net.parameters()) == count
    assert module.objective == RARObjective() and module.net.config.attn_dropout == 0.1


def test_golden_no_file_is_left_over():
    """Every file of the golden folder belongs to a kind that a test reads."""
    pattern = re.compile(rf"({'|'.join(KINDS)})\.(safetensors|json)")
    assert [case_id(path) for path in golden_files(METHOD) if not pattern.fullmatch(path.name)] == []
