"""MAR's Diffusion Loss against the official code: network, loss, single reverse steps, whole loops, tables.

Cases are discovered, sizes and settings are read from each config.json or from the names of the arrays. Tolerances are
those of the golden README.
"""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from layers.diffusion.gaussian import Coefficients, GaussianProcess, kept_timesteps, q_sample
from layers.embed import timestep_features
from layers.heads.diffusion import DiffusionHead
from tests.golden_cases import Golden, case_id, golden_paths, read_json

METHOD = "mar"
PREFIX = "diffloss.net."
FLOAT32_ULP = torch.finfo(torch.float32).eps


def golden(name: str):
    """Parametrise over every file of that name, at any depth."""
    return pytest.mark.parametrize("path", golden_paths(METHOD, f"**/{name}"), ids=case_id)


def head_case(path: Path) -> tuple[dict, DiffusionHead]:
    """The configuration beside a file, and the head with the weights beside it."""
    config = read_json(path.parent / "config.json")
    model = config["model"]
    head = DiffusionHead(
        config["token_dim"], model["decoder_embed_dim"], width=model["diffloss_w"], depth=model["diffloss_d"]
    )
    weights = load_file(path.parent / "weights.safetensors")
    head.net.load_state_dict({n.removeprefix(PREFIX): w for n, w in weights.items() if n.startswith(PREFIX)})
    return config, head.eval()


def tight(actual: Tensor, expected: Tensor, *, relative: float = 1e-5, atol: float = 0.0) -> None:
    """max |difference| <= relative * max(1, max |expected|)."""
    atol = max(atol, relative * max(1.0, expected.abs().max().item()))
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0, check_dtype=False)


@golden("diffloss_unit.safetensors")
def test_golden_network(path):
    _, head = head_case(path)
    net, hidden = head.net, {}
    for k, block in enumerate(net.res_blocks):
        block.register_forward_hook(lambda _, inputs, output, k=k: hidden.update({f"res_block_{k}": output}))
    with Golden(path, partial=True) as g, torch.no_grad():
        features = timestep_features(g["temb_t"], net.time_embed.num_features)
        # the frequencies are float32 exponentials, whose last bit depends on the machine: an ulp of the angle at most
        close_angles(features, g["temb_sinusoid"], g["temb_t"])
        tight(net.embed_time(g["temb_t"]), g["temb_mlp"])
        tight(net(g["x_t"], g["t"], g["z_cond"]), g["net_out"])
        assert {name for name in g.names() if name.startswith("res_block_")} == set(hidden)
        for name, value in hidden.items():
            tight(value, g[name])


def close_angles(features: Tensor, expected: Tensor, t: Tensor) -> None:
    atol = 1e-5 + FLOAT32_ULP * t[:, None]
    assert ((features - expected).abs() <= atol).all()


@golden("diffloss_unit.safetensors")
def test_golden_guidance(path):
    config, head = head_case(path)
    with Golden(path, partial=True) as g, torch.no_grad():
        rows = len(g["z_cond"])
        y = head.net.embed_time(g["t"]) + head.net.cond_embed(torch.stack([g["z_cond"], g["z_uncond"]]))
        x = g["cfg_x"][:rows]
        eps, v = head._predict(x, head.net.modulations(y), torch.tensor(config["steps_cfg"]))
        expected_eps, expected_v = g["cfg_out"].chunk(2, dim=-1)
        tight(eps.repeat(2, 1), expected_eps)
        tight(v, expected_v[:rows])  # what is used
        tight(head.net.step(x, head.net.modulations(y)).chunk(2, dim=-1)[1].flatten(0, 1), expected_v)


def terms(head: DiffusionHead, g: Golden, x: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Rows of one draw each."""
    out = head.loss(x, g["z_cond"], t[None], g["noise"][None])
    return {name: value[0] for name, value in out.items()}


@golden("diffloss_unit.safetensors")
def test_golden_loss_terms(path):
    _, head = head_case(path)
    with Golden(path, partial=True) as g, torch.no_grad():
        x_t = q_sample(g["target"], g["noise"], Coefficients.at(head.coefficients, g["t"]))
        tight(x_t, g["x_t"])
        for name, value in terms(head, g, g["target"], g["t"]).items():
            tight(value, g[name])
        at_zero = terms(head, g, g["t0_target"], torch.zeros_like(g["t"]))
        tight(at_zero["mse"], g["t0_mse"])
        tight(at_zero["vb"], g["t0_vb"])


@golden("diffloss_unit.safetensors")
def test_golden_unit_is_consumed(path):
    """The names that the three tests above take, whatever the depth."""
    taken = r"t|temb_(t|sinusoid|mlp)|cfg_(x|out)|loss|mse|vb|net_out|noise|res_block_\d+|t0_(mse|vb|target)|target|x_t"
    with Golden(path, partial=True) as g:
        assert [name for name in g.names() if not re.fullmatch(rf"{taken}|z_(un)?cond", name)] == []


@golden("diffloss_steps.safetensors")
def test_golden_single_reverse_steps(path):
    config, head = head_case(path)
    scale = torch.tensor(config["steps_cfg"])
    with Golden(path) as g, torch.no_grad():
        cond = head.net.cond_embed(torch.stack([g["z_cond"], g["z_uncond"]]))
        for key in sorted({name.split(".")[0] for name in g.names() if "." in name}):
            num_steps = int(key[1:])
            table, timesteps = head._constants(num_steps, cond.device)
            assert torch.equal(timesteps, g[f"{key}.t_orig"])
            assert g[f"{key}.index"].tolist() == list(range(num_steps))[::-1]
            for k in range(num_steps):
                modulations = head.net.modulations(head.net.embed_time(timesteps[k]) + cond)
                check_step(head, g, key, k, table[k], modulations, scale, config["steps_temperature"])


def check_step(head, g: Golden, key: str, k: int, row: Tensor, modulations, scale: Tensor, temperature: float) -> None:
    """Step k of `key`, from the recorded x_t: the quantities of the reverse step, and the sample by the loop's body."""
    x_t, noise, c = g[f"{key}.x_t"][k], g[f"{key}.noise"][k], Coefficients(*row.unbind())
    step = head._reverse(x_t, modulations, c, scale)
    draws = noise[None] * temperature * c.adds_noise
    sample = head._chain(x_t, draws, row[None], [m[None] for m in modulations], scale, "ddpm")
    amplified = 1e-3 if k == 0 else 1e-5
    tight(step.log_variance, g[f"{key}.log_variance"][k])
    tight(step.mean, g[f"{key}.mean"][k], relative=amplified)
    tight(sample, g[f"{key}.sample"][k], relative=amplified)
    # an error of eps is multiplied by sqrt(1 / alpha - 1) here
    near_noise = 1e-5 * max(1.0, c.sqrt_recipm1_alphas_cumprod.item())
    tight(step.pred_xstart, g[f"{key}.pred_xstart"][k], relative=amplified, atol=near_noise if k else 0.0)


def in_float64(head: DiffusionHead) -> DiffusionHead:
    """The head in float64; coefficients and sinusoid keep their float32 values, as in the golden float64 loops."""
    head.net.time_embed.mlp.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    return head.double()


@golden("diffloss_loops.safetensors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_loops(path, dtype):
    _, head = head_case(path)
    head = head if dtype == torch.float32 else in_float64(head)
    with Golden(path) as g, torch.no_grad():
        z, uncond = g["z_cond"].to(dtype), g["z_uncond"].to(dtype)
        for key in sorted({name.rpartition(".")[0] for name in g.names() if "." in name}):
            num_steps, scale, temperature = re.fullmatch(r"s(\d+)_cfg([\d.]+)_temp([\d.]+)", key).groups()
            start, draws = g[f"{key}.init_noise"], g[f"{key}.step_noise"][:, : len(z)]
            out = head.sample(
                z,
                torch.cat([start[None], draws]).to(dtype),
                uncond=uncond,
                cfg_scale=float(scale),
                temperature=float(temperature),
                num_steps=int(num_steps),
                solver="ddpm",
            )
            assert out.dtype == dtype
            for reference in ("out", "out_f64"):
                tight(out.double(), g[f"{key}.{reference}"].double(), relative=1e-5 if int(num_steps) >= 100 else 1e-3)


@golden("schedules.safetensors")
def test_golden_schedules(path):
    with Golden(path) as g:
        prefixes = {name.split(".")[0] for name in g.names()}
        (base,) = (int(p.removeprefix("base")) for p in prefixes if p.startswith("base"))
        process = GaussianProcess.cosine(base)
        shorter = {p: process.respaced(p[1:]) if p.startswith("r") else process for p in prefixes}
        for name in g.names():
            prefix, _, table = name.partition(".")
            actual = torch.from_numpy(getattr(shorter[prefix], table))
            torch.testing.assert_close(actual, g[name], rtol=1e-12, atol=0)


@golden("respacing.json")
def test_golden_respacing(path):
    for sections, kept in read_json(path).items():
        assert kept_timesteps(1000, sections) == kept, sections
