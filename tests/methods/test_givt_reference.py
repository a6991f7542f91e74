"""The fast path equals the plain one of benchmarks/references/givt.py: loss, gradients, samples of the same draws; the
law of guided draws, for which the two take different numbers; parts of the benchmark."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.references import gmm
from benchmarks.references.givt import Reference
from benchmarks.references.gmm import Draws, HeadSize, draw
from layers.flows.adapter import AdapterConfig
from layers.heads.gmm import GMMHead
from layers.heads.mixtures import quantile
from layers.networks.givt import GIVTConfig
from layers.samplers.maskgit import gumbel_from_normal, mask_weights
from layers.tokenizers.base import Tokens
from layers.tokenizers.pixels import PixelTokenizer
from lightning_modules.givt import GIVTModule, GIVTObjective, GIVTSampling, HeadConfig

LABELS = torch.tensor([0, 1, 4])
LENGTH, DIM = 16, 12
GUIDED, PLAIN = {"cfg_scale": 1.6, "guidance": "rejection", "temperature": 0.9}, {"inv_temperature": 1.5}
kinds = pytest.mark.parametrize("kind", ["diagonal", "per_channel"])
BIDIRECTIONAL = {"attention": "bidirectional"}
styles = pytest.mark.parametrize("net", [{}, BIDIRECTIONAL, BIDIRECTIONAL | {"mask_style": "replace"}])
settings = pytest.mark.parametrize("settings", [PLAIN, GUIDED], ids=["plain", "guided"])


def tiny(kind: str = "diagonal", adapter: int = 0, **net) -> GIVTModule:
    """Every weight is random, so that initialisation hides nothing; 16 tokens of 12 numbers."""
    config, objective = GIVTConfig(32, 2, 2, 64, dropout=0.0, **net), GIVTObjective(mask_rate_min=0.2)
    head, flow = HeadConfig(4, kind), AdapterConfig(adapter, 12)
    module = GIVTModule(PixelTokenizer(8, 2), 5, config, head, flow, objective)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.eval()


# Training


@kinds
@styles
def test_loss_and_every_gradient(kind, net):
    module, reference = tiny(kind, adapter=2, **net), Reference(tiny(kind, adapter=2, **net))
    reference.module.load_state_dict(module.state_dict())
    x, labels = torch.randn(3, LENGTH, DIM), torch.tensor([0, 4, module.net.null_label])
    if module.causal:
        ours, mask = module.causal_loss(Tokens(x), labels, {}), None
    else:
        mask = torch.rand(3, LENGTH) < torch.tensor([[0.3], [0.6], [0.9]])
        ours = module.masked_loss(x, labels, mask_weights(mask))
    plain = reference.likelihood_loss(x, labels, mask)
    torch.testing.assert_close(ours["loss"], plain, rtol=1e-5, atol=0)
    ours["loss"].backward()
    plain.backward()
    for (name, a), b in zip(module.named_parameters(), reference.module.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert b.grad is None or (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm() + 1e-8, name


@styles
@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_draws_of_its_own(net, grad_checkpointing):
    module = tiny(grad_checkpointing=grad_checkpointing, **net).train()
    batch = {"image": torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), "label": torch.arange(4)}
    reference = Reference(module)
    reference.loss(batch).backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    module.eval()
    tokens = reference.sample(LABELS, GIVTSampling(cfg_scale=1.5, num_iter=3))
    assert tokens.shape == (3, LENGTH, DIM) and tokens.isfinite().all()


def test_labels_are_dropped_and_masks_drawn_at_the_objectives_rates():
    """The plain loss of many images has the mean of ours."""
    module = tiny(**BIDIRECTIONAL).train()
    batch = {"image": torch.randint(0, 256, (2048, 3, 8, 8), dtype=torch.uint8), "label": torch.arange(2048) % 5}
    with torch.no_grad():
        ours, plain = module.training_loss(batch)["loss"], Reference(module).loss(batch)
    torch.testing.assert_close(ours, plain, rtol=5e-3, atol=0)


# Sampling


class Recorded(Draws):
    """Draws that are kept, in the order of `GMMHead.noise_shape`, so that our sampler can be given the same."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.steps: list[list[Tensor]] = []  # of each decoding step: choice, then what followed
        self.gumbels: list[Tensor] = []

    def component(self, logits: Tensor) -> Tensor:
        choice = torch.randn(logits.shape[:-1])
        self.chosen = quantile(logits, torch.special.ndtr(choice.double()))
        self.steps.append([choice])
        return self.chosen

    def normal(self, *shape: int) -> Tensor:
        noise = torch.randn(shape)
        if len(shape) == 3 and shape[0] != gmm.PROPOSALS:  # every component's, of which one counts
            axis = -2 if self.chosen.ndim == 1 else -1
            index = self.chosen[:, None, None] if axis == -2 else self.chosen[..., None]
            self.steps[-1].append(noise.take_along_dim(index, axis).squeeze(axis))
        else:
            self.steps[-1].append(noise)
        return noise

    def uniform(self, *shape: int) -> Tensor:
        self.steps[-1].append(torch.randn(shape))
        return torch.special.ndtr(self.steps[-1][-1])

    def gumbel(self, *shape: int) -> Tensor:
        self.gumbels.append(torch.randn(shape))
        return gumbel_from_normal(self.gumbels[-1])

    def noise(self, step: int) -> Tensor:
        """(n, R, dim) for the head: R rows of the step, whose tokens are all there are."""
        choice, first, *others = self.steps[step]
        choice = choice.view(len(choice), -1)
        if not others:
            return torch.cat([choice, first], dim=1)[None]
        trial, fallback = others
        choice = torch.cat([choice, torch.zeros(len(choice), DIM - choice.shape[1])], dim=1)
        return torch.cat([torch.cat([choice, fallback], dim=1)[None], torch.cat([first, trial], dim=2)])


def replay(noise: Sequence[Tensor]) -> Callable[[Sequence[int]], Tensor]:
    """A source of noise that hands these out, one after the other."""
    left: Iterator[Tensor] = iter(noise)

    def source(shape: Sequence[int]) -> Tensor:
        found = next(left)
        assert found.shape == shape
        return found

    return source


def by_image(noise: Tensor) -> Tensor:
    """(n, B R, dim) -> (B, n, R, dim), as the sampler asks for it."""
    return noise.unflatten(1, (len(LABELS), -1)).transpose(0, 1)


@kinds
@settings
@torch.no_grad()
def test_causal_samples(kind, settings):
    """Two branches one after the other, stores of full length and one step too many change nothing."""
    module, draws, sampling = tiny(kind), Recorded(), GIVTSampling(**settings)
    plain = Reference(module).generate(LABELS, sampling, draws)
    assert len(draws.steps) == LENGTH + 1
    ours = module.generate(LABELS, sampling, replay([by_image(draws.noise(j)) for j in range(LENGTH)]))
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


@kinds
@settings
@pytest.mark.parametrize("mask_style", ["concat", "replace"])
@torch.no_grad()
def test_maskgit_samples(kind, settings, mask_style):
    """Heads of known tokens and kept mixtures change nothing: ours takes the draws of unknown tokens alone."""
    module, draws = tiny(kind, attention="bidirectional", mask_style=mask_style), Recorded()
    sampling = GIVTSampling(num_iter=4, choice_temperature=3.0, **settings)
    plain = Reference(module).fill(LABELS, sampling, draws)
    assert len(plain.kept) == len(plain.unknown) == 4 and plain.kept[0][0].loc.shape[0] == 3 * LENGTH
    noise = []
    for k, unknown in enumerate(plain.unknown):
        noise += [by_image(draws.noise(k)[:, unknown.flatten()]), draws.gumbels[k]]
    ours = module.sample_tokens(LABELS, sampling, replay(noise))
    torch.testing.assert_close(ours, plain.tokens, atol=1e-4, rtol=1e-4)


def distance(a: Tensor, b: Tensor) -> float:
    """The largest Kolmogorov-Smirnov distance over channels of samples (R, D)."""
    grid = torch.linspace(-6, 6, 201)[:, None, None]
    return ((a < grid).float().mean(1) - (b < grid).float().mean(1)).abs().max().item()


@kinds
@torch.no_grad()
def test_closed_form_guidance_has_the_law_of_the_plain_rejection(kind):
    head, rows = GMMHead(2, 1, num_mixtures=4, kind=kind), 1000
    head.linear.weight.fill_(-0.5)  # with the label locs are lower and scales smaller, by what guidance exaggerates
    pair = torch.ones(rows, 1), torch.zeros(rows, 1)
    plain, _ = draw([head.distribution(h) for h in pair], 1.5, Draws("cpu"))
    noise = torch.randn(1, rows, head.noise_shape(1, "closed_form")[1])
    guided = head.sample(pair[0], noise, uncond=pair[1], cfg_scale=2.5)
    limit = 1.95 * (2 / rows) ** 0.5  # Kolmogorov-Smirnov's at 0.001
    assert distance(guided, plain) < limit < 0.7 * distance(head.sample(pair[0], noise), plain)


@pytest.mark.parametrize("setting", [{"top_p": 0.9}, {"clip_sigmas": 2.0}, {"num_fans": 2}])
def test_what_is_not_done_plainly_is_refused(setting):
    with pytest.raises(ValueError, match="neither beams nor truncated"):
        Reference(tiny()).sample(LABELS, GIVTSampling(**setting))
    module = tiny()
    module.head = GMMHead(DIM, 32, num_mixtures=1, kind="full")
    with pytest.raises(ValueError, match=r"no head\.kind=full"):
        Reference(module)


# Parts


@pytest.fixture
def small_heads(monkeypatch):
    monkeypatch.setitem(gmm.HEADS, "cpu", (HeadSize("small", 4, 8, 16, 600, (10,)),))
    monkeypatch.setattr("layers.heads.chunked.MIN_CHUNK_ROWS", 64)
    monkeypatch.setattr("layers.heads.chunked.CHUNK_BYTES", 1)


@pytest.mark.parametrize("net", [{}, BIDIRECTIONAL])
def test_parts_do_the_same_work_in_both_ways(net, small_heads):
    names = []
    for part in Reference(tiny(**net)).parts(2):
        torch.manual_seed(1)
        plain = part.plain()
        torch.manual_seed(1)
        ours = part.ours()
        names.append(part.name.partition(",")[0])
        if names[-1] in ("decoding with a cache", "likelihood"):
            torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
        else:
            assert ours.shape == plain.shape == (10, 4) and ours.isfinite().all() and plain.isfinite().all()
    assert names == ["decoding with a cache"] * (not net) + ["guidance", "guided draw", "likelihood"]
