"""JiT against the official code: golden cases are discovered, sizes and options are read from each case.

Kinds of file: model cases (a folder with weights.safetensors), official checkpoints (a folder with *.pth), ops,
learning rate schedules, initialisation rules, manifests. Tolerances are those of the golden README.
"""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from datamodules.transforms import center_crop
from experiments.load import load_module
from layers.checkpoint import to_official, to_ours
from layers.embed import sincos_2d, timestep_features
from layers.patch import patchify
from layers.rope import apply_rope, axial_rope
from layers.samplers.ode import SOLVERS, uniform_times
from layers.tokenizers.base import from_uint8, to_uint8
from layers.tokenizers.pixels import PixelTokenizer
from lightning_modules.callbacks.ema import EMA
from lightning_modules.jit import JiTConfig, JiTModule, JiTObjective, JiTSampling
from lightning_modules.optim import OptimConfig, adamw, learning_rate, param_groups
from lightning_modules.weights import read_torch
from tests.golden_cases import GOLDEN, Golden, case_id, golden_files, golden_paths, read_json

# Overrides that shrink any JiT recipe; tests/smoke.py and the contract tests run every recipe with them.
TINY = {
    "data.init_args.image_size": 32,
    "data.init_args.num_classes": 10,
    "model.init_args.num_classes": 10,
    "model.init_args.tokenizer.init_args.image_size": 32,
    "model.init_args.tokenizer.init_args.patch_size": 8,
    "model.init_args.net.width": 32,
    "model.init_args.net.depth": 4,
    "model.init_args.net.num_heads": 2,
    "model.init_args.net.bottleneck_dim": 8,
    "model.init_args.net.in_context_len": 2,
    "model.init_args.net.in_context_start": 2,
    "model.init_args.sampling.num_steps": 3,
}

METHOD = "jit"


def module_from(config: dict, weights: Path | str | None = None, *, objective: JiTObjective | None = None) -> JiTModule:
    """The module of a golden config.json, in eval mode, with official weights where given."""
    net = JiTConfig(
        width=config["hidden_size"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config.get("mlp_ratio", 4.0),
        bottleneck_dim=config["bottleneck_dim"],
        in_context_len=config["in_context_len"],
        in_context_start=config["in_context_start"],
        attn_dropout=config.get("attn_dropout", 0.0),
        proj_dropout=config.get("proj_dropout", 0.0),
    )
    objective = objective or JiTObjective(
        t_eps=config.get("t_eps", 0.05),
        p_mean=config.get("P_mean", -0.8),
        p_std=config.get("P_std", 0.8),
        noise_scale=config.get("noise_scale", 1.0),
        label_drop_prob=config.get("label_drop_prob", 0.1),
    )
    tokenizer = PixelTokenizer(config["img_size"], config["patch_size"], channels=config.get("in_channels", 3))
    optim = OptimConfig(
        lr=config.get("lr", 1e-3),
        betas=tuple(config.get("betas", (0.9, 0.95))),
        eps=config.get("adam_eps", 1e-8),
        weight_decay=config.get("weight_decay", 0.0),
        schedule=config.get("lr_schedule", "constant"),
        min_lr=config.get("min_lr", 0.0),
    )
    module = JiTModule(tokenizer, config["num_classes"], net, objective, optim=optim)
    if weights is not None:
        module.load_official(weights)
    return module.eval()


def sibling_config(path: Path) -> dict:
    return read_json(path.parent / "config.json")


def model_case(path: Path) -> tuple[dict, JiTModule]:
    config = sibling_config(path)
    return config, module_from(config, path.parent / "weights.safetensors")


def tokens(images: Tensor, config: dict) -> Tensor:
    return patchify(images, config["patch_size"])


def close(actual: Tensor, expected: Tensor, *, atol: float = 0.0, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol, check_dtype=False)


def golden(pattern: str, *, needs: str = ""):
    """Parametrise over the files that match: kinds that are absent are simply not collected.

    `needs` is the sibling that holds a kind's inputs; `test_golden_no_file_is_left_over` names a file that lacks it.
    """
    paths = [path for path in golden_paths(METHOD, pattern) if not needs or list(path.parent.glob(needs))]
    return pytest.mark.parametrize("path", paths, ids=case_id)


@golden("*/forward.safetensors")
def test_golden_forward(path):
    config, module = model_case(path)
    assert sum(p.numel() for p in module.parameters()) == config["n_params"]
    if "swiglu_hidden" in config:
        assert module.net.blocks[0].mlp.w3.in_features == config["swiglu_hidden"]
    with Golden(path) as g, torch.no_grad():
        out = module.tokenizer.decode(module.net(tokens(g["z"], config), g["t"], g["y"]))
        close(out, g["out_f32"], atol=1e-5)
        close(out.double(), g["out_f64"], atol=1e-5)


@golden("*/forward_bf16.safetensors", needs="forward.safetensors")
def test_golden_forward_bf16(path):
    config, module = model_case(path)
    with Golden(path) as g, Golden(path.parent / "forward.safetensors", partial=True) as f, torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            out = module.net(tokens(f["z"], config), f["t"], f["y"])
        assert out.dtype == torch.bfloat16
        out, exact = module.tokenizer.decode(out.float()), f["out_f32"]
        for reference in (exact, g["out_bf16"].float(), f["out_f64"].float()):
            assert (out - reference).square().mean().sqrt() <= 0.02 * exact.square().mean().sqrt()


def record(module: JiTModule, call) -> dict[str, Tensor]:
    """Every intermediate that the golden file names, gathered by hooks around one call."""
    seen: dict[str, Tensor] = {}
    handles = []

    def keep(target, name: str, *, entry: bool = False) -> None:
        def hook(_, inputs, output):
            seen[name] = inputs[0] if entry else output

        handles.append(target.register_forward_hook(hook))

    net = module.net
    keep(net.t_embedder, "t_emb")
    keep(net.y_embedder, "y_emb")
    keep(net.x_embedder, "patch_embed")
    keep(net.final_layer, "final_layer_out")
    keep(net.blocks[0], "tokens_block0_in", entry=True)
    for i, block in enumerate(net.blocks):
        for target, part, entry in (
            (block, "_out", False),
            (block.adaLN_modulation, ".adaLN", False),
            (block.norm1, ".norm1", False),
            (block.attn, ".attn_in", True),
            (block.attn, ".attn_out", False),
            (block.mlp, ".mlp_in", True),
            (block.mlp, ".mlp_out", False),
            (block.attn.qkv, ".qkv", False),
            (block.attn.q_norm, ".q_norm", False),
            (block.attn.k_norm, ".k_norm", False),
        ):
            keep(target, f"block{i}{part}", entry=entry)
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    for i in range(len(net.blocks)):
        length = seen[f"block{i}.q_norm"].shape[-2]
        for part in "qk":
            seen[f"block{i}.{part}_rope"] = apply_rope(seen[f"block{i}.{part}_norm"], net.rope[:, -length:])
    return seen


@golden("*/intermediates.safetensors", needs="forward.safetensors")
def test_golden_intermediates(path):
    config, module = model_case(path)
    chosen = slice(1, 3)  # batch elements of forward.safetensors that the file describes
    with Golden(path) as g, Golden(path.parent / "forward.safetensors", partial=True) as f:
        z, t, y = (f[name][chosen] for name in ("z", "t", "y"))
        seen = record(module, lambda: module.net(tokens(z, config), t, y))
        seen["t_freq"] = timestep_features(t, module.net.t_embedder.num_features)
        seen["c"] = seen["t_emb"] + seen["y_emb"]
        context = config["in_context_len"]
        for table, part in (("rope_img", module.net.rope[:, context:]), ("rope_ctx", module.net.rope)):
            seen[f"{table}.cos"], seen[f"{table}.sin"] = part
        for name in g.names():
            close(seen[name], g[name], atol=2e-6 if name.startswith("rope") or name == "t_freq" else 1e-5)


def training_draws(g: Golden, config: dict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, labels after the drop, t, noise."""
    labels = torch.where(g["drop"].bool(), config["num_classes"], g["y"])
    return tokens(g["x"], config), labels, g["t"], tokens(g["noise"], config)


@golden("*/train_loss.safetensors")
def test_golden_train_loss(path):
    config, module = model_case(path)
    with Golden(path) as g:
        x, labels, t, noise = training_draws(g, config)
        with torch.no_grad():
            z = t.view(-1, 1, 1) * x + (1 - t.view(-1, 1, 1)) * noise
            close(module.tokenizer.decode(module.net(z, t, labels)), g["x_pred_ns1_f32"], atol=1e-5)
        for name in [n for n in g.names() if n.startswith("per_sample_ns") and n.endswith("_f32")]:
            scale = re.fullmatch(r"per_sample_ns([\d.]+)_f32", name)[1]
            module.objective.noise_scale = float(scale)
            with torch.no_grad():
                losses = module.denoising_loss(x, labels, t, noise)
            for kind in ("f32", "f64"):
                close(losses.double(), g[f"per_sample_ns{scale}_{kind}"].double(), rtol=2e-5)
                close(losses.mean().double(), g[f"loss_ns{scale}_{kind}"].double(), rtol=1e-5)
        grads = gradients(module, x, labels, t, noise)
        norms = [grads[name].norm() for name in config["trainable_names"]]
        for kind in ("f32", "f64"):
            close(torch.stack(norms).double(), g[f"grad_l2_{kind}"].double(), rtol=1e-4, atol=1e-9)


def gradients(module: JiTModule, x: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Gradients of the mean loss at noise_scale 1, under official names and layouts."""
    module.objective.noise_scale = 1.0
    module.zero_grad()
    module.denoising_loss(x, labels, t, noise).mean().backward()
    return to_official({n: p.grad for n, p in module.named_parameters() if p.requires_grad}, module.official_rules())


@golden("*/train_grads.safetensors", needs="train_loss.safetensors")
def test_golden_train_grads(path):
    config, module = model_case(path)
    with Golden(path.parent / "train_loss.safetensors", partial=True) as draws:
        grads = gradients(module, *training_draws(draws, config))
    with Golden(path) as g:
        assert {n.partition(".")[2] for n in g.names()} == set(config["trainable_names"])
        for name in g.names():
            kind, _, parameter = name.partition(".")
            actual = grads[parameter]
            close(actual.flatten()[: g[name].numel()] if kind == "gradhead" else actual, g[name], atol=5e-5)


@golden("*/loss_grid.safetensors", needs="train_loss.safetensors")
def test_golden_loss_grid(path):
    config = sibling_config(path)
    with Golden(path.parent / "train_loss.safetensors", partial=True) as draws, Golden(path) as g:
        x, _, t, noise = (value.double() for value in training_draws(draws, config))
        output, t = tokens(draws["x_pred_ns1_f32"], config).double(), t.view(-1, 1, 1)
        for name in g.names():
            prediction, space = re.fullmatch(r"pred_(\w+)\.loss_(\w+)", name).groups()
            module = module_from(config, objective=JiTObjective(prediction, space, t_eps=config["t_eps"]))
            close(module.error(output, x, noise, t * x + (1 - t) * noise, t), g[name], rtol=1e-9)


@golden("*/sampling.safetensors")
def test_golden_sampling(path):
    config, module = model_case(path)
    plain, rows = module.velocity, {}

    def counting(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        rows[float(t)] = len(labels)
        return plain(z, t, labels)

    module.velocity = counting
    with Golden(path) as g, torch.no_grad():
        for case in config["sampling_cases"]:
            name, times = case["name"], uniform_times(case["steps"])
            sampling = JiTSampling(case["method"], case["steps"], case["cfg"], tuple(case["interval"]))
            rows.clear()
            noise = tokens(g["noise"] * case["noise_scale"], config)
            path_ = SOLVERS[case["method"]](module.guided_velocity(g["y"], sampling), noise, times)
            states = [module.tokenizer.decode(z) for z in path_]
            close(states[-1], g[f"{name}.f32"], atol=1e-4)
            if f"{name}.f64" in g:
                close(states[-1].double(), g[f"{name}.f64"].double(), atol=1e-4)
            if f"{name}.trajectory_f32" in g:
                expected = g[f"{name}.trajectory_f32"]  # (steps, first images, C, H, W)
                close(torch.stack([state[: expected.shape[1]] for state in states]), expected, atol=1e-4)
            for key in ("guided_f32", "guided_f64"):
                wanted = {t: flag for t, flag in zip(times.tolist(), case[key], strict=True) if t in rows}
                both_ran = {t: count == 2 * len(g["y"]) for t, count in rows.items()}
                assert both_ran == (wanted if case["cfg"] != 1 else dict.fromkeys(rows, False)), (name, key)


@golden("*/*.pth")
def test_golden_checkpoint_has_all_weights(path):
    """Each set loads, and exporting gives back the file's names, shapes, order and bits."""
    config, content = sibling_config(path), read_torch(path)
    assert set(content) == set(config["checkpoint_keys"])
    for key in JiTModule.OFFICIAL_KEYS:
        module = module_from(config)
        module.load_official(path, key=key)
        exported = module.official_state_dict()
        assert list(exported) == list(content[key])
        for name, tensor in content[key].items():
            assert torch.equal(exported[name], tensor), name


@golden("*/train_steps.safetensors", needs="*.pth")
def test_golden_train_steps(path):
    """The official optimiser steps replayed: losses, rates, weights, both averages and the optimiser's moments."""
    config = sibling_config(path)
    content = read_torch(next(path.parent.glob("*.pth")))
    with Golden(path.parent / "init_weights.safetensors") as init:
        module = module_from(config)
        state = {name.removeprefix("init."): init[name] for name in init.names()}
        module.load_weights(to_ours(state, module.official_rules()), origin="init")
    emas = {"model_ema1": config["ema_decay1"], "model_ema2": config["ema_decay2"]}
    ema = EMA(list(emas.values()))
    ema.start(module)
    groups = param_groups(module.named_parameters(), config["weight_decay"], no_weight_decay=module.no_weight_decay)
    optimizer = adamw(groups, module.optim, config["lr"])
    assert [p["weight_decay"] for p in optimizer.param_groups] == [0.0, config["weight_decay"]]
    with Golden(path) as g:
        for step in range(config["steps"]):
            rate = learning_rate(
                step,
                peak=config["lr"],
                warmup=config["warmup_epochs"] * config["steps_per_epoch"],
                total=config["epochs"] * config["steps_per_epoch"],
                schedule=config["lr_schedule"],
                min_lr=config["min_lr"],
            )
            assert rate == pytest.approx(float(g["lrs"][step]), rel=1e-9)
            for group in optimizer.param_groups:
                group["lr"] = rate
            drop = g["drop"][step].bool()
            labels = torch.where(drop, config["num_classes"], g["y"][step])
            x, noise = tokens(g["x"][step], config), tokens(g["noise"][step], config)
            loss = module.denoising_loss(x, labels, g["t"][step], noise).mean()
            close(loss.detach().double(), g["losses"][step].double(), rtol=1e-6)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(module)
        for key, weights in [("model", "raw"), *zip(emas, ema.names, strict=True)]:
            with ema.weights(module, weights):
                for name, tensor in module.official_state_dict().items():
                    close(tensor, content[key][name], atol=5e-6)
        check_moments(module, optimizer, content["optimizer"], config["optimizer_group_order"])
        module.load_official(next(path.parent.glob("*.pth")), key=config["sample"]["weights"])
        sample = config["sample"]
        sampling = JiTSampling(sample["method"], sample["steps"], sample["cfg"], tuple(sample["interval"]))
        start = tokens(g["sample_noise"], config) * module.objective.noise_scale
        with torch.no_grad():
            out = module.tokenizer.decode(module.solve(start, g["sample_y"], sampling))
        close(out, g["sample_ema1"], atol=5e-5)


def check_moments(module, optimizer, official: dict, order: dict[str, list[str]]) -> None:
    """Optimiser state by the official integer ids, which count through the groups."""
    names = [name for group in order.values() for name in group]
    ours = {n: {k: v for k, v in optimizer.state[p].items()} for n, p in module.named_parameters() if p.requires_grad}
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(group) for group in order.values()]
    for moment, atol in (("exp_avg", 5e-6), ("exp_avg_sq", 5e-6)):
        renamed = to_official({name: state[moment] for name, state in ours.items()}, module.official_rules())
        for i, name in enumerate(names):
            close(renamed[name], official["state"][i][moment], atol=atol)
    assert {int(state["step"]) for state in ours.values()} == {
        int(state["step"]) for state in official["state"].values()
    }


@golden("*/ops.safetensors")
def test_golden_ops(path):
    """Sizes are read from the names of the arrays."""
    with Golden(path) as g:
        for name in g.names():
            if crop := re.fullmatch(r"(crop\d+)\.out(\d+)", name):
                image = center_crop(Image.fromarray(g[f"{crop[1]}.in"].numpy()), int(crop[2]))
                pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*image.size[::-1], 3)
                assert (pixels.int() - g[name].int()).abs().max() <= 1
            elif re.fullmatch(r"norm\.out", name):
                assert torch.equal(from_uint8(g["norm.in"]), g[name])
            elif re.fullmatch(r"quant\.out", name):
                assert torch.equal(to_uint8(g["quant.in"]), g[name])
            elif table := re.fullmatch(r"pos_embed\.d(\d+)_g(\d+)", name):
                width, side = map(int, table.groups())
                close(sincos_2d(width, (side, side)), g[name], atol=2e-6)
            elif table := re.fullmatch(r"rope\.hd(\d+)_g(\d+)_ctx(\d+)\.(cos|sin)", name):
                dim, side, prefix = map(int, table.groups()[:3])
                rope = axial_rope(dim, (side, side), num_prefix=prefix)
                close(rope[("cos", "sin").index(table[4])], g[name], atol=2e-6)
                close(apply_rope(g["rope.q_in"], rope), g["rope.q_out"], atol=1e-5)
            elif sinusoid := re.fullmatch(r"time\.sinusoid(\d+)", name):
                close(timestep_features(g["time.t"], int(sinusoid[1])), g[name], atol=2e-6)
            elif grid := re.fullmatch(r"grid\.n(\d+)", name):
                assert torch.equal(uniform_times(int(grid[1])), g[name])
            else:
                assert re.search(r"(\.in|_in|^rope\.q_out|^time\.t)$", name), f"{name} is compared with nothing"


@golden("*/lr_schedule.json")
def test_golden_lr_schedule(path):
    table = read_json(path)
    for schedule, epoch, rate in table["rows"]:
        ours = learning_rate(
            epoch,
            peak=table["lr"],
            warmup=table["warmup_epochs"],
            total=table["epochs"],
            schedule=schedule,
            min_lr=table["min_lr"],
        )
        assert ours == pytest.approx(rate, rel=1e-9, abs=1e-18)


def config_from_shapes(shapes: dict[str, list[int]]) -> dict:
    """Sizes of a network from its official parameter shapes (what shapes can't tell takes any valid value)."""
    width, patch = shapes["net.pos_embed"][2], shapes["net.x_embedder.proj1.weight"][-1]
    context = shapes.get("net.in_context_posemb", [1, 0, width])[1]
    depth = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("net.blocks."))
    hidden = shapes["net.blocks.0.mlp.w3.weight"][1]
    ratios = [ratio for ratio in (4.0, 1.5 * hidden / width, (1.5 * hidden + 1) / width)]
    return {
        "hidden_size": width,
        "depth": depth,
        "num_heads": width // shapes["net.blocks.0.attn.q_norm.weight"][0],
        "mlp_ratio": next(r for r in ratios if int(int(width * r) * 2 / 3) == hidden),
        "bottleneck_dim": shapes["net.x_embedder.proj1.weight"][0],
        "in_channels": shapes["net.x_embedder.proj1.weight"][1],
        "in_context_len": context,
        "in_context_start": 0,
        "img_size": patch * round(shapes["net.pos_embed"][1] ** 0.5),
        "patch_size": patch,
        "num_classes": shapes["net.y_embedder.embedding_table.weight"][0] - 1,
    }


@golden("*/init_rules*.json")
def test_golden_init_rules(path):
    rules = read_json(path)
    module = module_from(config_from_shapes({name: rule["shape"] for name, rule in rules.items()}))
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trainable == {name for name, rule in rules.items() if rule["requires_grad"]}
    state = module.official_state_dict()
    assert set(state) == set(rules)
    for name, rule in rules.items():
        value, bound = state[name], rule["value"]
        assert list(value.shape) == rule["shape"], name
        if rule["init"] in ("zeros", "ones"):
            assert torch.equal(value, torch.full_like(value, rule["init"] == "ones")), name
        elif rule["init"] == "normal":
            assert abs(value.std() / bound - 1) < 5 / (2 * value.numel()) ** 0.5, name
            assert abs(value.mean()) < 5 * bound / value.numel() ** 0.5, name
        elif rule["init"] == "xavier_uniform":
            assert 0.95 * bound < value.abs().max() <= bound, name
            assert abs(value.std() * 3**0.5 / bound - 1) < 5 / value.numel() ** 0.5, name
        else:
            assert rule["init"] == "sincos_fixed", name
            side = round(value.shape[1] ** 0.5)
            assert torch.equal(value[0], sincos_2d(value.shape[2], (side, side)))


@golden("manifest*.json")
def test_golden_manifest(path):
    """Every official name of a released size maps to ours and back, shapes and totals match, and a recipe builds it."""
    manifest = read_json(path)
    name = manifest["variant"].lower().removeprefix("jit-").replace("/", "")
    with torch.device("meta"):
        module = load_module("jit" if name == "b16" else f"jit_{name}")
    assert {n: list(p.shape) for n, p in module.official_state_dict().items()} == manifest["params"]
    assert list(module.official_state_dict()) == list(manifest["params"])
    assert sum(p.numel() for p in module.parameters()) == manifest["total_params"]
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == manifest["trainable_params"]
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == manifest["frozen"]
    assert (module.tokenizer.image_size, module.num_classes) == (manifest["image_size"], manifest["num_classes"])
    official = {n: torch.empty(shape, device="meta") for n, shape in manifest["params"].items()}
    ours = to_ours(official, module.official_rules())
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in module.state_dict().items()}


CONSUMED = (
    r"[^/]+/(config\.json|weights\.safetensors|init_weights\.safetensors|train_steps\.safetensors|[^/]+\.pth)",
    r"[^/]+/(forward|forward_bf16|intermediates|train_loss|train_grads|loss_grid|sampling|ops)\.safetensors",
    r"[^/]+/(lr_schedule|init_rules[^/]*)\.json",
    r"manifest[^/]*\.json",
)


# A file that no test can read alone, and the sibling without which it would go unread.
NEEDS = {
    "forward_bf16.safetensors": "forward.safetensors",
    "intermediates.safetensors": "forward.safetensors",
    "train_grads.safetensors": "train_loss.safetensors",
    "loss_grid.safetensors": "train_loss.safetensors",
    "train_steps.safetensors": "*.pth",
    "init_weights.safetensors": "train_steps.safetensors",
}


def test_golden_no_file_is_left_over():
    """Every file of every case is one of the kinds that the tests above read."""
    files = [p.relative_to(GOLDEN / METHOD).as_posix() for p in golden_files(METHOD)]
    assert files, f"no golden cases in {GOLDEN / METHOD}"
    assert [f for f in files if not any(re.fullmatch(pattern, f) for pattern in CONSUMED)] == []
    orphans = [p for p in golden_files(METHOD) if p.name in NEEDS and not list(p.parent.glob(NEEDS[p.name]))]
    assert [f"{case_id(p)} cannot be read without {NEEDS[p.name]} beside it" for p in orphans] == []
