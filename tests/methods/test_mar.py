"""MAR against the official code: golden cases are discovered, sizes and options are read from each case.

Here: trunk, loss, gradients, optimiser steps, sampling, groups, schedules, manifests. The head alone is in
`test_mar_head.py`, the autoencoders in `test_mar_vae.py`. Tolerances are those of the golden README.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments.load import load_module
from layers.diffusion.gaussian import Coefficients, q_sample
from layers.gather import take
from layers.patch import patchify
from layers.samplers.masked import linear_cfg_scale, mask_lengths, reveal
from layers.tokenizers.pixels import PixelTokenizer
from lightning_modules.callbacks.ema import EMA
from lightning_modules.mar import HeadConfig, MARConfig, MARModule, MARObjective, MARSampling
from lightning_modules.optim import OptimConfig, adamw, param_groups
from tests.golden_cases import Golden, case_id, golden_files, golden_paths, read_json

# Overrides that shrink any MAR recipe; tests/smoke.py and the contract tests run every recipe with them.
TINY = {
    "data.class_path": "datamodules.synthetic.SyntheticData",
    "data.init_args.image_size": 16,
    "data.init_args.num_classes": 10,
    "model.init_args.num_classes": 10,
    "model.init_args.tokenizer.class_path": "layers.tokenizers.pixels.PixelTokenizer",
    "model.init_args.tokenizer.init_args.image_size": 16,
    "model.init_args.tokenizer.init_args.patch_size": 4,
    "model.init_args.net.width": 32,
    "model.init_args.net.depth": 2,
    "model.init_args.net.num_heads": 2,
    "model.init_args.net.buffer_size": 4,
    "model.init_args.net.attn_dropout": 0.0,
    "model.init_args.net.proj_dropout": 0.0,
    "model.init_args.head.width": 32,
    "model.init_args.head.depth": 2,
    "model.init_args.sampling.num_iter": 4,
    "model.init_args.sampling.num_steps": 10,
}

# What a recipe of another kind needs besides: ids instead of continuous tokens.
TINY_OF = {
    "mar_l_ce": {
        "model.init_args.tokenizer.class_path": "layers.tokenizers.vq.VQTokenizer",
        "model.init_args.tokenizer.init_args.image_size": 16,
        "model.init_args.tokenizer.init_args.num_codes": 32,
        "model.init_args.tokenizer.init_args.weights": "",
        "model.init_args.tokenizer.init_args.frozen": False,  # random weights will do
        "model.init_args.tokenizer.init_args.arch.base_channels": 32,
        "model.init_args.tokenizer.init_args.arch.multipliers": [1, 1, 1],
        "model.init_args.sampling.num_steps": 1,
    }
}

METHOD = "mar"
OPTIMIZER = {"lr": 8e-4, "betas": (0.9, 0.95), "weight_decay": 0.02}  # train_step, stated in the golden README
RELEASED = {"base": "mar", "large": "mar_l", "huge": "mar_h"}  # manifest_mar_<name>.json and our recipe


def module_from(config: dict, weights: Path | None = None) -> MARModule:
    """The module of a golden config.json, in eval mode, with official weights where given."""
    model = config["model"]
    net = MARConfig(
        width=model["encoder_embed_dim"],
        depth=model["encoder_depth"],
        num_heads=model["encoder_num_heads"],
        decoder_width=model["decoder_embed_dim"],
        decoder_depth=model["decoder_depth"],
        decoder_heads=model["decoder_num_heads"],
        mlp_ratio=model["mlp_ratio"],
        buffer_size=model["buffer_size"],
        attn_dropout=model["attn_dropout"],
        proj_dropout=model["proj_dropout"],
        norm_eps=config["norm_eps"],
    )
    head = HeadConfig(width=model["diffloss_w"], depth=model["diffloss_d"], repeat=model["diffusion_batch_mul"])
    objective = MARObjective(mask_ratio_min=model["mask_ratio_min"], label_drop_prob=model["label_drop_prob"])
    latents = PixelTokenizer(
        model["img_size"] // model["vae_stride"], model["patch_size"], channels=model["vae_embed_dim"]
    )
    module = MARModule(latents, model["class_num"], net, head, objective, optim=OptimConfig(**OPTIMIZER))
    if weights is not None:
        module.load_official(weights)
    return module.eval()


def model_case(path: Path) -> tuple[dict, MARModule]:
    config = read_json(path.parent / "config.json")
    return config, module_from(config, path.parent / "weights.safetensors")


def close(actual: Tensor, expected: Tensor, *, tolerance: float = 1e-5) -> None:
    """Within `tolerance` x max(1, max|expected|): the README's "tight" by default."""
    bound = tolerance * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual.double(), expected.double(), atol=bound, rtol=0)


def golden(pattern: str):
    """Parametrise over the files that match: kinds that are absent are simply not collected."""
    return pytest.mark.parametrize("path", golden_paths(METHOD, f"**/{pattern}"), ids=case_id)


def ours(tokens: Tensor, module: MARModule) -> Tensor:
    """Official tokens, channel-major inside a patch -> ours."""
    p = module.tokenizer.patch_size
    channels = tokens.shape[-1] // p**2
    return tokens.unflatten(-1, (channels, p, p)).movedim(-3, -1).flatten(-3)


def everywhere(module: MARModule, batch: int) -> Tensor:
    return torch.arange(module.net.seq_len).expand(batch, -1)


def hooked(module: MARModule, call) -> tuple[Tensor, dict[str, Tensor]]:
    """The call's result and the outputs of the modules that the golden file names."""
    seen, net = {}, module.net
    named = {"encoder_norm": net.encoder_norm, "decoder_embed": net.decoder_embed, "decoder_norm": net.decoder_norm}
    named |= {f"encoder_block_{i}": block for i, block in enumerate(net.encoder_blocks)}
    named |= {f"decoder_block_{i}": block for i, block in enumerate(net.decoder_blocks)}

    def keep(name):
        return lambda _, __, output: seen.__setitem__(name, output)

    handles = [target.register_forward_hook(keep(name)) for name, target in named.items()]
    try:
        return call(), seen
    finally:
        for handle in handles:
            handle.remove()


@golden("forward.safetensors")
def test_golden_forward(path):
    _, module = model_case(path)
    net = module.net
    with Golden(path) as g, torch.no_grad():
        labels, orders, m = g["labels"], g["orders"], int(g["num_masked"])
        x = ours(g["tokens"], module)
        torch.testing.assert_close(patchify(g["imgs"], module.tokenizer.patch_size), x, atol=0, rtol=0)
        assert torch.equal(g["mask"], torch.zeros_like(g["mask"]).scatter(1, orders[:, :m], 1.0))
        known, wanted = orders[:, m:].sort(1).values, everywhere(module, len(x))
        close(net.y_embedder(labels), g["class_embedding"])
        z, seen = hooked(module, lambda: net(take(x, known), known, wanted, labels))
        close(z, g["z"])
        close(z, g["z_f64"])
        close(net.encode(take(x, known), known, labels), g["encoder_out"])
        close(net.embed(x, wanted, labels), g["hook.z_proj_ln"])  # before dropping
        seen |= whole_last_block(module, take(x, known), known, labels)
        for name in (n for n in g.names() if n.startswith("hook.") and n != "hook.z_proj_ln"):
            close(seen[name.removeprefix("hook.")], g[name])
        null = torch.full_like(labels, module.num_classes)
        close(net.encode(take(x, known), known, null), g["encoder_out_uncond"])
        close(net(take(x, known), known, wanted, null), g["z_uncond"])
        close(net.encode(x[:, :0], known[:, :0], labels), g["encoder_out_all_masked"])
        close(net(x[:, :0], known[:, :0], wanted, labels), g["z_all_masked"])


def whole_last_block(module: MARModule, x: Tensor, known: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The last decoder block and the norm on every row, buffer included, which the module never computes."""
    net, seen = module.net, {}
    wanted = torch.arange(net.seq_len).expand(len(x), -1)
    handle = net.decoder_blocks[-1].norm1.register_forward_pre_hook(lambda _, inputs: seen.update(into=inputs[0]))
    net(x, known, wanted, labels)
    handle.remove()
    out = net.decoder_blocks[-1](seen["into"])
    return {f"decoder_block_{len(net.decoder_blocks) - 1}": out, "decoder_norm": net.decoder_norm(out)}


class TrainingBatch:
    """Inputs and draws of train_loss.safetensors in our layout."""

    def __init__(self, g: Golden, module: MARModule, config: dict) -> None:
        batch, length = g["orders"].shape
        m = int(g["mask"][0].sum())
        self.x = patchify(g["imgs"], module.tokenizer.patch_size)
        dropped = g["label_drop_u"] < config["model"]["label_drop_prob"]
        self.labels = torch.where(dropped, module.num_classes, g["labels"])
        self.masked, self.known = g["orders"][:, :m], g["orders"][:, m:]
        assert torch.equal(g["mask"].bool(), torch.zeros(batch, length).scatter(1, self.masked, 1).bool())
        self.t = g["t"].view(-1, batch, length)  # (M, B, L)
        self.noise = ours(g["noise"], module).view(-1, batch, length, self.x.shape[-1])  # (M, B, L, D)

    def loss(self, module: MARModule) -> dict[str, Tensor]:
        repeat = len(self.t)
        index = self.masked.expand(repeat, -1, -1)  # (M, B, R)
        time = self.t.gather(2, index).transpose(0, 1)  # (B, M, R)
        noise = torch.stack([take(n, self.masked) for n in self.noise], dim=1)  # (B, M, R, D)
        return module.masked_loss(self.x, self.labels, self.masked, self.known, time, noise)


@golden("train_loss.safetensors")
def test_golden_loss(path):
    config, module = model_case(path)
    module.train()
    with Golden(path) as g, torch.no_grad():
        b = TrainingBatch(g, module, config)
        batch, length = g["orders"].shape
        assert b.masked.shape[1] == int(g["num_masked"]) == math.ceil(length * g["mask_rate"].item())
        z = module.net(take(b.x, b.known), b.known, everywhere(module, batch), b.labels)
        close(z, g["z"])
        rows = b.t.flatten(1), b.noise.flatten(1, 2)
        terms = module.head.loss(b.x.flatten(0, 1), z.flatten(0, 1), *rows)  # every row, as the official code
        for name in ("mse", "vb"):
            close(terms[name].flatten(), g[name])
        close(terms["loss"].flatten(), g["loss_rows"])
        close(b.loss(module)["loss"], g["loss"])
        c = Coefficients.at(module.head.coefficients, g["t"])
        x_t = q_sample(b.x.flatten(0, 1).repeat(len(b.t), 1), rows[1].flatten(0, 1), c)
        close(x_t, ours(g["x_t"], module))
        output = module.head.net(x_t, g["t"], z.flatten(0, 1).repeat(len(b.t), 1))
        halves = torch.cat([ours(half, module) for half in g["model_output"].chunk(2, -1)], -1)
        close(output, halves)


def official_gradients(module: MARModule) -> dict[str, Tensor]:
    return module.official_state_dict({name: p.grad for name, p in module.named_parameters()})


@golden("train_grads.safetensors")
def test_golden_gradients(path):
    config, module = model_case(path)
    module.train()
    with Golden(path.parent / "train_loss.safetensors", partial=True) as g:
        TrainingBatch(g, module, config).loss(module)["loss"].backward()
    grads = official_gradients(module)
    with Golden(path) as g:
        names = [re.sub(r"^(grad\.)", "", name) for name in g.names()]
        assert sorted(names) == sorted(grads)
        for name, stored in zip(names, g.names(), strict=True):
            expected = g[stored]
            torch.testing.assert_close(grads[name], expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


@golden("train_step.safetensors")
def test_golden_optimizer_steps(path):
    config, module = model_case(path)
    module.train()
    averages = EMA(decays=[0.9999])  # the official rate, stated in the golden README
    averages.start(module)
    groups = param_groups(module.named_parameters(), module.optim.weight_decay, no_weight_decay=module.no_weight_decay)
    optimizer = adamw(groups, module.optim, module.optim.lr)
    with Golden(path) as g, Golden(path.parent / "train_loss.safetensors", partial=True) as inputs:
        batch = TrainingBatch(inputs, module, config)
        for loss, norm in zip(g["loss"], g["grad_norm_before_clip"], strict=True):
            optimizer.zero_grad()
            value = batch.loss(module)["loss"]
            value.backward()
            close(value.detach(), loss)
            total = torch.nn.utils.clip_grad_norm_(module.parameters(), float(g["clip"]))
            close(total, norm, tolerance=1e-4)
            optimizer.step()
            averages.update(module)
        weights = module.official_state_dict()
        with averages.weights(module, averages.names[0]):
            average = {name: tensor.clone() for name, tensor in module.official_state_dict().items()}
        for name in g.names():
            kind, _, parameter = name.partition(".")
            if kind == "param":
                torch.testing.assert_close(weights[parameter], g[name], atol=1e-4, rtol=0)
            elif kind == "ema":
                torch.testing.assert_close(average[parameter], g[name], atol=1e-6, rtol=0)


@golden("param_groups.json")
def test_golden_param_groups(path):
    expected, module = read_json(path), module_from(read_json(path.parent / "config.json"))
    free, decayed = param_groups(
        module.named_parameters(), expected["weight_decay"][1], no_weight_decay=module.no_weight_decay
    )
    names = {id(p): name for name, p in module.named_parameters()}
    for group, key in ((free, "no_decay"), (decayed, "decay")):
        state = {names[id(p)]: p.detach() for p in group["params"]}
        assert sorted(module.official_state_dict(state)) == sorted(expected[key])
    assert [free["weight_decay"], decayed["weight_decay"]] == expected["weight_decay"]
    assert set(expected) == {"no_decay", "decay", "weight_decay"}


@golden("weights.safetensors")
def test_golden_weights_go_back_unchanged(path):
    _, module = model_case(path)
    with Golden(path) as g:
        state = module.official_state_dict()
        assert sorted(state) == g.names()
        assert all(torch.equal(state[name], g[name]) for name in g.names())


@golden("token_schedule.json")
def test_golden_token_schedule(path):
    for key, expected in read_json(path).items():
        length, num_iter = map(int, key.split("/"))
        lengths = mask_lengths(length, num_iter)
        steps = list(reveal(torch.arange(length)[None], length, lengths))
        assert lengths == expected["mask_len"]
        assert [length - known.shape[1] for known, _ in steps] == expected["remaining_before"]
        assert [new.shape[1] for _, new in steps] == expected["n_pred"]
        factors = [linear_cfg_scale(2.0, m, length) - 1 for m in lengths]
        assert factors == pytest.approx(expected["cfg_linear_factor"], abs=1e-8)  # the file holds nine digits
        assert set(expected) == {"mask_len", "remaining_before", "n_pred", "cfg_linear_factor"}


class RecordedNoise:
    """The official draws in order of use; with guidance the second half of each step's rows was never used."""

    def __init__(self, g: Golden, guided: bool, module: MARModule, batch: int) -> None:
        self.rows = list(
            ours(g["noise_flat"].view(-1, module.tokenizer.token_dim), module).split(g["noise_rows"].tolist())
        )
        self.guided, self.batch = guided, batch

    def __call__(self, draws: int, tokens: int, dim: int) -> Tensor:
        count = self.batch * tokens
        taken = [self.rows.pop(0) for _ in range(draws)]
        assert [len(rows) for rows in taken] == [count] + [count * (1 + self.guided)] * (draws - 1)
        return torch.stack([rows[:count] for rows in taken])


@golden("sample_*.safetensors")
def test_golden_sampling(path):
    config, module = model_case(path)
    note = config["notes"][path.stem]
    steps = int(note["respacing"])
    sampling = MARSampling(
        num_iter=note["num_iter"],
        num_steps=steps,
        cfg_scale=note["cfg"],
        cfg_schedule=note["cfg_schedule"],
        temperature=note["temperature"],
    )
    with Golden(path) as g, torch.no_grad():
        orders, batch = g["orders"], len(g["orders"])
        labels = g["labels"] if "labels" in g else torch.full((batch,), module.num_classes)
        noise = RecordedNoise(g, note["cfg"] != 1, module, batch)
        check_each_iteration(g, module, labels, sampling)
        tokens = module.generate(labels, orders, noise, sampling)
        assert noise.rows == []
        latents = module.tokenizer.decode(tokens)
        # few steps amplify rounding: spec/mar.md 5.5, and the golden README
        bound = 1e-4 if steps >= 100 else 3e-3 * g["latents"].abs().max().item()
        for name in ("latents", "latents_f64"):
            torch.testing.assert_close(latents.double(), g[name].double(), atol=bound, rtol=0)


def check_each_iteration(g: Golden, module: MARModule, labels: Tensor, sampling: MARSampling) -> None:
    """Masks, counts, guidance scale and z of every iteration, each from the recorded tokens."""
    orders, z_flat = g["orders"], g["z_flat"].view(-1, module.net.decoder_width)
    length = orders.shape[1]
    lengths = mask_lengths(length, sampling.num_iter)
    branches = module._with_null(labels, sampling)
    for k, (known, new) in enumerate(reveal(orders, length, lengths)):
        assert torch.equal(1 - g["masks"][k], torch.zeros(orders.shape).scatter(1, known, 1.0))
        assert new.shape[1] == g["n_pred"][k]
        assert module._scale(sampling, lengths[k]) == pytest.approx(g["cfg_iter"][k].item())
        z = module._guided_z(ours(g["tokens_in"][k], module), branches, new, known).flatten(0, 1)
        expected, z_flat = z_flat[: len(z)], z_flat[len(z) :]
        close(z, expected)
    assert len(z_flat) == 0


@golden("manifest_mar_*.json")
def test_golden_manifest(path):
    expected = {name: tuple(shape) for name, shape in read_json(path).items()}
    with torch.device("meta"):
        module = module_of_shapes(expected)
    assert {name: tuple(t.shape) for name, t in module.official_state_dict().items()} == expected
    name = re.fullmatch(r"manifest_mar_(\w+)", path.stem).group(1)
    if name in RELEASED:
        with torch.device("meta"):
            recipe = load_module(RELEASED[name])
        assert {n: tuple(t.shape) for n, t in recipe.official_state_dict().items()} == expected


def module_of_shapes(shapes: dict[str, tuple[int, ...]]) -> MARModule:
    """A module whose sizes are read off a list of official names and shapes."""

    def count(pattern: str) -> int:
        return 1 + max(int(m.group(1)) for m in (re.match(pattern, name) for name in shapes) if m)

    length, token_dim = shapes["diffusion_pos_embed_learned"][1], shapes["z_proj.weight"][1]
    width, decoder_width = shapes["z_proj.weight"][0], shapes["decoder_embed.weight"][0]
    net = MARConfig(
        width=width,
        depth=count(r"encoder_blocks\.(\d+)\."),
        num_heads=1,
        decoder_width=decoder_width,
        decoder_depth=count(r"decoder_blocks\.(\d+)\."),
        mlp_ratio=shapes["encoder_blocks.0.mlp.fc1.weight"][0] / width,
        buffer_size=shapes["encoder_pos_embed_learned"][1] - length,
    )
    head = HeadConfig(
        width=shapes["diffloss.net.input_proj.weight"][0], depth=count(r"diffloss\.net\.res_blocks\.(\d+)\.")
    )
    side = round(length**0.5)
    return MARModule(PixelTokenizer(side, 1, channels=token_dim), shapes["class_emb.weight"][0], net, head)


def test_golden_no_file_is_left_over():
    """Every file of the golden folder is one that a test reads."""
    arrays = ["forward", "train_loss", "train_grads", "train_step", "weights", r"sample_\w+"]
    arrays += [r"diffloss_(unit|steps|loops)", "schedules", "patchify"]  # test_mar_head.py, test_mar_vae.py
    facts = ["config", "param_groups", "token_schedule", "respacing", r"manifest_mar_\w+", "manifest_kl16"]
    pattern = re.compile(rf"({'|'.join(arrays)})\.safetensors|({'|'.join(facts)})\.json")
    left = [path for path in golden_files(METHOD) if not pattern.fullmatch(path.name) and not of_an_autoencoder(path)]
    assert [case_id(path) for path in left] == []


def of_an_autoencoder(path):
    """vae_<name>, its configuration and its weights: test_mar_vae.py reads those whose configuration is there."""
    found = re.fullmatch(r"(vae_[a-z0-9]+)(_config\.json|(_weights(_\w+)?)?\.safetensors)", path.name)
    return bool(found) and path.with_name(f"{found[1]}_config.json").exists()
