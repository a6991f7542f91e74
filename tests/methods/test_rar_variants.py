"""RAR beyond the golden files: what a prediction sees, orders and their annealing, ranks, recomputation, decoding,
files, errors."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from layers.networks import rar
from layers.networks.rar import Modulations, RARConfig
from layers.orders import scan_order
from layers.tokenizers.levels import LevelsTokenizer
from layers.tokenizers.pixels import PixelTokenizer
from lightning_modules.rar import NOISE_BLOCK, RARModule, RARObjective, RARSampling

SIZES = {"width": 32, "depth": 2, "num_heads": 4, "mlp_hidden": 48, "attn_dropout": 0.0, "proj_dropout": 0.0}
LEVELS, CLASSES, LENGTH = 7, 5, 16
TABLE = "net.embeddings.weight"


def build(*, classes=CLASSES, objective=None, **net) -> RARModule:
    """A small module with weights of order one, so that everything matters: 16 tokens of 7 levels."""
    tokenizer = LevelsTokenizer(8, 2, levels=LEVELS)
    module = RARModule(tokenizer, classes, RARConfig(**SIZES | net), RARObjective(**objective or {}))
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.ndim > 1 else 0.1)
    return module.eval()


def batch(size=3):
    images = torch.randint(0, 256, (size, 1, 4, 4)).repeat(1, 3, 1, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return {"image": images.to(torch.uint8), "label": torch.arange(size) % CLASSES}


def shuffled(size):
    return torch.rand(size, LENGTH).argsort(1)


# What a prediction sees


@torch.no_grad()
def test_a_prediction_sees_class_earlier_tokens_and_their_places_and_no_later_token():
    net, ids, orders, labels = build().net, torch.randint(0, LEVELS, (1, 15)), shuffled(1), torch.tensor([2])
    before = net(ids, orders, labels)

    def changed(*inputs):
        return (net(*inputs) - before).abs().amax(-1)[0] > 1e-6

    for position in range(15):
        moved = ids.clone()
        moved[:, position] = (moved[:, position] + 1) % LEVELS
        assert torch.equal(changed(moved, orders, labels), torch.arange(LENGTH) > position)
    assert changed(ids, orders, labels + 1).all()


@torch.no_grad()
def test_a_prediction_knows_the_place_of_its_own_token_and_of_no_later_one():
    """That is what the second table is for: the last two tokens in the other order are other predictions."""
    net, ids, orders, labels = build().net, torch.randint(0, LEVELS, (1, 15)), shuffled(1), torch.tensor([2])
    swapped = orders[:, [*range(14), 15, 14]]
    moved = (net(ids, swapped, labels) - net(ids, orders, labels)).abs().amax(-1)[0] > 1e-6
    assert torch.equal(moved, torch.arange(LENGTH) >= 14)


@torch.no_grad()
def test_modulation_follows_the_place_in_the_sequence_and_not_the_token():
    net, labels = build().net, torch.tensor([2, 4])
    c = net.condition(labels, 6)
    torch.testing.assert_close(c[0], net.timesteps_embeddings[0, :6] + net.embeddings.weight[LEVELS + 1 + 2])
    torch.testing.assert_close(c[1], net.timesteps_embeddings[0, :6] + net.embeddings.weight[LEVELS + 1 + 4])


def test_a_fresh_network_predicts_nearly_evenly():
    """Blocks are the identity at first; the logits' spread is that of the head alone."""
    module = RARModule(LevelsTokenizer(8, 2, levels=LEVELS), CLASSES, RARConfig(**SIZES))
    for layer in (*module.net.blocks, module.net.adaln_before_head):
        assert not any(p.any() for p in layer.adaLN_modulation.parameters())
    assert not module.net.cls_token.any() and not module.net.lm_head.bias.any()
    for table in (module.net.pos_embed, module.net.embeddings.weight, module.net.lm_head.weight):
        assert table.std().item() == pytest.approx(0.02, rel=0.1)
    loss = module.training_loss(batch(8))["loss"].item()
    assert loss == pytest.approx(torch.tensor(float(LEVELS)).log().item(), abs=0.05)


# Orders


def orders_of(module: RARModule, size: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and orders that a loss of this batch takes."""
    seen = {}
    module.order_loss = lambda ids, labels, orders: seen.update(labels=labels, orders=orders)
    module.training_loss(batch(size), torch.Generator().manual_seed(seed))
    del module.order_loss
    return seen["labels"], seen["orders"]


def at_step(module: RARModule, step: int, *, rank: int = 0, world_size: int = 1, batch_size: int = 0) -> RARModule:
    data = SimpleNamespace(batch_size=batch_size)
    module._trainer = SimpleNamespace(
        global_step=step, global_rank=rank, world_size=world_size, datamodule=data, accumulate_grad_batches=1
    )
    return module


@pytest.mark.parametrize("scan", ["raster", "z_curve", "spiral_out"])
def test_orders_anneal_from_random_ones_to_the_scan(scan):
    module = build(objective={"anneal_start": 10, "anneal_end": 20, "scan": scan}).train()
    shares = []
    for step in (0, 10, 12, 15, 18, 20, 30):
        _, orders = orders_of(at_step(module, step), 400, seed=step)
        assert torch.equal(orders.sort(1).values, torch.arange(LENGTH).expand(400, -1))
        shares.append((orders != torch.tensor(scan_order(scan, (4, 4)))).any(1).float().mean().item())
    assert shares[:2] == [1, 1] and shares[-2:] == [0, 0]
    assert shares[2:5] == pytest.approx([0.8, 0.5, 0.2], abs=0.08)


def test_two_processes_draw_the_orders_and_dropped_labels_of_one():
    objective = {"anneal_start": 0, "anneal_end": 10, "label_drop_prob": 0.4}
    one = orders_of(at_step(build(objective=objective).train(), 5, batch_size=8), 8)
    ranks = [
        orders_of(at_step(build(objective=objective).train(), 5, rank=r, world_size=2, batch_size=8), 4) for r in (0, 1)
    ]
    assert not torch.equal(ranks[0][1], ranks[1][1])
    assert torch.equal(torch.stack([orders for _, orders in ranks], 1).flatten(0, 1), one[1])
    dropped = [labels == CLASSES for labels, _ in ranks]
    assert torch.equal(torch.stack(dropped, 1).flatten(), one[0] == CLASSES) and (one[0] == CLASSES).any()


def test_labels_are_dropped_in_training_only():
    module = build(objective={"label_drop_prob": 0.25}).train()
    labels, _ = orders_of(module, 2000)
    kept = batch(2000)["label"]
    assert (labels == CLASSES).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(labels[labels != CLASSES], kept[labels != CLASSES])
    labels, orders = orders_of(module.eval(), 6)
    assert torch.equal(labels, batch(6)["label"]) and torch.equal(orders, module.scan.expand(6, -1))


def test_loss_and_accuracy_are_of_the_ids_in_their_order():
    module, ids, orders, labels = build(), torch.randint(0, LEVELS, (3, LENGTH)), shuffled(3), torch.tensor([0, 1, 5])
    terms = module.order_loss(ids, labels, orders)
    total, right = 0.0, 0
    for b in range(3):  # one prediction at a time
        for i in range(LENGTH):
            known, wanted = ids[b, orders[b, :i]][None], ids[b, orders[b, i]]
            log_p = module.net(known, orders[b : b + 1], labels[b : b + 1])[0, -1].log_softmax(-1)
            total, right = total - log_p[wanted].item(), right + int(log_p.argmax() == wanted)
    assert terms["loss"].item() == pytest.approx(total / 48, rel=1e-5)
    assert terms["accuracy"].item() == pytest.approx(right / 48) and not terms["accuracy"].requires_grad


# Memory


def kept_bytes(call: Callable[[], torch.Tensor]) -> tuple[int, torch.Tensor]:
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = call()
    return sum(storages.values()), out


def test_what_is_computed_again_is_not_kept_and_gives_the_same_gradients():
    ids, orders, labels = torch.randint(0, LEVELS, (8, LENGTH)), shuffled(8), torch.arange(8) % 6
    results = {}
    for mode in ("none", "modulation", "blocks"):
        torch.manual_seed(0)
        module = build(grad_checkpointing=mode).train()
        kept, loss = kept_bytes(lambda module=module: module.order_loss(ids, labels, orders)["loss"])
        loss.backward()
        results[mode] = kept, loss.detach(), [p.grad for p in module.parameters()]
    sizes = [kept for kept, *_ in results.values()]
    assert sizes[0] > 1.25 * sizes[1] and sizes[1] > 1.25 * sizes[2]
    for mode in ("modulation", "blocks"):
        torch.testing.assert_close(results[mode][1:], results["none"][1:], rtol=1e-4, atol=1e-6)


# Decoding


def uncached(module: RARModule, labels, noise, sampling: RARSampling):
    """The plain form: branches apart, the whole sequence through the network at every token."""
    ids, drawn = torch.zeros(len(labels), LENGTH, dtype=torch.int64), torch.zeros(len(labels), 0, dtype=torch.int64)
    orders = module.scan.expand(len(labels), -1)
    for j in range(LENGTH):
        cond, uncond = (module.net(drawn, orders, y)[:, -1] for y in (labels, torch.full_like(labels, CLASSES)))
        power = torch.tensor(j / LENGTH) ** sampling.cfg_power
        scale = 1 + (sampling.cfg_scale - 1) * (1 - torch.cos(torch.pi * power)) / 2
        token = ((uncond + scale * (cond - uncond)) / sampling.temperature + noise(j)).argmax(-1)
        drawn, ids[:, module.scan[j]] = torch.cat([drawn, token[:, None]], 1), token
    return ids


@pytest.mark.parametrize("scan", ["raster", "subsample", "spiral_in", "alternate"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_sampling_equals_its_plain_form_in_every_order(scan, scale):
    module, labels = build(objective={"scan": scan}), torch.tensor([1, 4, 1])
    sampling = RARSampling(0.9, scale, 1.5)
    ids = module.sample_tokens(labels, sampling, torch.Generator().manual_seed(0))
    noise = module.noise_source(3, torch.Generator().manual_seed(0))
    assert torch.equal(ids, uncached(module, labels, noise, sampling))
    assert len(ids.unique(dim=0)) == 3


@torch.no_grad()
def test_modulations_are_those_of_the_blocks_however_many_places_are_computed_at_once(monkeypatch):
    net, labels = build().net, torch.tensor([5, 2, 5, 2, 0])
    layers, c = [*net.blocks, net.adaln_before_head], torch.nn.functional.silu(net.condition(labels, 17))
    expected = [layer.modulation(c) for layer in layers]
    for limit in (0, 3 * 14 * 32 * 4 * 5, 2**30):  # 2 places at once, 5, all
        monkeypatch.setattr(rar, "MODULATION_BYTES", limit)
        made = Modulations(layers, net.condition, labels, length=17)
        assert len(made.classes) == 3 and made.span == (2 if not limit else min(made.span, limit // (3 * 14 * 32 * 4)))
        for place, count in [(0, 2), *((place, 1) for place in range(2, 17))]:
            for table, whole in zip(made.at(place, count), expected, strict=True):
                torch.testing.assert_close(table, whole[:, place : place + count], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_each_class_is_modulated_once_and_no_token_by_the_weights():
    """Whatever the number of rows, and with room for all places, before the first token."""
    module, rows = build(), []
    for block in module.net.blocks:
        block.adaLN_modulation[1].register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[:2]))
    module.sample([1, 4, 1, 1, 4], RARSampling(cfg_scale=2.0))
    assert rows == [(3, LENGTH + 1)] * 2


def test_noise_comes_in_blocks_and_each_image_has_its_own():
    generators = [torch.Generator().manual_seed(s) for s in (7, 8)]
    together = build().noise_source(2, generators)
    alone = build().noise_source(1, [torch.Generator().manual_seed(8)])
    for j in range(2 * NOISE_BLOCK):
        first, second = together(j), alone(j)
        assert first.shape == (2, LEVELS)
        torch.testing.assert_close(first[1:], second, rtol=0, atol=0)


@torch.no_grad()
def test_ids_are_drawn_at_the_models_probabilities():
    module, count = build(), 4000
    labels = torch.full((count,), 3)
    ids = module.sample_tokens(labels, RARSampling(1.3), torch.Generator().manual_seed(0))
    logits = module.net(ids[:1, :0], module.scan[None], labels[:1])[0, -1]
    shares = ids[:, 0].bincount(minlength=LEVELS) / count
    torch.testing.assert_close(shares, (logits / 1.3).softmax(-1), atol=0.03, rtol=0)


@torch.no_grad()
def test_fast_sampling_under_autocast_stays_near():
    """Weights are cast once, tables and norms stay float32."""
    module, labels, ids = build(), torch.tensor([0, 3, 5]), torch.randint(0, LEVELS, (3, 15))
    exact = module.net(ids, module.scan.expand(3, -1), labels)
    module.prepare_sampling(compile=True)
    assert module.net.blocks[0].adaLN_modulation[1].weight.dtype == torch.bfloat16
    assert module.net.pos_embed.dtype == module.net.blocks[0].attn.q_norm.weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        logits = module.net(ids, module.scan.expand(3, -1), labels).float()
        assert module.sample([0, 3], RARSampling(cfg_scale=2.0)).isfinite().all()
    assert (logits - exact).norm() < 0.05 * exact.norm()


# Files


@pytest.mark.parametrize("suffix", [".bin", ".pth"])
def test_official_files_are_bare_state_dicts(suffix, tmp_path):
    source, module, path = build(), build(), tmp_path / f"rar{suffix}"
    state = source.official_state_dict()
    assert "cls_token" in state and "blocks.1.attn.q_norm.weight" in state and not any("mask" in n for n in state)
    torch.save(state if suffix == ".bin" else {"model": state}, path)
    module.load_official(path)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, r"missing \(net\.blocks\.2\."),
        ({"width": 64}, "of another shape"),
        ({"mlp_hidden": 64}, r"of another shape \(net\.blocks\.0\.mlp\.fc1\.weight \(48, 32\) instead of \(64, 32\)"),
        ({"classes": 6}, r"net\.embeddings\.weight \(14, 32\) instead of \(15, 32\)"),
    ],
)
def test_a_file_of_another_size_is_one_error_and_changes_nothing(changes, message, tmp_path):
    torch.save(build().official_state_dict(), tmp_path / "rar.bin")
    module = build(**changes)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        module.load_official(tmp_path / "rar.bin")
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_new_classes_keep_the_ids_and_the_row_for_no_class(tmp_path):
    source, module = build(), build(classes=9)
    torch.save(source.official_state_dict(), tmp_path / "rar.bin")
    fresh, module.init_classes = module.state_dict()[TABLE].clone(), "new"
    module.load_official(tmp_path / "rar.bin")
    table, theirs = module.state_dict()[TABLE], source.state_dict()[TABLE]
    assert torch.equal(table[: LEVELS + 1], theirs[: LEVELS + 1]) and torch.equal(table[-1], theirs[-1])
    assert torch.equal(table[LEVELS + 1 : -1], fresh[LEVELS + 1 : -1])


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RARObjective(anneal_start=5, anneal_end=4), "anneal_start is 5 and anneal_end 4"),
        (lambda: RARObjective(anneal_start=-1), "anneal_start is -1"),
        (lambda: RARObjective(label_drop_prob=1.5), r"label_drop_prob is 1\.5"),
        (lambda: RARSampling(temperature=0.0), r"sampling\.temperature is 0\.0"),
        (lambda: RARSampling(cfg_power=-1.0), r"sampling\.cfg_power is -1\.0"),
        (lambda: RARConfig(width=30, num_heads=4), r"net\.width 30 is not divisible by net\.num_heads 4"),
        (lambda: RARConfig(depth=0), r"net\.depth is 0"),
        (lambda: RARConfig(proj_dropout=1.0), r"net\.proj_dropout is 1\.0"),
        (lambda: build(objective={"scan": "hilbert"}), "the scan order is 'hilbert': use raster"),
        (lambda: RARModule(PixelTokenizer(8, 2), 5), "PixelTokenizer's are continuous: use a discrete one"),
        (
            lambda: build(objective={"label_drop_prob": 0.0}).sample([0], RARSampling(cfg_scale=2.0)),
            "guidance needs a model that knows labels and their absence",
        ),
    ],
)
def test_mistakes_are_errors_that_name_the_cure(make, message):
    with pytest.raises(ValueError, match=message):
        make()
