"""What GIVT's samplers promise, on small random models: caches, guidance in one batch, scores of beams, masks, noise.

The official code's decodes are replayed in test_givt_sampling.py; what the network sees and which settings are errors
is in test_givt_variants.py.
"""

import pytest
import torch
from torch import Tensor

from layers.networks.givt import GIVTConfig
from layers.random import row_generators
from layers.samplers.maskgit import mask_counts
from layers.tokenizers.vectors import VectorTokenizer
from lightning_modules.givt import GIVTModule, GIVTSampling, HeadConfig

SIDE, DIM, CLASSES = 3, 4, 5
LENGTH = SIDE**2
LABELS = torch.tensor([3, 0, 4])
MODES = {
    "causal": ("causal", GIVTSampling(temperature=0.9)),
    "causal, guided": ("causal", GIVTSampling(cfg_scale=1.4, inv_temperature=1.5)),
    "causal, guided by rejection": ("causal", GIVTSampling(cfg_scale=1.4, guidance="rejection")),
    "causal, beams": ("causal", GIVTSampling(num_beams=2, num_fans=3)),
    "masked": ("bidirectional", GIVTSampling(num_iter=4, choice_temperature=2.0)),
    "masked, guided": ("bidirectional", GIVTSampling(num_iter=4, choice_temperature=2.0, cfg_scale=1.3)),
}
every_mode = pytest.mark.parametrize("mode", MODES)
both_kinds = pytest.mark.parametrize("kind", ["diagonal", "per_channel"])


def build(attention: str = "causal", kind: str = "diagonal") -> GIVTModule:
    """A model whose outputs depend on every parameter."""
    torch.manual_seed(0)
    net = GIVTConfig(width=16, depth=2, num_heads=2, mlp_hidden=24, attention=attention)
    head = HeadConfig(num_mixtures=3, kind=kind)
    module = GIVTModule(VectorTokenizer(SIDE, DIM), CLASSES, net, head)
    for p in [*module.net.parameters(), *module.head.parameters()]:
        torch.nn.init.normal_(p, std=0.4)
    return module.eval().requires_grad_(False)


def test_decoding_with_a_cache_equals_teacher_forcing_at_every_position():
    module, x = build(), torch.randn(3, LENGTH, DIM, generator=torch.Generator().manual_seed(1))
    forced, cache = module.net(x, LABELS), module.net.init_cache(3, dtype=torch.float32, device="cpu")
    torch.testing.assert_close(module.net.prefill(LABELS, cache), forced[:, 0], rtol=1e-4, atol=1e-5)
    for j in range(LENGTH - 1):
        torch.testing.assert_close(module.net.step(x[:, j], j, cache), forced[:, j + 1], rtol=1e-4, atol=1e-5)


# Guidance


class ByBranch(torch.nn.Module):
    """A network that is asked for each guidance branch apart, as the official code does, with a cache for each."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seq_len, self.config, self.null_label = net, net.seq_len, net.config, net.null_label
        self.calls = 0

    def _apart(self, call, *tensors: Tensor) -> Tensor:
        halves = zip(*(t.chunk(2) for t in tensors), strict=True)
        self.calls += 1
        return torch.cat([call(branch, *half) for branch, half in enumerate(halves)])

    def forward(self, x: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        return self._apart(lambda _, *half: self.net(*half), x, labels, mask)

    def init_cache(self, batch: int, **options):
        return [self.net.init_cache(batch // 2, **options) for _ in range(2)]

    def prefill(self, labels: Tensor, caches) -> Tensor:
        return self._apart(lambda branch, rows: self.net.prefill(rows, caches[branch]), labels)

    def step(self, token: Tensor, index: int, caches) -> Tensor:
        return self._apart(lambda branch, rows: self.net.step(rows, index, caches[branch]), token)


@pytest.mark.parametrize("mode", [mode for mode in MODES if "guided" in mode])
@both_kinds
def test_guidance_in_one_batch_equals_two_passes(mode, kind):
    attention, sampling = MODES[mode]
    module = build(attention, kind)
    together = module.sample_tokens(LABELS, sampling, row_generators(4, range(3), device="cpu"))
    module.net = ByBranch(module.net)
    apart = module.sample_tokens(LABELS, sampling, row_generators(4, range(3), device="cpu"))
    assert module.net.calls == (LENGTH if attention == "causal" else sampling.num_iter)
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-4)


def test_guidance_fades_out_and_needs_branches_that_differ():
    """Of causal models: masked ones rank tokens by another density under guidance, however weak it is."""
    module = build()

    def drawn(scale: float, labels: Tensor) -> Tensor:
        generators = row_generators(4, range(3), device="cpu")
        return module.sample_tokens(labels, GIVTSampling(cfg_scale=scale), generators)

    off, nobody = drawn(1.0, LABELS), torch.full_like(LABELS, module.net.null_label)
    assert not torch.allclose(drawn(1.4, LABELS), off, atol=1e-2)
    torch.testing.assert_close(drawn(1 + 1e-6, LABELS), off, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(drawn(1.4, nobody), drawn(1.0, nobody), rtol=1e-3, atol=1e-3)


# Draws


@every_mode
@both_kinds
def test_an_image_does_not_depend_on_its_batch(mode, kind):
    attention, sampling = MODES[mode]
    module = build(attention, kind)

    def drawn(images: list[int]) -> Tensor:
        return module.sample_tokens(LABELS[images], sampling, row_generators(7, images, device="cpu"))

    together = drawn([0, 1, 2])
    assert together.shape == (3, LENGTH, DIM) and together.isfinite().all()
    assert not torch.allclose(together[0], together[1])
    torch.testing.assert_close(drawn([2, 1]), together[[2, 1]], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(drawn([0]), together[[0]], rtol=1e-3, atol=1e-4)


@every_mode
def test_labels_and_seeds_decide(mode):
    attention, sampling = MODES[mode]
    module = build(attention)

    def drawn(seed: int, label: int) -> Tensor:
        return module.sample_tokens(torch.tensor([label]), sampling, row_generators(seed, [0], device="cpu"))

    assert torch.equal(drawn(0, 1), drawn(0, 1))
    assert not torch.allclose(drawn(0, 1), drawn(1, 1)) and not torch.allclose(drawn(0, 1), drawn(0, 2))


def test_each_causal_token_is_the_heads_draw_from_those_before():
    """The whole loop at once: given the sequence, every token follows from its own noise by teacher forcing."""
    module, noise = build(), []

    def generator(shape):
        noise.append(torch.randn(*shape))
        return noise[-1]

    x = module.generate(LABELS, GIVTSampling(temperature=0.8), generator)
    h, drawn = module.net(x, LABELS), torch.cat(noise, dim=2)  # (B, n, L, dim)
    again = module.head.sample(h.flatten(0, 1), drawn.transpose(0, 1).flatten(1, 2), temperature=0.8)
    torch.testing.assert_close(x, again.unflatten(0, x.shape[:2]), rtol=1e-3, atol=1e-4)


@both_kinds
def test_scores_of_beams_are_likelihoods_under_the_tempered_model(kind):
    module = build(kind=kind)
    beams = module.beams(LABELS, GIVTSampling(num_beams=3, num_fans=4, temperature=0.8, inv_temperature=1.3))
    assert beams.tokens.shape == (3, 3, LENGTH, DIM)
    h = module.net(beams.tokens.flatten(0, 1), LABELS.repeat_interleave(3))
    log_prob = module.head.distribution(h).tempered(0.8, 1.3).log_prob(beams.tokens.flatten(0, 1))
    log_prob = log_prob.reshape(3, 3, LENGTH, -1).sum(-1)
    torch.testing.assert_close(beams.scores, log_prob.cumsum(-1), rtol=1e-3, atol=1e-3)
    assert (beams.scores[:, :, -1].diff(dim=1) <= 0).all()


def test_beams_of_more_draws_are_likelier():
    module, labels = build(), torch.arange(CLASSES).repeat(8)
    scores = [
        module.beams(labels, GIVTSampling(num_beams=n, num_fans=f), torch.Generator().manual_seed(0)).scores[:, 0, -1]
        for n, f in ((1, 1), (2, 3), (4, 8))
    ]
    assert scores[0].mean() < scores[1].mean() < scores[2].mean()


# Masked decoding


class Seen:
    """Inputs of a bidirectional network, call by call."""

    def __init__(self, module: GIVTModule):
        self.inputs: list[tuple[Tensor, Tensor]] = []
        module.net.register_forward_pre_hook(
            lambda _, inputs: self.inputs.append((inputs[0].clone(), inputs[2].clone()))
        )


@pytest.mark.parametrize("num_iter", [1, 4, LENGTH])
@pytest.mark.parametrize("schedule", ["cosine", "pow:2"])
def test_a_token_once_fixed_is_never_changed(num_iter, schedule):
    module = build("bidirectional")
    seen, sampling = Seen(module), GIVTSampling(num_iter=num_iter, schedule=schedule, choice_temperature=3.0)
    x = module.sample_tokens(LABELS, sampling)
    assert [mask.sum(1).tolist() for _, mask in seen.inputs] == [
        [count] * 3 for count in [LENGTH, *mask_counts(LENGTH, num_iter, schedule)[:-1]]
    ]
    for known, mask in seen.inputs:
        assert torch.equal(known[~mask], x[~mask]) and not known[mask].any()
    for (_, earlier), (_, later) in zip(seen.inputs, seen.inputs[1:], strict=False):
        assert (later <= earlier).all()
