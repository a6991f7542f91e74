"""The fast path equals the plain one of benchmarks/references/jetformer.py: loss, gradients, flow, samples of the same
draws, parts of the benchmark; and the head's memory at full size, which is counted of shapes."""

import pytest
import torch

from benchmarks.measure import peak_bytes
from benchmarks.references import gmm
from benchmarks.references.gmm import HeadSize, memory_part
from benchmarks.references.jetformer import PlainFlow, Reference, cpu_overrides
from experiments.load import load_config
from layers.flows.factored import FactorConfig
from layers.flows.jet import JetConfig
from layers.text.batches import label_batch
from lightning_modules.jetformer import JetFormerModule, JetFormerSampling
from tests.methods.test_givt_reference import DIM, Recorded, replay
from tests.methods.test_jetformer_variants import FLOW, images
from tests.methods.test_jetformer_variants import module as small

LABELS = torch.tensor([0, 3, 4])
CAPTIONS = ["one", "a longer one that is cut", ""]
captions = pytest.mark.parametrize("captions", [False, True])
GUIDED, PLAIN = {"cfg_scale": 1.6, "guidance": "rejection", "temperature": 0.9}, {"inv_temperature": 1.5}


def tiny(captions: bool = False, *, backward: str = "plain", **changes) -> JetFormerModule:
    """Every weight is random, so that initialisation hides nothing; 4 tokens, of whose 48 numbers 12 are modelled."""
    module = small(captions, factor=FactorConfig(dim=DIM), flow=JetConfig(**FLOW, backward=backward), **changes)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return module.eval()


# Training


@captions
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_loss_and_every_gradient(captions, recompute, train):
    """With the same noise and orders: matrices and whole mixtures change nothing."""
    module = tiny(captions, backward="recompute" if recompute else "plain").train(train)
    module.net.config.grad_checkpointing = recompute
    batch = {"image": images(3), "label": LABELS, "caption": CAPTIONS}
    losses, grads = [], []
    for loss in (lambda g: module.training_loss(batch, g)["loss"], lambda g: Reference(module).loss(batch, g)):
        module.zero_grad()
        losses.append(loss(torch.Generator().manual_seed(1)))
        losses[-1].backward()
        grads.append({name: p.grad for name, p in module.named_parameters()})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for name, grad in grads[0].items():
        other = grads[1][name]
        assert (grad is None) == (other is None), name
        assert grad is None or (grad - other).norm() <= 1e-4 * other.norm() + 1e-7, name


@torch.no_grad()
def test_a_flow_by_matrices():
    module, x = tiny(), torch.randn(2, 4, 48)
    flow = PlainFlow(module.front.jet)
    for ours, plain in zip(module.front.jet(x), flow(x), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(flow.inverse(flow(x)[0]), x, atol=1e-5, rtol=1e-5)
    assert all(matrix.sum(0).eq(1).all() and matrix.count_nonzero() == 48 for matrix in flow.matrices)


# Sampling


@pytest.mark.parametrize("settings", [PLAIN, GUIDED], ids=["plain", "guided"])
@captions
@torch.no_grad()
def test_samples(captions, settings):
    """Branches as neighbours, stores of full length and every component change nothing."""
    module, draws = tiny(captions, ignore_pad=False), Recorded()
    sampling = JetFormerSampling(**settings, prompts=CAPTIONS if captions else [])
    reference = Reference(module)
    text = reference.texts(torch.arange(3) if captions else LABELS, sampling)
    plain = reference.soft_tokens(text, sampling, draws)
    assert len(draws.steps) == 4
    noise = replay([draws.noise(j).transpose(0, 1)[:, :, None] for j in range(4)])
    ours = module.soft_tokens({"text": text}, sampling, noise)
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 1.5}])
def test_tokens_with_draws_of_its_own(settings):
    tokens = Reference(tiny()).sample(LABELS, JetFormerSampling(**settings))
    assert tokens.shape == (3, 4, 48) and tokens.isfinite().all()


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_decoding_without_a_cache_draws_the_same(cfg_scale):
    module, sampling = tiny(), JetFormerSampling(cfg_scale=cfg_scale)
    texts = label_batch(LABELS)
    uncached = Reference(module).uncached(texts["text"], sampling, torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = module.soft_tokens(texts, sampling, torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours, uncached, atol=1e-4, rtol=1e-4)


def test_what_is_not_done_plainly_is_refused():
    for changes in (
        {"factor": FactorConfig(dim=12, split="pca")},
        {"flow": JetConfig(**FLOW | {"kinds": ["spatial"]})},
    ):
        with pytest.raises(ValueError, match="plain path has channel couplings alone"):
            Reference(small(**changes))
    padded = tiny(captions=True)
    with pytest.raises(ValueError, match="prompts of one length"):
        Reference(padded).sample(LABELS, JetFormerSampling(prompts=CAPTIONS))


# Parts


def test_parts_do_the_same_work_in_both_ways(monkeypatch):
    monkeypatch.setitem(gmm.HEADS, "cpu", (HeadSize("small", 4, 8, 16, 600, (10,)),))
    monkeypatch.setattr("layers.heads.chunked.MIN_CHUNK_ROWS", 64)
    monkeypatch.setattr("layers.heads.chunked.CHUNK_BYTES", 1)
    names, same = [], ("decoding with a cache", "flow's gradients", "likelihood")
    for part in Reference(tiny(backward="recompute")).parts(2):
        names.append(part.name.partition(",")[0])
        if not part.timed:
            continue
        torch.manual_seed(1)
        plain = part.plain()
        torch.manual_seed(1)
        ours = part.ours()
        if names[-1] in same:
            torch.testing.assert_close(ours, plain, atol=1e-3, rtol=1e-3)
        else:
            assert ours.shape == plain.shape == (10, 4) and ours.isfinite().all() and plain.isfinite().all()
    assert names == ["decoding with a cache", "flow's gradients", "guidance", "guided draw", "likelihood", "likelihood"]


def test_memory_that_is_counted_of_shapes_is_that_of_numbers():
    size = HeadSize("small", 16, 64, 32, 700, ())
    shapes, numbers = memory_part("cpu", size), gmm.likelihood_part(size, "cpu", dtype="bfloat16")
    assert not shapes.timed and numbers.timed
    for way in ("plain", "ours"):
        assert peak_bytes(getattr(shapes, way), "cpu") == peak_bytes(getattr(numbers, way), "cpu")


def test_the_head_of_the_350m_model_takes_a_tenth_of_the_memory_at_16_images():
    """With the gradient of its weights, 1.1 GB, in both."""
    part = memory_part("cpu")
    plain, ours = peak_bytes(part.plain, "cpu"), peak_bytes(part.ours, "cpu")
    assert plain > 10 * ours and ours > 1e9
    recipe = load_config("jetformer")["model"]["init_args"]
    sizes = recipe["factor"]["dim"], recipe["head"]["num_mixtures"], recipe["net"]["width"]
    assert (gmm.MEMORY.token_dim, gmm.MEMORY.num_mixtures, gmm.MEMORY.width) == sizes
    twice = memory_part("cpu", gmm.MEMORY._replace(trained=2 * gmm.MEMORY.trained))
    rows = 4 * gmm.MEMORY.trained * (1024 + 128 + 2)  # bytes of h's and x's gradients, and of the nats and theirs
    assert peak_bytes(twice.ours, "cpu") - ours <= rows, "nothing else grows with the batch"


@pytest.mark.parametrize(("experiment", "shrunken"), [("jetformer", True), ("jetformer_digits", False)])
def test_only_large_recipes_are_shrunken_for_the_host(experiment, shrunken):
    arguments = load_config(experiment)["model"]["init_args"]
    changes = cpu_overrides(arguments)
    assert bool(changes) == shrunken
    small = load_config(experiment, changes)["model"]["init_args"]
    assert small["tokenizer"] == arguments["tokenizer"] and (small["net"]["width"] <= 128)
