"""The fast path equals the plain one of benchmarks/references/rar.py: loss, gradients, and ids of the same draws."""

import pytest
import torch

from benchmarks.references.rar import Reference, cpu_overrides
from layers.networks.rar import RARConfig
from layers.tokenizers.levels import LevelsTokenizer
from lightning_modules.rar import RARModule, RARObjective, RARSampling
from tests.methods.test_rar import TINY
from tests.test_bench import run

LABELS = torch.tensor([0, 1, 4])
LEVELS = 7


def tiny(**objective) -> RARModule:
    """Every weight is random, so that zero initialisation hides nothing; 16 tokens of 7 levels."""
    net = RARConfig(32, 2, 4, 48, attn_dropout=0.0, proj_dropout=0.0)
    module = RARModule(LevelsTokenizer(8, 2, levels=LEVELS), 5, net, RARObjective(**objective))
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.ndim > 1 else 0.1)
    return module.eval()


def test_loss_and_every_gradient():
    module, reference = tiny(), Reference(tiny())
    reference.module.load_state_dict(module.state_dict())
    ids, labels = torch.randint(0, LEVELS, (3, 16)), torch.tensor([0, 4, 5])
    orders = torch.stack([torch.randperm(16), torch.randperm(16), torch.arange(16)])
    ours, plain = module.order_loss(ids, labels, orders)["loss"], reference.order_loss(ids, labels, orders)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    ours.backward()
    plain.backward()
    for (name, a), b in zip(module.named_parameters(), reference.module.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm() + 1e-7, name


@pytest.mark.parametrize(
    "sampling", [RARSampling(1.1), RARSampling(1.02, 6.0, 2.5), RARSampling(1.0, 4.0, 0.0)], ids=["off", "late", "even"]
)
@torch.no_grad()
def test_ids_of_the_same_noise(sampling):
    """Merged tables, one modulation per class, a cache of fixed length and Gumbel noise change no id."""
    module, noise = tiny(), torch.empty(16, 3, LEVELS).exponential_()
    plain = Reference(module).generate(LABELS, lambda p, j: (p / noise[j]).argmax(-1, keepdim=True), sampling)
    ours = module.generate(LABELS, lambda j: -noise[j].log(), sampling)
    assert torch.equal(ours, plain) and len(plain.unique()) > 2


def test_draws_of_its_own():
    module = tiny(anneal_start=0, anneal_end=0).train()
    batch = {"image": torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), "label": torch.arange(4)}
    reference = Reference(module)
    assert torch.equal(reference.orders(torch.zeros(2, 16)), torch.arange(16).expand(2, -1))
    module.objective.anneal_end = 2
    orders = reference.orders(torch.zeros(40, 16))
    assert torch.equal(orders.sort(1).values, torch.arange(16).expand(40, -1)) and len(orders.unique(dim=0)) == 40
    reference.loss(batch).backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    ids = reference.sample(LABELS, RARSampling(cfg_scale=2.0))
    assert ids.shape == (3, 16) and 0 <= ids.min() <= ids.max() < LEVELS


def test_another_scan_is_refused():
    with pytest.raises(ValueError, match=r"raster order, not objective\.scan=z_curve"):
        Reference(tiny(scan="z_curve"))


def test_only_large_recipes_are_shrunken_for_the_host():
    assert cpu_overrides({"net": {"width": 96}}) == []
    assert "--model.init_args.net.width=384" in cpu_overrides({"net": {"width": 768}})


def test_the_benchmark_has_rows_of_training_and_sampling(monkeypatch, tmp_path):
    sizes = {name: value for name, value in TINY.items() if not name.startswith("data.")}
    result = run(monkeypatch, tmp_path, "--exp", "rar_digits", *(f"--{name}={value}" for name, value in sizes.items()))
    assert [row["what"] for row in result["rows"]] == ["train, plain", "train, ours", "sample, plain", "sample, ours"]
    assert all(row["ms"] > 0 and row["tflops"] > 0 for row in result["rows"]) and result["parts"] == []
