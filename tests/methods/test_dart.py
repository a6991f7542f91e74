"""DART: there is no official code, so the tables of its formulas are the judge, and what the process itself implies.

Here: the golden tables (schedules, masks, posterior, sampler), the loss and the sampler of the module, errors.
Elsewhere: the process in layers/diffusion/test_nomad.py, the network in layers/networks/test_dart.py, variants in
test_dart_variants.py.
"""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.load import load_module
from layers.diffusion.nomad import SCHEDULES, Nomad, NomadTables, loss_weights, mix, nomad_tables
from layers.networks.dart import DARTConfig, Layout, attend
from layers.samplers.nomad import Prediction, denoise
from layers.tokenizers.pixels import PixelTokenizer
from layers.tokenizers.vectors import VectorTokenizer
from layers.tokenizers.vq import VQTokenizer
from lightning_modules.dart import Copies, DARTModule, DARTObjective, DARTSampling
from tests.golden_cases import case_id, golden_files, golden_paths, read_json

# Overrides that shrink any DART recipe; tests/smoke.py and the contract tests run every recipe with them.
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
    "model.init_args.net.mlp_hidden": 64,
    "model.init_args.head.width": 32,
    "model.init_args.head.depth": 2,
    "model.init_args.objective.num_steps": 4,
    "model.init_args.sampling.head_steps": 3,
}
TINY_OF = {
    "dart_xl_512": {"model.init_args.objective.hires_steps": 2},
    "dart_digits": {
        "model.init_args.tokenizer.class_path": "layers.tokenizers.dequantised.DequantisedTokenizer",
        "model.init_args.tokenizer.init_args.image_size": 16,
        "model.init_args.tokenizer.init_args.patch_size": 4,
    },
    "dart_shapes": {
        "model.init_args.text.class_path": "layers.text.byte.ByteTokenizer",
        "model.init_args.text_len": 12,
        "model.init_args.encoder.dim": 16,
        "model.init_args.sampling.prompts": ["class 0", "class 1"],
    },
}

METHOD = "dart"
SECTIONS = {"schedules", "block_causal_masks_noise_first", "gaussian_posterior", "gaussian_sampler"}
TOLERANCE = 1e-9  # relative, golden README
DRAWS = 1000  # whitened, so that their moments are exact


def section(name: str):
    """Parametrise over the files that have this section."""
    paths = [path for path in golden_paths(METHOD, "**/*.json") if name in read_json(path)]
    return pytest.mark.parametrize("path", paths, ids=case_id)


def entries(name: str, *inside: str):
    """Parametrise over a section's named entries in all files."""
    found = []
    for path in golden_paths(METHOD, "**/*.json"):
        table = read_json(path).get(name, {})
        for key in inside:
            table = table.get(key, {})
        found += [pytest.param(path, key, id=f"{case_id(path)}-{key}") for key in table]
    return pytest.mark.parametrize(("path", "key"), found)


def tables_of(name: str) -> NomadTables:
    """The schedule that a name such as "direct_T8" means."""
    schedule, steps = re.fullmatch(rf"({'|'.join(SCHEDULES)})_T(\d+)", name).groups()
    return nomad_tables(int(steps), schedule)


def close(actual: Any, expected: Any, *, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=tolerance, atol=1e-12)


@entries("schedules")
def test_golden_schedules_and_weights(path, key):
    expected, tables = read_json(path)["schedules"][key], tables_of(key)
    assert len(tables.gamma) == expected["T"]
    close(tables.gamma, expected["gamma"])
    close(tables.snr, expected["snr"])
    close(tables.cumulative, expected["S"])
    close(tables.cumulative / (1 + tables.cumulative), expected["gamma_bar"])
    close(loss_weights(tables, "snr_cum")[:-1], expected["w_cum"][:-1])  # the last is floored, in the table it is 0
    assert expected["w_cum"][-1] == 0
    close(loss_weights(tables, "v"), expected["w_v"])
    assert expected["w_elbo"][0] is None  # ours alone
    close(loss_weights(tables, "elbo")[1:], expected["w_elbo"][1:])
    assert set(expected) == {"T", "gamma", "snr", "S", "gamma_bar", "w_cum", "w_v", "w_elbo"}


def test_shares_of_the_cumulative_weight_at_four_steps():
    weights = nomad_tables(4, "direct").cumulative
    np.testing.assert_allclose(weights / weights.sum(), [0.839, 0.140, 0.0206, 0], atol=5e-4)


@entries("block_causal_masks_noise_first")
def test_golden_masks(path, key):
    expected = torch.tensor(read_json(path)["block_causal_masks_noise_first"][key], dtype=torch.bool)
    steps, block = map(int, re.fullmatch(r"T(\d+)_K(\d+)", key).groups())
    q, k = torch.randn(2, 1, 1, steps * block, 8).unbind(0)
    weights = attend(q, k, torch.eye(steps * block)[None, None], Layout((block,) * steps))
    assert torch.equal(weights[0, 0] > 0, expected)


def posterior(tables: NomadTables, mean: float, var: float, weighted_sum: Any, t: int) -> tuple[Any, float]:
    """Mean and variance of x_0 ~ N(mean, var) given x_t..x_T, from the sum of a_tau x_tau over them; t from 1."""
    precision = 1 / var + tables.cumulative[t - 1]
    return (mean / var + weighted_sum) / precision, 1 / precision


def slopes(tables: NomadTables) -> np.ndarray:
    """a_tau = sqrt(gamma) / (1 - gamma): what x_tau adds to the exponent of the posterior per unit of x_0."""
    return np.sqrt(tables.gamma) / (1 - tables.gamma)


@section("gaussian_posterior")
def test_golden_posterior_from_all_copies_and_from_their_sum(path):
    case = read_json(path)["gaussian_posterior"]
    tables, mean, var = tables_of(case["schedule"]), case["prior_mean"], case["prior_var"]
    x = np.array(case["x"])
    close(tables.gamma**0.5 * case["x0"] + (1 - tables.gamma) ** 0.5 * case["eps"], x)
    for t, expected in enumerate(case["posterior_mean_var_given_x_t_to_T"], start=1):
        total = (slopes(tables) * x)[t - 1 :].sum()
        close(posterior(tables, mean, var, total, t), expected, tolerance=1e-10)
        snr = tables.cumulative[t - 1]
        if snr == 0:
            continue  # pure noise: y_t is not defined
        y, gamma = total / np.sqrt(snr * (1 + snr)), snr / (1 + snr)  # as one step of a Markov diffusion
        precision = 1 / var + gamma / (1 - gamma)
        from_y = (mean / var + np.sqrt(gamma) / (1 - gamma) * y) / precision, 1 / precision
        close(from_y, expected, tolerance=1e-10)
    fields = {"schedule", "prior_mean", "prior_var", "x0", "eps", "x", "posterior_mean_var_given_x_t_to_T"}
    assert set(case) == fields


def white(draws: int, steps: int) -> Tensor:
    """Standard normal noise (draws, steps, 1, 1) whose sample moments are exactly 0, 1 and uncorrelated."""
    noise = torch.randn(draws, steps, dtype=torch.float64)
    basis, _ = torch.linalg.qr(noise - noise.mean(0))
    return (basis * draws**0.5).view(draws, steps, 1, 1)


@entries("gaussian_sampler", "xhat0_mean_var_by_t")
def test_golden_sampler_with_the_exact_denoiser(path, key):
    case, tables = read_json(path)["gaussian_sampler"], tables_of(key)
    steps, a = len(tables.gamma), slopes(tables)
    total, seen = 0.0, {}

    def predict(x_t: Tensor, i: int) -> Prediction:
        nonlocal total
        t = steps - i
        total = total + a[t - 1] * x_t
        mean, _ = posterior(tables, case["prior_mean"], case["prior_var"], total, t)
        seen[t] = mean.mean().item(), mean.var(unbiased=False).item()
        return Prediction(mean)

    denoise(predict, white(DRAWS, steps), tables.gamma[::-1].tolist())
    for t, mean, var in case["xhat0_mean_var_by_t"][key]:
        close(seen.pop(t), (mean, var), tolerance=1e-8)
    assert not seen and set(case) == {"prior_mean", "prior_var", "xhat0_mean_var_by_t"}


def test_golden_no_file_and_no_section_is_left_over():
    for path in golden_files(METHOD):
        assert path.suffix == ".json" and set(read_json(path)) <= SECTIONS, case_id(path)


# The module


def tiny(variant: str = "dart", *, num_classes: int = 3, **objective: Any) -> DARTModule:
    """A module on 4x4 pixels in 4 tokens, every parameter of which does something."""
    module = DARTModule(
        PixelTokenizer(4, 2),
        num_classes,
        variant,
        net=DARTConfig(width=32, depth=2, num_heads=2, mlp_hidden=48),
        objective=DARTObjective(**{"num_steps": 3} | objective),
        sampling=DARTSampling(head_steps=2),
        head={"width": 16, "depth": 1},
    )
    for param in module.parameters():
        torch.nn.init.normal_(param, std=0.2)
    return module.eval()


def images(count: int) -> dict[str, Tensor]:
    return {"image": torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8), "label": torch.arange(count) % 3}


def spied(module: DARTModule, name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The arguments of every call of a method."""
    calls, original = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: calls.append(args) or original(*args))
    return calls


def test_training_draws_the_noise_of_each_copy_anew(monkeypatch):
    module = tiny(num_steps=4)
    calls = spied(module, "denoising_loss", monkeypatch)
    module.training_loss(images(512))
    noise = calls[0][0][0].noise
    assert noise.shape == (512, 4, 4, 12)
    between = torch.corrcoef(noise.transpose(0, 1).flatten(1)) - torch.eye(4)
    assert between.abs().max() < 5 / noise[:, 0].numel() ** 0.5


def test_loss_is_written_out():
    module = tiny(weight="snr_cum")
    process, x, noise = module.processes[0], torch.randn(2, 4, 12), torch.randn(2, 3, 4, 12)
    condition = module.net.of_classes(torch.tensor([0, 2]))
    h = module.net(process.noised(x, noise).flatten(1, 2), condition)
    v = module.net.linear(h).view(2, 3, 4, 12)
    xhat = process.clean(process.noised(x, noise), v)
    weights = torch.tensor(loss_weights(nomad_tables(3, "direct"), "snr_cum")[::-1].copy()).float()
    expected = ((xhat - x[:, None]).square().mean((0, 2, 3)) * weights / weights.mean()).mean()
    found = module.denoising_loss([Copies(process, x, noise)], condition)
    assert set(found) == {"loss"}
    torch.testing.assert_close(found["loss"], expected, rtol=1e-4, atol=0)


def test_labels_are_dropped_in_training_alone(monkeypatch):
    module = tiny(label_drop_prob=1.0)
    calls = spied(module.net, "of_classes", monkeypatch)
    module.training_loss(images(4))
    module.train().training_loss(images(4))
    assert calls[0][0].tolist() == [0, 1, 2, 0] and calls[1][0].tolist() == [3] * 4


def sampled(module: DARTModule, scale: float, *, seed: int = 0) -> Tensor:
    labels = torch.tensor([0, 2])
    return module.sample_tokens(labels, DARTSampling(scale, 2), torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_sampling_is_the_formula_step_by_step():
    module, labels, scale = tiny(), torch.tensor([0, 2]), 1.5
    noise = torch.randn(2, 3, 4, 12)
    both = module.net.of_classes(torch.tensor([0, 2, 3, 3]))
    x_t = [noise[:, 0]]
    for i in range(3):
        sequence = torch.cat([*x_t, *([torch.zeros(2, 4, 12)] * (2 - i))], dim=1)  # what follows is not seen
        v = module.net.linear(module.net(sequence.repeat(2, 1, 1), both))[:, 4 * i : 4 * i + 4]
        process: Nomad = module.processes[0]
        cond, uncond = (mixed_back(x_t[i], part, process.gammas[i]) for part in v.chunk(2))
        x = uncond + scale * (cond - uncond)  # of images, where the module guides velocities
        if i < 2:
            x_t.append(mix(x, noise[:, i + 1], process.gammas[i + 1]))
    found = module.generate([noise], {"label": labels}, DARTSampling(scale))
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)


def mixed_back(x_t: Tensor, v: Tensor, gamma: float) -> Tensor:
    return gamma**0.5 * x_t - (1 - gamma) ** 0.5 * v


@pytest.mark.parametrize("variant", ["dart", "dart_ar", "dart_fm"])
def test_without_guidance_the_unconditional_branch_is_not_there(variant, monkeypatch):
    module = tiny(variant)
    calls = spied(module.net, "extend", monkeypatch)
    plain = sampled(module, 1.0)
    assert {len(call[0]) for call in calls} == {2}
    module.net.y_embedder.embedding_table.weight.data[3] += 1  # the null row
    assert torch.equal(sampled(module, 1.0), plain)
    guided = sampled(module, 1.5)
    assert len(calls[-1][0]) == 4 and not torch.allclose(guided, plain)


@pytest.mark.parametrize(("variant", "calls"), [("dart", 3), ("dart_fm", 3), ("dart_ar", 12)])
def test_a_sample_takes_one_call_per_step_and_makes_its_modulations_once(variant, calls, monkeypatch):
    module = tiny(variant)
    steps, conditions = spied(module.net, "extend", monkeypatch), spied(module.net, "of_classes", monkeypatch)
    sampled(module, 1.5)
    assert len(steps) == calls and len(conditions) == 1


# (recipe, published millions of the trunk without the differences that nobody can place; of all trained parameters)
SIZES = [("dart_s", 32.6, 32.6), ("dart", 129.4, 129.4), ("dart_l", 462.6, 462.6), ("dart_xl", 672.9, 672.9)]
SIZES += [("dart_xl_fm", 672.9, 681.2), ("dart_xl_ar", 672.9, 672.9)]


@pytest.mark.parametrize(("recipe", "trunk", "trained"), SIZES)
def test_sizes_of_the_recipes(recipe, trunk, trained):
    with torch.device("meta"):
        module = load_module(recipe)
    assert sum(p.numel() for p in module.net.parameters()) / 1e6 == pytest.approx(trunk, abs=0.05)
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6 == pytest.approx(trained, abs=0.05)
    assert module.net.layout.blocks[:16] == (256,) * 16


def build(**changes: Any) -> DARTModule:
    return DARTModule(**{"tokenizer": PixelTokenizer(4, 2), "num_classes": 3, "objective": {"num_steps": 3}} | changes)


BAD = [
    ({"variant": "dart_xl"}, "variant is 'dart_xl': use dart, dart_ar, dart_fm"),
    ({"objective": {"num_steps": 1}}, "num_steps is 1"),
    ({"objective": {"weight": "snr"}}, "weight is 'snr'"),
    ({"objective": {"schedule": "cosine"}}, "schedule is 'cosine'"),
    ({"objective": {"label_drop_prob": 1.5}}, "label_drop_prob is 1.5"),
    ({"objective": {"hires_steps": -1}}, "hires_steps is -1"),
    ({"objective": {"hires_steps": 1}}, "hires_steps is 1: use 0 .* or 2 and more"),
    ({"objective": {"hires_steps": 2}, "variant": "dart_ar"}, "hires_steps is 2: dart_ar has one resolution"),
    ({"objective": {"hires_steps": 2}, "tokenizer": PixelTokenizer(6, 2)}, "3x3, which has no half"),
    ({"net": {"width": 40, "num_heads": 2}}, "multiple of 16"),
    ({"net": {"step_embed": True}, "variant": "dart_ar"}, "step_embed"),
    ({"head": {"depth": 0}}, "head.depth is 0"),
    ({"sampling": {"head_steps": 0}}, "sampling.head_steps is 0"),
    ({"sampling": {"prompts": ["a cat"]}}, "sampling.prompts .* learns class labels"),
    ({"encoder": {"kind": "t5"}}, "encoder.path is None and encoder.kind t5"),
    ({"coarse_from": "last.ckpt"}, "coarse_from is last.ckpt, but objective.hires_steps is 0"),
    ({"tokenizer": VQTokenizer(16, num_codes=8)}, "tokens are continuous, VQTokenizer makes ids"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_settings_that_cannot_work_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_guidance_of_a_model_that_knows_no_absence_of_labels_is_an_error():
    module = tiny(label_drop_prob=0.0)
    with pytest.raises(ValueError, match=r"cfg_scale is 1\.5, but .*label_drop_prob is 0"):
        sampled(module, 1.5)
    assert sampled(module, 1.0).shape == (2, 4, 12)


def test_tokens_of_any_kind_that_is_continuous_are_learnt():
    module = DARTModule(VectorTokenizer(2, 5), 3, net={"width": 16, "depth": 1, "num_heads": 1, "mlp_hidden": 16})
    assert module.training_loss({"raw": torch.randn(2, 4, 5), "label": torch.tensor([0, 1])})["loss"].isfinite()
