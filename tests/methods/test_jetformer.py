"""JetFormer against the official code: golden cases are discovered, sizes and options are read from each.

Here: losses term by term, gradients, latents back to pixels, optimiser steps, schedules, parameter names, initial
statistics. Elsewhere: decoder in test_jetformer_decoder.py, the flow alone in test_jet.py, mixtures and guidance in
layers/heads/test_gmm_jetformer_golden.py, and what needs no golden file in test_jetformer_variants.py. Tolerances are
those of the golden README.
"""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from experiments.load import load_module
from layers.flows.factored import FactorConfig
from layers.flows.jet import JetConfig, normal_nats
from layers.networks.jetformer import DecoderConfig
from layers.patch import unpatchify
from layers.text.base import TextTokenizer
from layers.tokenizers.dequantised import DequantisedTokenizer
from lightning_modules.jetformer import Draws, HeadConfig, JetFormerModule, JetFormerObjective, rgb_noise
from lightning_modules.optim import OptimConfig, adamw, learning_rate, param_groups
from tests.golden_cases import Golden, case_id, golden_files, golden_paths, read_json

# Overrides that shrink any JetFormer recipe; tests/smoke.py and the contract tests run every recipe with them.
TINY = {
    "data.class_path": "datamodules.synthetic.SyntheticData",
    "data.init_args.image_size": 8,
    "data.init_args.num_classes": 10,
    "model.init_args.num_classes": 10,
    "model.init_args.tokenizer.init_args.image_size": 8,
    "model.init_args.tokenizer.init_args.patch_size": 4,
    "model.init_args.net.width": 32,
    "model.init_args.net.depth": 2,
    "model.init_args.net.num_heads": 2,
    "model.init_args.net.head_dim": 16,
    "model.init_args.net.mlp_hidden": 64,
    "model.init_args.net.dropout": 0.0,
    "model.init_args.head.num_mixtures": 4,
    "model.init_args.flow.depth": 6,
    "model.init_args.flow.block_depth": 1,
    "model.init_args.flow.width": 32,
    "model.init_args.flow.num_heads": 2,
    "model.init_args.factor.dim": 44,
    "model.init_args.objective.token_noise": 0.0,  # and of pixels there is none: a batch is learnt in sixty steps
    "model.init_args.objective.rgb_noise_max": 0.0,
    "model.init_args.objective.rgb_noise_min": 0.0,
}
NOISE = {"model.init_args.objective.token_noise": 0.3, "model.init_args.objective.rgb_noise_max": 64.0}
CAPTIONS = NOISE | {
    "model.init_args.text.class_path": "layers.text.byte.ByteTokenizer",
    "model.init_args.text_len": 12,
    "model.init_args.sampling.prompts": ["class 0", "class 1"],
}
TINY_OF = {f"jetformer_{name}": CAPTIONS for name in ("t2i", "t2i_m", "t2i_l", "shapes", "openmoji")}
TINY_OF |= {"jetformer_digits": NOISE | {"model.init_args.factor.dim": 8}}

METHOD = "jetformer"
FLOW = "params_adaptor/"
# manifest.json's configurations and our recipes
RECIPES = {
    "imagenet256_B_350M": "jetformer",
    "imagenet256_L_1p3B": "jetformer_l",
    "image_text_350M": "jetformer_t2i",
    "image_text_1p3B": "jetformer_t2i_l",
}
# kinds of file by name
LOSS, PREFIX_LOSS, IMAGES = r"loss_(?!.*prefix_loss).*", "loss_.*prefix_loss", "decode_images.*"
HERE = [LOSS, PREFIX_LOSS, IMAGES, "optim.*", "schedules", "manifest", "init_stats"]
ELSEWHERE = ["decoder_.*", "decode_.*", "flow_.*", "gmm_.*", "cfg_density.*", "patch_pca.*"]
TRUNCATED = 2.4  # ratio of a sample's extreme to its deviation that no full normal distribution of so many stays below


class Ids(TextTokenizer):
    """Texts that are ids already."""

    def init_args(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size, "lower": self.lower, "eos_id": self.eos_id}

    def _encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def _decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def golden(kind: str, suffix: str = "safetensors"):
    """Parametrise over the files whose names are of this kind: kinds that are absent are simply not collected."""
    paths = [p for p in golden_paths(METHOD, f"**/*.{suffix}") if re.fullmatch(kind, p.stem)]
    return pytest.mark.parametrize("path", paths, ids=case_id)


def module_from(entry: dict[str, Any], **changes: Any) -> JetFormerModule:
    """The module of an official configuration; a field that is absent has the official default."""
    model, flow, train = entry["model"], entry["flow"], entry.get("train", {}) | changes
    words, boi = model["bos_id"], model["boi_id"]
    config = DecoderConfig(
        width=model["width"],
        depth=model["depth"],
        num_heads=model["num_heads"],
        num_kv_heads=model["num_kv_heads"],
        head_dim=model["head_dim"],
        mlp_hidden=model["mlp_dim"],
        dropout=model.get("dropout", 0.0),
        text_tables=model.get("num_vocab_repeats", 1),
        text_head="untied" if model.get("untie_output_vocab", False) else "tied",
        causal_prefix=model.get("causal_mask_on_prefix", True),
    )
    sizes = {"depth": flow["depth"], "block_depth": flow["block_depth"], "width": flow["emb_dim"]}
    jet = JetConfig(**sizes, num_heads=flow["num_heads"], kinds=flow.get("kinds", ["channels"]))
    head = HeadConfig(
        num_mixtures=model["num_mixtures"],
        scale_min=model.get("scale_tol", 1e-6),
        init="zero",
        dtype=model.get("head_dtype", "float32"),
    )
    objective = JetFormerObjective(
        text_first_prob=train.get("text_prefix_prob", 1.0),
        text_weight=train.get("text_loss_weight", 1.0),
        loss_on_prefix=train.get("loss_on_prefix", False),
        prefix_drop_prob=model.get("drop_labels_probability", 0.0),
        token_noise=train.get("input_noise_std", 0.0),
        rgb_noise_on_image_prefix=train.get("rgb_noise_on_image_prefix", True),
        gradient_through_image_prefix=not train.get("stop_grad_nvp_prefix", False),
    )
    patch, res = entry.get("patch", 16), entry.get("res", 256)
    module = JetFormerModule(
        DequantisedTokenizer(res, patch),
        words,
        None if entry.get("kind") == "class" else Ids(words, lower=False, eos_id=min(boi, 1) or 1),
        ignore_pad=boi < words,
        net=config,
        head=head,
        flow=jet,
        factor=FactorConfig(dim=model["out_dim"]),
        objective=objective,
    )
    ids = module.net.vocab
    assert (ids.size, ids.boi, ids.nolabel) == (model["vocab_size"], boi, model["nolabel_id"])
    module.ignore_pad = True  # from here on: masks are looked at, whatever the ids
    return module


def module_of(path: Path, **changes: Any) -> JetFormerModule:
    """The module of a golden file, with the parameters that it holds or that its json names."""
    config, state = read_json(path.with_suffix(".json")), params(Golden(path, partial=True))
    for key in ("decoder_params", "flow_params"):
        if named := re.match(r"(\S+\.safetensors)", config.get(key, "")):
            found = params(Golden(path.with_name(named[1]), partial=True))
            state |= {n: t for n, t in found.items() if n.startswith(FLOW) == (key == "flow_params")}
    module = module_from(config, **changes)
    module.load_weights(module.ours_from_official(state), origin=str(path))
    return module.train(config["train_flag"])


def params(g: Golden, prefix: str = "param/") -> dict[str, Tensor]:
    return {name.removeprefix(prefix): g[name] for name in g.names() if name.startswith(prefix)}


def close(actual: Tensor, expected: Tensor, *, atol: float = 2e-5, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=atol, rtol=rtol)


# Losses


def inputs(g: Golden) -> tuple[dict[str, Tensor], Draws]:
    """The batch of a case, images as levels, and its random numbers as ours."""
    levels = rearrange((g["in/image"] + 1) * 127.5, "b h w c -> b c h w").round().to(torch.uint8)
    batch = {"image": levels, "text": g["in/text"].long()}
    batch |= {name: g[f"in/{name}"].bool() for name in ("text_mask", "text_loss")}
    uniform = rearrange(g["in/dequant_noise"].double() * 127.5, "b h w c -> b c h w")
    draws = Draws(g["in/text_first_mask"].bool(), torch.special.ndtri(uniform).float())
    if "in/rgb_noise" in g:
        draws = draws._replace(
            drop=g["in/drop_uniform"],
            rgb=rearrange(g["in/rgb_noise"], "b h w c -> b c h w"),
            rgb_sigma=g["in/noise_scale"].item(),
            token=g["in/input_noise"],
            token_sigma=g["in/input_noise_std"],
        )
    return batch, draws


@golden(LOSS)
def test_golden_loss(path):
    module = module_of(path)
    with Golden(path) as g:
        batch, draws = inputs(g)
        with torch.no_grad():
            terms = check_terms(g, module, batch, draws)
        found = official_metrics(module, draws, **terms)
        for name in (n for n in g.names() if n.startswith("out/metric/")):
            close(found[name.removeprefix("out/metric/")], g[name][0], atol=2e-6, rtol=2e-6)
        module.draw = lambda *_: draws
        loss = module.training_loss(batch)["loss"]
        close(loss, g["out/loss"][0], atol=2e-6, rtol=0)
        assert params(g) or "flow_params" in read_json(path.with_suffix(".json"))
        if expected := params(g, "grad/param/"):
            loss.backward()
            check_gradients(module, expected)


def check_terms(g: Golden, module: JetFormerModule, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
    """Every intermediate value that is recorded; bits and nats per example, and log-determinants."""
    tokens = module.tokens_of(batch["image"], draws)
    close(tokens.x, g["mid/patches"])
    pixels = rearrange(unpatchify(tokens.x, module.tokenizer.patch_size, module.tokenizer.grid), "b c h w -> b h w c")
    close(pixels - g["in/dequant_noise"], g["mid/image_after_rgb_noise"], atol=2e-6, rtol=0)
    latents = module.front(tokens.x)
    close(torch.cat([latents.soft, latents.rest], dim=-1), g["mid/latents"])
    close(latents.logdet, g["mid/logdet"], rtol=2e-6)
    close(normal_nats(latents.rest), g["mid/noise_dims_nll"], rtol=2e-6)
    latents = latents._replace(soft=module.noised(latents.soft, draws))
    close(latents.soft, g["mid/model_tokens"])
    dropped = module.dropped(draws)
    dropped = torch.zeros_like(draws.text_first) if dropped is None else dropped
    assert torch.equal(dropped, g["mid/drop_prefix"].bool())
    h = module.hidden(latents.soft, batch, draws.text_first, dropped)
    close(module.head.linear(h.image), g["mid/image_logits"])
    close(module.head.log_prob(h.image, latents.soft), g["mid/image_token_log_prob"], rtol=2e-6)
    close(module.net.text_logits(h.text), g["mid/text_logits"])
    bits = module.bits(module.image_nats(h.image, latents), tokens)
    text = module.text_nats(h.text, batch).per_word()
    close(bits, g["mid/nll_image_bits"], atol=2e-6, rtol=2e-7)
    close(text, g["mid/nll_text_nats"])
    return {"bits": bits, "text": text, "dropped": dropped, "logdet": latents.logdet}


def official_metrics(
    module: JetFormerModule, draws: Draws, *, bits: Tensor, text: Tensor, dropped: Tensor, logdet: Tensor
) -> dict[str, Tensor]:
    """What the official trainer logs, of our terms per example."""
    first, everything = draws.text_first, module.objective.loss_on_prefix
    images, texts = (first | everything), ~first | (everything & ~dropped)
    subpixels = draws.place[0].numel()
    volume = (logdet / subpixels - math.log(127.5)) / math.log(2)
    found = {"nll_image_suffix": bits[first], "nll_image_prefix": bits[~first]}
    found |= {"nll_text_prefix": text[first & ~dropped], "nll_text_suffix": text[~first]}
    found |= {"nll_image": bits[images], "nll_text": text[texts], "logdet": volume[images]}
    found["nll_image_tokens"] = (bits + volume)[images]
    return {name: values.mean() for name, values in found.items()} | {"loss": module.combined(bits, text, draws)}


def check_gradients(module: JetFormerModule, expected: dict[str, Tensor]) -> None:
    """A key's bias moves all scores of a query alike, so that its true gradient is zero."""
    found = module.official_state_dict({name: p.grad for name, p in module.named_parameters()})
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        scale = expected[name.replace("/key/bias", "/query/bias")].abs().max()
        assert (found[name] - tensor).abs().max() <= 1e-4 * scale, name


@golden(PREFIX_LOSS, "json")
def test_golden_loss_with_what_comes_first(path):
    config = read_json(path)
    source = path.with_name(re.search(r"as (\w+)", config["note"])[1] + ".safetensors")
    module = module_of(source, loss_on_prefix=True)
    g = Golden(source, partial=True)
    batch, draws = inputs(g)
    with torch.no_grad():
        found = official_metrics(module, draws, **check_terms(g, module, batch, draws))
        module.draw = lambda *_: draws
        found["loss"] = module.training_loss(batch)["loss"]
    for name, value in config.items():
        if name != "note":
            close(found[name], torch.tensor(value), atol=2e-6, rtol=2e-7)


# Latents back to pixels


@golden(IMAGES)
@torch.no_grad()
def test_golden_images_of_latents(path):
    named = re.match(r"(\S+)\.safetensors", read_json(path.with_suffix(".json"))["flow_params"])[1]
    module = module_of(path.with_name(f"{named}.safetensors"))
    with Golden(path) as g:
        for name in (n.removeprefix("in/latents") for n in g.names() if n.startswith("in/latents")):
            soft, rest = g[f"in/latents{name}"].tensor_split([module.front.dim], dim=-1)
            tokens = module.front.inverse(soft, rest)
            images = unpatchify(tokens, module.tokenizer.patch_size, module.tokenizer.grid)  # levels are not official
            close(rearrange(images.clamp(-1, 1), "b c h w -> b h w c"), g[f"out/images{name}"])


# Optimiser and schedules


@golden("optim.*")
def test_golden_optimizer_steps(path):
    """AdamW with decay over learning rate, on kernels only, is the official one; permutations are no parameters."""
    config = read_json(path.with_suffix(".json"))
    with Golden(path) as g:
        state = {name: nn.Parameter(tensor.clone()) for name, tensor in params(g, "init/").items()}
        trained = {name: p for name, p in state.items() if "FREEZE_ME" not in name}
        optimizer = official_adam(trained, config)
        for step in range(config["steps"]):
            for name, grad in params(g, f"step{step:02}/grad/").items():
                state[name].grad = grad.clone()
            nn.utils.clip_grad_norm_(trained.values(), config["grad_clip_norm"])
            for group in optimizer.param_groups:
                group["lr"] = official_rate(step, config["total_steps"], config["lr"])
            optimizer.step()
            for name, expected in params(g, f"step{step:02}/param/").items():
                close(state[name].detach(), expected, atol=2e-6, rtol=0)


def official_adam(state: dict[str, nn.Parameter], config: dict[str, Any]) -> torch.optim.Optimizer:
    """Our optimiser for parameters under official names, each in the group that ours of that name is in."""
    module, decay = module_from(SMALL), config["wd"] / config["lr"]
    parts: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, p in state.items():
        parts[our_name(module, name) in decayed_names(module)].append(p)
    groups = [{"params": part, "weight_decay": decay * decayed} for decayed, part in parts.items()]
    wanted = OptimConfig(lr=config["lr"], betas=(config["b1"], config["b2"]), eps=config["eps"])
    return adamw(groups, wanted, wanted.lr)


def decayed_names(module: JetFormerModule) -> set[str]:
    groups = param_groups(module.named_parameters(), 0.1, no_weight_decay=module.no_weight_decay)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    return {name for name, p in module.named_parameters() if id(p) in decayed}


SMALL = {
    "model": {"width": 8, "depth": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "mlp_dim": 8}
    | {"bos_id": 3, "boi_id": 4, "nolabel_id": 5, "vocab_size": 6, "out_dim": 4, "num_mixtures": 2}
    | {"untie_output_vocab": True},
    "flow": {"depth": 1, "block_depth": 1, "emb_dim": 8, "num_heads": 2},
    "patch": 2,
    "res": 4,
}


def our_name(module: JetFormerModule, official: str) -> str:
    """Ours for an official name, of block or coupling 0; a rule may take several, of which a file need not have all."""
    apart = re.sub(r"(decoder/layers|params_adaptor/couplings)/", r"\1_0/", official)
    for rule in module.official_rules():
        for name in (rule.official,) if isinstance(rule.official, str) else rule.official:
            if match := re.fullmatch(re.escape(name).replace(r"\*", "(.*)"), apart):
                return rule.ours.replace("*", match[1], 1) if match.groups() else rule.ours
    raise AssertionError(official)


def official_rate(step: int, total: int, peak: float) -> float:
    return learning_rate(step, peak=peak, warmup=0.1 * total, total=total, schedule="cosine")


def test_only_official_kernels_decay():
    """wd_mults of the official configuration: attention and MLP of the decoder, and every kernel."""
    module = module_from(SMALL)
    decayed = decayed_names(module)
    state = {name: torch.full_like(p, name in decayed) for name, p in module.named_parameters()}
    for name, tensor in module.official_state_dict(state).items():
        expected = name.endswith("/kernel") or name.startswith(("decoder/layers/attn/", "decoder/layers/mlp/"))
        assert bool(tensor.all()) == bool(tensor.any()) == expected, name


@golden("schedules", "json")
def test_golden_schedules(path):
    config = read_json(path)
    total = config["total_steps"]
    for name, values in config["rgb_noise"].items():
        largest, smallest = map(float, re.fullmatch(r"max([\d.]+)_min([\d.]+)", name).groups())
        for step, value in values.items():
            assert rgb_noise(int(step), total, largest=largest, smallest=smallest) == pytest.approx(value, abs=1e-5)
    for step, value in config["lr"].items():
        assert official_rate(int(step), total, config["base_lr"]) == pytest.approx(value, abs=1e-9)


# Parameters


def entries(name: str):
    """Configurations in a json that have decoder and flow."""
    cases = [
        pytest.param(key, entry, id=f"{case_id(path)}-{key}")
        for path in golden_paths(METHOD, f"**/{name}.json")
        for key, entry in read_json(path).items()
        if "EmbedText/embedding" in entry["params"]
    ]
    return pytest.mark.parametrize(("key", "entry"), cases)


@entries("manifest")
def test_golden_manifest(key, entry):
    with torch.device("meta"):
        modules = [module_from(entry)] + ([load_module(RECIPES[key])] if key in RECIPES else [])
    expected, counts = entry["params"], entry["param_counts"]
    for module in modules:
        shapes = {name: list(tensor.shape) for name, tensor in module.official_state_dict().items()}
        assert shapes == expected
        assert sum(math.prod(shape) for shape in shapes.values()) == counts["total"]
        assert sum(p.numel() for p in module.front.parameters()) == counts["flow_trainable"]
        assert sum(math.prod(s) for name, s in shapes.items() if "FREEZE_ME" in name) == counts["flow_frozen_masks"]
    for module in modules[1:]:
        model, net = entry["model"], module.net
        assert net.config.dropout == model["dropout"] and net.vocab.boi == model["boi_id"]
        assert module.objective.prefix_drop_prob == model["drop_labels_probability"]
        assert module.head.dtype == getattr(torch, model["head_dtype"])


@golden(LOSS)
def test_golden_parameters_go_back_unchanged(path):
    module, g = module_of(path), Golden(path, partial=True)
    official = module.official_state_dict()
    assert all(torch.equal(official[name], tensor) for name, tensor in params(g).items())
    back = module.ours_from_official(official)
    assert set(back) == set(module.state_dict())
    assert all(torch.equal(back[name], tensor) for name, tensor in module.state_dict().items())


@entries("init_stats")
def test_golden_initial_statistics(key, entry):
    """Mean, deviation and extremes; a constant exactly, a truncated normal distribution's end within five per cent."""
    torch.manual_seed(0)
    state, expected = module_from(entry).official_state_dict(), entry["params"]
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {n: s["shape"] for n, s in expected.items()}
    for name, stats in expected.items():
        tensor, std, size = state[name], stats["std"], state[name].numel()
        if std == 0:
            assert (tensor == stats["mean"]).all(), name
            continue
        assert abs(tensor.std() / std - 1) < 5 * size**-0.5, name  # five standard errors of a sample, at least
        assert abs(tensor.mean() - ("FREEZE_ME" in name) * stats["mean"]) < 5 * std * size**-0.5, name
        extreme = max(-stats["min"], stats["max"])
        assert abs(tensor.abs().max() / extreme - 1) < (0.05 if extreme < TRUNCATED * std else 0.5), name


def test_golden_no_file_is_left_over():
    """Every file of the golden folder belongs to a kind that a test reads."""
    pattern = re.compile(rf"({'|'.join([*HERE, *ELSEWHERE])})\.(safetensors|json)")
    assert [case_id(path) for path in golden_files(METHOD) if not pattern.fullmatch(path.name)] == []
