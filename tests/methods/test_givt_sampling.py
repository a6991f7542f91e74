"""GIVT's samplers against the official code: recorded noise is put in, and every step of a decode is compared.

Tolerances are those of the golden README. What samplers promise besides is in test_givt_decoding.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layers.heads.mixtures import KINDS, Gaussian
from layers.samplers.autoregressive import autoregress, beam_search
from layers.samplers.gmm_cfg import Rejection, guided_log_density, guided_rejection, normal_log_prob
from layers.samplers.maskgit import choice_temperatures, maskgit_decode, official_counts
from lightning_modules.givt import GIVTModule, GIVTSampling
from tests.golden_cases import Golden, case_id, golden_paths, read_json
from tests.methods.test_givt import module_of

METHOD = "givt"
CERTAIN = 1e-3  # a decision whose log margin is smaller may fall either way


def golden(pattern: str):
    """Parametrise over the files that match: kinds that are absent are simply not collected."""
    return pytest.mark.parametrize("path", golden_paths(METHOD, f"**/{pattern}.safetensors"), ids=case_id)


def close(actual: Tensor, expected: Tensor, *, a: float = 1e-4, r: float = 1e-3) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=a, rtol=r)


def decode_case(path: Path) -> tuple[dict[str, Any], GIVTModule]:
    """Settings of a decode, and the module with the parameters of the file that the settings name."""
    settings = read_json(path.with_suffix(".json"))
    source = path.with_name(f"{settings['params_from']}.safetensors") if "params_from" in settings else path
    return settings, module_of(source)


def mixture(module: GIVTModule, h: Tensor, settings: dict[str, Any]):
    """The distributions at h (..., E) under the settings' temperatures."""
    temperatures = {
        "temperature": settings.get("temp") or 1.0,
        "inv_temperature": settings.get("temp_probs") or 1.0,
    }
    return module.head.distribution(h).tempered(**temperatures)


def component_at(record: Golden, k: int, like: Tensor, name: str = "") -> Tensor:
    """The recorded choice of step k; where there is a single component, a file may have none."""
    recorded = f"{name}component"
    return record[recorded][k].long() if recorded in record else torch.zeros_like(like, dtype=torch.int64)


def guided_draw(record: Golden, k: int, cond: Tensor, uncond: Tensor, module: GIVTModule, settings: dict) -> Tensor:
    """The tokens of step k by rejection, from h of both branches, compared with all that the official code did."""
    cond, uncond = mixture(module, cond, settings), mixture(module, uncond, settings)
    component = component_at(record, k, record["loc_c"][k])
    c, u = cond.gaussian(component), uncond.gaussian(component)
    for name, value in {"loc_c": c.loc, "scale_c": c.scale, "loc_u": u.loc, "scale_u": u.scale}.items():
        close(value, record[name][k])
    w, noise = settings["cfg_inference_weight"], [record[n][k] for n in ("prop_eps", "prop_u", "fallback_eps")]
    assert len(noise[0]) == settings["max_samples"]
    ours = guided_rejection(*c, *u, w, *noise)
    close(ours.scale_prop, record["scale_prop"][k])
    close(ours.log_fac.exp(), record["fac"][k])
    certain = record["min_log_margin"][k] > CERTAIN
    assert torch.equal(ours.first_accepted[certain], record["first_accepted"][k].long()[certain])
    surplus = (ours.num_accepted - record["num_accepted"][k]).abs()
    assert (surplus <= undecided(c, u, w, *noise[:2], ours)).all()
    close(ours.sample[certain], record["sample"][k][certain])
    if certain.all():
        close(100 * (ours.first_accepted >= 0).float().mean(), record["ok_percent"][k].squeeze())
    return record["sample"][k]


def undecided(c: Gaussian, u: Gaussian, w: float, prop_eps: Tensor, prop_u: Tensor, ours: Rejection) -> Tensor:
    """How many proposals of each channel may be accepted or not; the recorded margin ends at the first accepted."""
    x = c.loc + ours.scale_prop * prop_eps
    log_q = normal_log_prob(x, c.loc, ours.scale_prop)
    margin = guided_log_density(x, *c, *u, w) - (prop_u.log() + ours.log_fac + log_q)
    return (margin.abs() < CERTAIN).sum(0)


def plain_draw(record: Golden, name: str, k: int, h: Tensor, module: GIVTModule, settings: dict[str, Any]) -> Tensor:
    """The tokens of step k from h of the recorded component and noise."""
    component, eps = record[f"{name}component"][k].long(), record[f"{name}eps"][k]
    return mixture(module, h, settings).gaussian(component).sample(eps)


@golden("causal_sample*")
@torch.no_grad()
def test_golden_causal_sampling(path):
    settings, module = decode_case(path)
    with Golden(path) as record:
        if settings.get("cfg_inference_weight"):
            replay_guided(record, module, settings)
        for name, temperatures in nested(settings).items():
            replay_causal(record, name, module, temperatures)


def nested(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Temperatures of each decode in a file that holds several, by the prefix of its tensors."""
    return {f"{name}/": value for name, value in settings.items() if isinstance(value, dict)}


def replay_causal(record: Golden, name: str, module: GIVTModule, settings: dict[str, Any]) -> None:
    labels, logits = record[f"{name}labels"].long(), record[f"{name}logits"]
    cache = module.net.init_cache(len(labels), dtype=torch.float32, device="cpu")

    def draw(h: Tensor, j: int) -> Tensor:
        close(module.head.linear(h), logits[j, :, 0])
        return plain_draw(record, name, j, h[:, None], module, settings)[:, 0]

    first = module.net.prefill(labels, cache)
    tokens = autoregress(first, lambda token, j: module.net.step(token, j, cache), draw, module.net.seq_len)
    close(tokens, record[f"{name}sequences"])


def replay_guided(record: Golden, module: GIVTModule, settings: dict[str, Any]) -> None:
    """Both branches in one batch, where the official code has two calls of the network and two caches."""
    labels = record["labels"].long()
    both = torch.cat([labels, torch.full_like(labels, module.net.null_label)])
    cache = module.net.init_cache(len(both), dtype=torch.float32, device="cpu")

    def draw(h: Tensor, j: int) -> Tensor:
        cond, uncond = h[:, None].chunk(2)
        close(module.head.linear(cond), record["logits"][j])
        close(module.head.linear(uncond), record["logits_uncond"][j])
        return guided_draw(record, j, cond, uncond, module, settings)[:, 0]

    def step(token: Tensor, j: int) -> Tensor:
        return module.net.step(torch.cat([token, token]), j, cache)

    close(autoregress(module.net.prefill(both, cache), step, draw, module.net.seq_len), record["sequences"])


class BeamReplay:
    """The callables of `beam_search` with the recorded draws; each call is compared with its step of the record."""

    def __init__(self, record: Golden, module: GIVTModule, settings: dict[str, Any]) -> None:
        self.record, self.module, self.settings = record, module, settings
        self.beams, self.fans = settings["beam_size"], settings["fan_size"]
        self.labels = record["labels"].long().repeat_interleave(self.beams)
        self.cache = module.net.init_cache(len(self.labels), dtype=torch.float32, device="cpu")
        self.parents = self.tokens = None  # by the recorded choice of the latest step
        self.totals = torch.zeros(len(self.labels))  # log-probability of each beam's tokens so far

    def first(self) -> Tensor:
        return self.module.net.prefill(self.labels, self.cache)

    def step(self, token: Tensor, j: int) -> Tensor:
        close(token, self.tokens)
        return self.module.net.step(token, j, self.cache)

    def reorder(self, index: Tensor) -> None:
        assert torch.equal(index, self.parents)
        self.cache.reorder(index)

    def propose(self, h: Tensor, j: int, fans: int) -> tuple[Tensor, Tensor]:
        if j == 0:
            return self._first(h)
        record, k = self.record, j - 1  # the record's steps begin after the first token
        assert fans == self.fans
        close(self.module.head.linear(h), record["step_logits"][k].flatten(0, 1))
        tokens = record["new_tokens"][k].unflatten(1, (self.beams, fans)).flatten(0, 1)  # (B nb, F, D)
        log_probs = mixture(self.module, h[:, None], self.settings).log_prob(tokens)  # (B nb, F) or (B nb, F, D)
        recorded = record["new_logprobs"][k].unflatten(1, (self.beams, fans)).flatten(0, 1)
        close(log_probs.reshape(recorded.shape), recorded, a=1e-3, r=1e-4)
        log_probs = log_probs.reshape(*tokens.shape[:2], -1).sum(-1)
        self._choose(record["total_logprobs"][k], self.totals[:, None] + log_probs, tokens, record["top_indices"][k])
        return tokens, log_probs

    def _first(self, h: Tensor) -> tuple[Tensor, Tensor]:
        self.tokens = self.record["first_tokens"][:, 0]
        log_probs = mixture(self.module, h, self.settings).log_prob(self.tokens)
        recorded = self.record["first_logprobs"][:, 0]
        close(log_probs.reshape(recorded.shape), recorded, a=1e-3, r=1e-4)
        self.totals = log_probs.reshape(*recorded.shape).sum(-1)
        return self.tokens[:, None], self.totals[:, None]

    def _choose(self, recorded: Tensor, totals: Tensor, tokens: Tensor, top: Tensor) -> None:
        """What the next calls must be given, by the recorded choice top (B, nb) among the beams' draws."""
        images, top = torch.arange(len(top))[:, None], top.long()
        totals, tokens = totals.reshape(recorded.shape), tokens.reshape(*recorded.shape, -1)  # (B, nb F), (.., D)
        close(totals * self.times, recorded, a=1e-3, r=1e-4)
        self.parents = (images * self.beams + top // self.fans).flatten()
        self.tokens, self.totals = tokens[images, top].flatten(0, 1), totals[images, top].flatten()

    @property
    def times(self) -> int:
        """How often the official code counts a log-probability: that of a whole token once for each channel."""
        return 1 if self.settings.get("per_channel_mixtures", True) else self.settings["out_dim"]


@golden("beam_*")
@torch.no_grad()
def test_golden_beam_search(path):
    settings, module = decode_case(path)
    with Golden(path) as record:
        assert all(record[name].numel() for name in record.names() if name.startswith("params/"))  # read by module_of
        replay = BeamReplay(record, module, settings)
        calls = (replay.step, replay.propose, replay.reorder)
        sizes = {"num_beams": replay.beams, "num_fans": replay.fans}
        beams = beam_search(replay.first(), *calls, settings["seq_len"], **sizes, surplus=True)
        close(beams.tokens, record["all_beams_sequences"])
        close(beams.tokens[:, 0], record["final_sequences"])
        recorded = record["all_beams_cum_logprobs"]
        close(replay.times * beams.scores, recorded.sum(-1), a=1e-3, r=1e-4)
        close(replay.times * beams.scores[:, 0, -1], record["final_logprobs"], a=1e-3, r=1e-4)


class MaskedReplay:
    """`propose` and `gumbel` of `maskgit_decode` with the recorded draws; each position is compared with the record."""

    def __init__(self, record: Golden, module: GIVTModule, settings: dict[str, Any]) -> None:
        self.record, self.module, self.settings = record, module, settings
        self.labels = record["labels"].long()
        self.guided = settings["cfg_inference_weight"] > 0

    def propose(self, x: Tensor, unknown: Tensor, positions: Tensor, k: int) -> tuple[Tensor, Tensor]:
        record = self.record
        assert torch.equal(unknown, record["unknown"][k].bool())
        if k:
            close(x, record["next_input"][k - 1])
            assert torch.equal(unknown, record["masking"][k - 1].bool())
            newly = record["unknown"][k - 1].bool() & ~unknown
            assert torch.equal(newly, record["newly_uncovered"][k - 1].bool())
        tokens, log_prob = (self._guided if self.guided else self._plain)(x, unknown, k)
        rows = torch.arange(len(x))[:, None]
        return tokens[rows, positions], log_prob[rows, positions]

    def gumbel(self, k: int) -> Tensor:
        return self.record["gumbel"][k]

    def _plain(self, x: Tensor, unknown: Tensor, k: int) -> tuple[Tensor, Tensor]:
        h = self._h(x, self.labels, unknown, self.record["logits"][k])
        sample = plain_draw(self.record, "", k, h, self.module, self.settings)
        tokens = torch.where(unknown[..., None], sample, x)
        log_prob = mixture(self.module, h, self.settings).log_prob(tokens)
        return tokens, self._confidence(log_prob, k)

    def _guided(self, x: Tensor, unknown: Tensor, k: int) -> tuple[Tensor, Tensor]:
        nobody = torch.full_like(self.labels, self.module.net.null_label)
        cond = self._h(x, self.labels, unknown, self.record["logits"][k])
        uncond = self._h(x, nobody, unknown, self.record["logits_uncond"][k])
        sample = guided_draw(self.record, k, cond, uncond, self.module, self.settings)
        tokens = torch.where(unknown[..., None], sample, x)
        gaussians = [self.record[name][k] for name in ("loc_c", "scale_c", "loc_u", "scale_u")]
        log_prob = guided_log_density(tokens, *gaussians, self.settings["cfg_inference_weight"])
        return tokens, self._confidence(log_prob, k)

    def _h(self, x: Tensor, labels: Tensor, unknown: Tensor, logits: Tensor) -> Tensor:
        h = self.module.net(x, labels, unknown)
        close(self.module.head.linear(h), logits)
        return h

    def _confidence(self, log_prob: Tensor, k: int) -> Tensor:
        """Of whole tokens (B, L); the official code keeps densities."""
        recorded = self.record["prob"][k]
        log_prob = log_prob.reshape(*recorded.shape, -1).sum(-1)
        close(log_prob.exp(), recorded)
        return log_prob


@golden("maskgit_decode_*")
@torch.no_grad()
def test_golden_masked_decoding(path):
    settings, module = decode_case(path)
    num_iter = settings["num_steps"]
    with Golden(path) as record:
        replay = MaskedReplay(record, module, settings)
        size, seq_len, dim = record["final"].shape
        counts = official_counts(seq_len, num_iter, settings["schedule"])
        assert (record["mask_len"].flatten(1) == torch.tensor(counts)[:, None]).all()
        temperatures = choice_temperatures(
            settings["choice_temperature"], num_iter, anneal=settings["should_anneal_temperature"]
        )
        close(torch.tensor(temperatures), record["choice_temp"])
        x, positions = torch.zeros(size, seq_len, dim), torch.arange(seq_len).expand(size, -1)
        x = maskgit_decode(x, positions, replay.propose, counts=counts, temperatures=temperatures, gumbel=replay.gumbel)
        close(x, record["final"])
        last = counts.index(0)
        assert torch.equal(record["newly_uncovered"][last], record["unknown"][last])
        for k in range(last, num_iter):
            close(x, record["next_input"][k])
            assert not record["masking"][k].any()
            if k > last:  # what the official code still computes when all are known
                replay.propose(x, torch.zeros(size, seq_len, dtype=torch.bool), positions, k)


# The same decodes by the module's own loops, with noise that makes its draws the recorded ones


class Recorded:
    """A source of normal noise that hands out given tensors in turn."""

    def __init__(self) -> None:
        self.draws: list[Tensor] = []

    def __call__(self, shape: Sequence[int]) -> Tensor:
        noise = self.draws.pop(0).float()
        assert noise.shape == tuple(shape)
        return noise


def choosing(record: Golden, name: str, k: int, module: GIVTModule, settings: dict[str, Any]) -> Tensor:
    """Normal numbers (B, L, 1) or (B, L, D) that choose the recorded components of step k: amid their mass."""
    kind = KINDS[module.head.kind].parse(record[f"{name}logits"][k], module.head.token_dim)
    weights = (kind.logits * (settings.get("temp_probs") or 1.0)).double().softmax(-1)
    component = component_at(record, k, kind.logits[..., 0], name)[..., None]
    amid = (weights.cumsum(-1) - weights / 2).gather(-1, component)
    return torch.special.ndtri(amid).flatten(2)


def module_sampling(settings: dict[str, Any]) -> GIVTSampling:
    """The module's settings for a record's."""
    weight = settings.get("cfg_inference_weight", 0.0)
    return GIVTSampling(
        temperature=settings.get("temp") or 1.0,
        inv_temperature=settings.get("temp_probs") or 1.0,
        cfg_scale=1 + weight,
        guidance="rejection" if weight else "closed_form",
        num_iter=settings.get("num_steps", 1),
        schedule=settings.get("schedule", "cosine"),
        choice_temperature=settings.get("choice_temperature", 1.0),
        anneal=settings.get("should_anneal_temperature", True),
    )


def head_noise(record: Golden, name: str, k: int, module: GIVTModule, settings: dict[str, Any]) -> Tensor:
    """The head's noise of step k (B, n, L, dim), all tokens of the step: see GMMHead.noise_shape."""
    choice = choosing(record, name, k, module, settings)
    if not settings.get("cfg_inference_weight"):
        return torch.cat([choice, record[f"{name}eps"][k]], dim=-1)[:, None]
    trials = torch.special.ndtri(record["prop_u"][k].double())
    proposals = torch.cat([record["prop_eps"][k], trials], dim=-1).transpose(0, 1)  # (B, 1000, L, 2D)
    eps = record["fallback_eps"][k]
    rest = torch.zeros(*eps.shape[:-1], eps.shape[-1] - choice.shape[-1])
    return torch.cat([torch.cat([choice, rest, eps], dim=-1)[:, None], proposals], dim=1)


@golden("causal_sample*")
@torch.no_grad()
def test_the_module_decodes_as_recorded(path):
    settings, module = decode_case(path)
    record = Golden(path, partial=True)
    for name, case in (nested(settings) or {"": settings}).items():
        noise = Recorded()
        noise.draws = [head_noise(record, name, k, module, case) for k in range(module.net.seq_len)]
        tokens = module.generate(record[f"{name}labels"].long(), module_sampling(case), noise)
        close(tokens, record[f"{name}sequences"])


@golden("maskgit_decode_*")
@torch.no_grad()
def test_the_module_fills_as_recorded(path):
    settings, module = decode_case(path)
    record, noise, sampling = Golden(path, partial=True), Recorded(), module_sampling(settings)
    size, seq_len, dim = record["final"].shape
    x, positions = torch.zeros(size, seq_len, dim), torch.arange(seq_len).expand(size, -1)
    for k, unknown in enumerate(record["unknown"].bool()):
        drawn = head_noise(record, "", k, module, settings).transpose(1, 2)[unknown]  # (B R, n, dim)
        gumbel = record["gumbel"][k].double()
        noise.draws += [drawn.unflatten(0, (size, -1)).transpose(1, 2), torch.special.ndtri((-(-gumbel).exp()).exp())]
    if settings["num_steps"] > seq_len:
        with pytest.raises(ValueError, match=f"num_iter is {settings['num_steps']}"):
            module.fill(x, positions, record["labels"].long(), sampling, noise)
    else:
        close(module.fill(x, positions, record["labels"].long(), sampling, noise), record["final"])
