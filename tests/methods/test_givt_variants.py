"""GIVT beyond the golden files: what a prediction sees, training, files of other models, sampling, errors."""

import math

import numpy as np
import pytest
import torch

from layers.flows.adapter import AdapterConfig
from layers.networks.givt import GIVT, GIVTConfig
from layers.samplers.maskgit import mask_weights
from layers.tokenizers.base import Tokens
from layers.tokenizers.dequantised import DequantisedTokenizer
from lightning_modules.givt import GIVTModule, GIVTObjective, GIVTSampling, HeadConfig

SIZES = {"width": 32, "depth": 2, "num_heads": 2, "mlp_hidden": 48, "dropout": 0.0}
KINDS = [("causal", "concat"), ("bidirectional", "concat"), ("bidirectional", "replace")]
ADAPTER = AdapterConfig(num_blocks=2, bottleneck=24)
TABLE = "net.label_embed.embedding_table.weight"


def build(attention="causal", mask_style="concat", *, adapter=AdapterConfig(), head=None, drop=0.1, classes=5, **net):  # noqa: B008
    """A small module with weights of order one, so that everything matters: 16 tokens of 12 numbers."""
    config = GIVTConfig(**SIZES | net, attention=attention, mask_style=mask_style)
    objective = GIVTObjective(label_drop_prob=drop)
    module = GIVTModule(DequantisedTokenizer(8, 2), classes, config, head or HeadConfig(3), adapter, objective)
    for p in module.net.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.ndim > 1 else 0.1)
    return module.eval()


def batch(size=3):
    return {"image": torch.randint(0, 256, (size, 3, 8, 8), dtype=torch.uint8), "label": torch.arange(size)}


def masked(size=2):
    """Random masks of 1 to 15 tokens."""
    return torch.rand(size, 16).argsort(1) < torch.randint(1, 16, (size, 1))


# What a prediction sees


@torch.no_grad()
def test_a_causal_prediction_sees_the_label_and_all_earlier_tokens_and_no_other():
    net, x, labels = build().net, torch.randn(1, 16, 12), torch.tensor([2])
    before = net(x, labels)
    for position in range(16):
        moved = x.clone()
        moved[:, position] += 1
        changed = (net(moved, labels) - before).abs().amax(-1)[0] > 1e-6
        assert torch.equal(changed, torch.arange(16) > position)
    assert ((net(x, labels + 1) - before).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("mask_style", ["concat", "replace"])
@torch.no_grad()
def test_a_bidirectional_prediction_sees_all_known_tokens_and_no_masked_one(mask_style):
    net, x, labels = build("bidirectional", mask_style).net, torch.randn(1, 16, 12), torch.tensor([2])
    mask = masked(1)
    before = net(x, labels, mask)
    for position in range(16):
        moved = x.clone()
        moved[:, position] += 1
        changed = (net(moved, labels, mask) - before).abs().amax(-1)[0] > 1e-6
        assert changed.all() if not mask[0, position] else not changed.any()
    assert ((net(x, labels + 1, mask) - before).abs().amax(-1) > 1e-6).all()


@torch.no_grad()
def test_decoding_with_a_memory_equals_the_full_forward():
    net = GIVT(GIVTConfig(**SIZES), seq_len=5, token_dim=3, num_classes=1, null_label=False, cross=True)
    x, labels, memory = torch.randn(2, 5, 3), torch.zeros(2, dtype=torch.int64), torch.randn(2, 7, 32)
    full, other = net(x, labels, memory=memory), net(x, labels, memory=memory + 1)
    assert (full - other).abs().amin(-1).min() > 0
    cache = net.init_cache(2, dtype=torch.float32, device="cpu")
    h = [net.prefill(labels, cache, memory)] + [net.step(x[:, i], i, cache) for i in range(4)]
    torch.testing.assert_close(torch.stack(h, dim=1), full, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_reordered_caches_go_on_as_the_sequences_that_they_became():
    net, x, labels = build().net, torch.randn(3, 16, 12), torch.tensor([0, 1, 2])
    cache, index = net.init_cache(3, dtype=torch.float32, device="cpu"), torch.tensor([2, 0, 0])
    net.prefill(labels, cache)
    net.step(x[:, 0], 0, cache)
    cache.reorder(index)
    torch.testing.assert_close(net.step(x[index, 1], 1, cache), net(x, labels)[index, 2], atol=1e-5, rtol=1e-4)


# Training


@pytest.mark.parametrize(("attention", "mask_style"), KINDS)
@pytest.mark.parametrize("kind", ["diagonal", "per_channel", "full"])
def test_every_kind_trains_all_of_its_parameters_and_reports_likelihoods(attention, mask_style, kind):
    head = HeadConfig(1 if kind == "full" else 3, kind)
    module = build(attention, mask_style, adapter=ADAPTER, head=head).train()
    terms = module.training_loss(batch(), torch.Generator().manual_seed(0))
    terms["loss"].backward()
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert set(terms) == {"loss", "nats_per_token"} | ({"bpd"} if attention == "causal" else set())
    scale = 12 if kind == "per_channel" else 1
    assert terms["nats_per_token"].item() == pytest.approx(scale * terms["loss"].item(), rel=1e-5)
    if attention == "causal":
        bits = terms["nats_per_token"].item() / 12 / math.log(2) + math.log2(127.5)
        assert terms["bpd"].item() == pytest.approx(bits, rel=1e-5)
    module.eval()
    used = {"min_scale"} if kind == "full" else {"component_entropy", "component_spread", "min_scale"}
    assert used <= set(module.training_loss(batch())), "statistics of the components are shown in validation"


@pytest.mark.parametrize(("attention", "mask_style"), KINDS)
def test_dropped_labels_reach_the_network(attention, mask_style):
    """In the public trainer they do not: its row for no label never gets a gradient."""
    module = build(attention, mask_style, drop=0.5).train()
    module.training_loss(batch(40) | {"label": torch.zeros(40, dtype=torch.int64)})["loss"].backward()
    grads = module.net.label_embed.embedding_table.weight.grad.abs().amax(1)
    assert grads[module.net.null_label] > 0 and grads[0] > 0 and (grads[1:5] == 0).all()


def test_labels_are_dropped_at_their_rate_in_training_alone():
    module, labels, u = build(drop=0.3), torch.arange(4), torch.tensor([0.0, 0.29, 0.31, 0.9])
    assert torch.equal(module.dropped(labels, u), labels)
    assert module.train().dropped(labels, u).tolist() == [5, 5, 2, 3]
    assert torch.equal(build(drop=0.0).train().dropped(labels, u), labels)


@pytest.mark.parametrize(("attention", "mask_style"), KINDS)
def test_an_unconditional_model_never_looks_at_labels(attention, mask_style):
    module = build(attention, mask_style, drop=1.0)
    rows = batch(2)
    losses = [
        module.training_loss(rows | {"label": torch.tensor(y)}, torch.Generator().manual_seed(1))["loss"]
        for y in ([0, 1], [4, 3])
    ]
    assert losses[0] == losses[1]
    sampling = GIVTSampling(num_iter=3)
    images = [module.sample(y, sampling, torch.Generator().manual_seed(1)) for y in ([0, 1], [4, 3])]
    assert torch.equal(*images)


def test_masked_loss_is_the_mean_over_all_masked_tokens_whoever_holds_them():
    module, x, labels, mask = build("bidirectional"), torch.randn(4, 16, 12), torch.arange(4), masked(4)
    with torch.no_grad():
        nll = -module.head.log_prob(module.net(x, labels, mask), x)
        weights = mask_weights(mask)
        whole = module.masked_loss(x, labels, weights)["loss"]
        halves = [module.masked_loss(x[i::2], labels[i::2], weights[i::2])["loss"] for i in range(2)]
    torch.testing.assert_close(whole, nll[mask].mean())
    torch.testing.assert_close(sum(halves) / 2, whole)  # two processes with two images each, gradients averaged


def test_masks_of_training_follow_schedule_and_minimum():
    module = build("bidirectional")
    module.objective.mask_schedule, module.objective.mask_rate_min = "pow:1", 0.25
    weights = module._masks(2000, 16, generator=torch.Generator().manual_seed(0), device=torch.device("cpu"))
    shares = (weights > 0).float().mean(1)
    assert shares.min() == 0.25 + 1 / 16 and shares.max() == 1  # kept: less than 0.75, so more than 0.25 is masked
    assert shares.mean().item() == pytest.approx(0.625 + 0.5 / 16, abs=0.01)
    assert weights.sum().item() == pytest.approx(2000, rel=1e-4)


def test_recomputed_blocks_give_the_same_gradients():
    plain, saving = build(), build(grad_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    rows, grads = batch(), []
    for module in (plain.train(), saving.train()):
        module.training_loss(rows, torch.Generator().manual_seed(3))["loss"].backward()
        grads.append([p.grad for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_dropout_acts_where_the_official_code_has_it():
    """On attention weights, after attention and inside the MLP; not on embeddings, nor after the MLP."""
    net = build(dropout=0.5).net.train()
    block, x = net.blocks[0], torch.randn(1, 16, 32)
    assert torch.equal(net.embed(x[..., :12], torch.tensor([0])), net.embed(x[..., :12], torch.tensor([0])))
    mlp = block.mlp(x)
    assert (mlp != 0).all() and not torch.equal(mlp, block.mlp(x))
    assert (block.attn(x) == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert block.attn.attn_dropout == 0.5


def test_initial_weights_follow_the_official_rules():
    torch.manual_seed(0)
    net = GIVT(GIVTConfig(width=256, depth=1, num_heads=4, mlp_hidden=768), seq_len=64, token_dim=16, num_classes=99)
    block = net.blocks[0]
    stds = {
        net.label_embed.embedding_table.weight: 1.0,
        net.pos_embed: 1 / 16,
        net.token_embed.weight: 1 / 4,
        block.attn.qkv.weight: 1 / 16,
        block.attn.proj.weight: 1 / 16,
        block.mlp.fc1.weight: (2 / (256 + 768)) ** 0.5,
        block.mlp.fc2.weight: (2 / (256 + 768)) ** 0.5,
        block.mlp.fc1.bias: 1e-6,
    }
    for param, std in stds.items():
        assert param.std().item() == pytest.approx(std, rel=0.1)
    assert (net.token_embed.bias == 0).all() and block.norm1.bias is None and block.attn.qkv.bias is None
    head = GIVTModule(DequantisedTokenizer(8, 2), 5, GIVTConfig(**SIZES), HeadConfig(init="zero")).head
    assert not any(p.any() for p in head.parameters())


# Files


def official_file(module, path, *, stacked=True):
    """The module's weights as big_vision writes them."""
    state = module.official_state_dict()
    if stacked:
        names = [n for n in state if n.startswith("decoder/EncDecBlock0/")]
        rest = [n.removeprefix("decoder/EncDecBlock0") for n in names]
        blocks = {
            f"decoder/EncDecBlock{r}": torch.stack([state.pop(f"decoder/EncDecBlock{i}{r}") for i in range(2)], 1)
            for r in rest
        }
        state |= blocks
    np.savez(path, **{f"params/{name}": tensor.numpy() for name, tensor in state.items()})
    return path


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize(("attention", "mask_style"), KINDS)
def test_official_files_load_in_both_layouts(attention, mask_style, stacked, tmp_path):
    source, module = (build(attention, mask_style, adapter=ADAPTER) for _ in range(2))
    module.load_official(official_file(source, tmp_path / "x.npz", stacked=stacked))
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in module.state_dict().items())
    with pytest.raises(ValueError, match="holds one set of weights, so 'model' cannot be chosen"):
        module.load_official(tmp_path / "x.npz", key="model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, r"missing \(net\.blocks\.2\."),
        ({"depth": 1}, r"unknown \(net\.blocks\.1\."),
        ({"num_heads": 4}, r"attention has 2 heads, this model 4"),
        ({"mlp_hidden": 64}, r"of another shape \(net\.blocks\.0\.mlp\.fc1\.weight \(48, 32\) instead of \(64, 32\)"),
        ({"attention": "bidirectional"}, r"net\.pos_embed \(1, 16, 32\) instead of \(1, 17, 32\)"),
        ({"classes": 6}, r"instead of \(7, 32\).*|init_classes=new"),
        ({"head": HeadConfig(2)}, r"head\.linear\.weight \(75, 32\) instead of \(50, 32\)"),
        ({"adapter": ADAPTER}, r"missing \(adapter\.blocks\.0\."),
    ],
)
def test_a_file_of_another_configuration_is_one_error_and_changes_nothing(changes, message, tmp_path):
    path, module = official_file(build(), tmp_path / "x.npz"), build(**changes)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        module.load_official(path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(("attention", "mask_style"), KINDS)
def test_new_classes_keep_the_rows_for_masked_tokens_and_for_no_label(attention, mask_style, tmp_path):
    source, module = build(attention, mask_style), build(attention, mask_style, classes=9)
    fresh, module.init_classes = module.state_dict()[TABLE].clone(), "new"
    module.load_official(official_file(source, tmp_path / "x.npz"))
    table, theirs = module.state_dict()[TABLE], source.state_dict()[TABLE]
    assert torch.equal(table[:9], fresh[:9]) and torch.equal(table[9:], theirs[5:])


def test_new_classes_need_to_know_which_rows_are_special(tmp_path):
    module = build("bidirectional", drop=0.0)
    module.init_classes = "new"
    with pytest.raises(ValueError, match=r"init_classes=new needs .* objective\.label_drop_prob=0"):
        module.load_official(official_file(build("bidirectional"), tmp_path / "x.npz"))


# Sampling


@torch.no_grad()
def test_guided_sampling_equals_its_plain_form():
    """Plain: the branches apart, no cache, the whole sequence at every position."""
    module, labels = build(), torch.tensor([1, 4])
    sampling = GIVTSampling(temperature=0.8, cfg_scale=1.7, inv_temperature=1.2)
    fast = module.generate(labels, sampling, torch.Generator().manual_seed(0))
    noise, x = module.noise_source(2, sampling, torch.Generator().manual_seed(0)), torch.zeros(2, 16, 12)
    for j in range(16):
        cond, uncond = (module.net(x, y)[:, j] for y in (labels, torch.full_like(labels, 5)))
        settings = {"cfg_scale": 1.7, "temperature": 0.8, "inv_temperature": 1.2}
        x[:, j] = module.head.sample(cond, noise(1), uncond=uncond, **settings)
    torch.testing.assert_close(fast, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("attention", "sampling"),
    [
        ("causal", {"cfg_scale": 1.5, "guidance": "rejection"}),
        ("causal", {"num_beams": 2, "num_fans": 3}),
        ("causal", {"top_p": 0.8, "clip_sigmas": 2.0}),
        ("bidirectional", {"cfg_scale": 1.5, "temperature": 0.9, "schedule": "pow:2", "anneal": False}),
    ],
)
def test_every_sampler_gives_images_that_follow_the_seed_through_the_adapter(attention, sampling):
    module = build(attention, adapter=ADAPTER)
    settings = GIVTSampling(**{"num_iter": 3} | sampling)
    images = [module.sample([1, 4], settings, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert images[0].shape == (2, 3, 8, 8) and images[0].isfinite().all()
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
    tokens = {}
    module.adapter.register_forward_pre_hook(lambda _, inputs: pytest.fail("sampling only inverts the adapter"))
    module.tokenizer.decode = lambda x: tokens.setdefault("x", x)
    module.sample([1, 4], settings, torch.Generator().manual_seed(0))
    assert tokens["x"].shape == (2, 16, 12)


@torch.no_grad()
def test_what_is_known_stays_and_is_seen_when_the_rest_is_drawn():
    module, labels, x = build("bidirectional"), torch.tensor([0, 1]), torch.randn(2, 16, 12)
    unknown = torch.rand(2, 16).argsort(1) < 6
    drawn = [module.redraw(y, unknown, labels, GIVTSampling(), torch.Generator().manual_seed(0)) for y in (x, x + 1)]
    assert torch.equal(drawn[0][~unknown], x[~unknown])
    assert ((drawn[0] - drawn[1])[unknown].abs().amax(-1) > 1e-4).all()
    hidden = torch.where(unknown[..., None], torch.randn(2, 16, 12), x)
    again = module.redraw(hidden, unknown, labels, GIVTSampling(), torch.Generator().manual_seed(0))
    assert torch.equal(again, drawn[0]), "what lies under the mask is not looked at"


def test_editing_through_an_adapter_gives_back_known_tokens():
    module, labels, x = build("bidirectional", adapter=ADAPTER), torch.tensor([0]), torch.randn(1, 16, 12)
    seen = {}
    module.fill = lambda x, *_: seen.setdefault("x", x)
    with torch.no_grad():
        torch.testing.assert_close(module.redraw(x, torch.arange(16)[None] > 3, labels, GIVTSampling(), None), x)
        assert torch.equal(seen["x"], module.adapter(x)[0])


@torch.no_grad()
def test_fast_sampling_casts_the_trunk_and_leaves_the_head_exact():
    module = build()
    module.prepare_sampling()
    assert module.net.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert module.head.linear.weight.dtype == torch.float32 and module.net.pos_embed.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert module.sample([0, 3]).isfinite().all()


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GIVTSampling(num_beams=2, cfg_scale=1.4), "cfg_scale is 1.4 with num_beams 2 .* guidance has none of"),
        (lambda: GIVTSampling(num_fans=0), r"sampling\.num_fans is 0"),
        (lambda: GIVTSampling(schedule="linear"), "schedule is 'linear'"),
        (lambda: GIVTObjective(label_drop_prob=1.5), r"objective\.label_drop_prob is 1\.5"),
        (lambda: GIVTObjective(mask_schedule="pow:0"), "schedule is 'pow:0'"),
        (lambda: GIVTConfig(width=30, num_heads=4), r"net\.width 30 is not divisible by net\.num_heads 4"),
        (lambda: GIVTConfig(width=5, num_heads=1), r"net\.width is 5: .* use even"),
        (lambda: build(head=HeadConfig(2, "full")), "num_mixtures is 2, but kind 'full' is one Gaussian"),
        (
            lambda: build(drop=0.0).sample([0], GIVTSampling(cfg_scale=2.0)),
            r"guidance needs .*label_drop_prob is 0\.0",
        ),
        (
            lambda: build(drop=1.0).sample([0], GIVTSampling(cfg_scale=2.0)),
            r"guidance needs .*label_drop_prob is 1\.0",
        ),
        (lambda: build("bidirectional").sample([0], GIVTSampling(num_beams=2)), "of causal models: set both to 1"),
        (lambda: build("bidirectional").sample([0], GIVTSampling(num_iter=17)), "num_iter is 17, but 16 tokens"),
        (lambda: edited(build()), "GIVT-Causal cannot edit"),
        (lambda: GIVTModule(Ids(8, 2), 5), "tokens are continuous, but this tokenizer's are ids"),
    ],
)
def test_mistakes_are_errors_that_name_the_cure(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Ids(DequantisedTokenizer):
    vocab_size = 7


def edited(module):
    images, mask = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.ones(8, 8, dtype=torch.bool)
    return module.edit(images, mask, [0])


def test_a_batch_with_a_bad_latent_has_a_loss_that_the_guard_stops_at():
    """NaN is not hidden by the mask, the clamp of scales or the mean."""
    for attention in ("causal", "bidirectional"):
        module = build(attention)
        x = torch.randn(2, 16, 12)
        x[1, 3, 5] = math.nan
        labels = torch.tensor([0, 1])
        if attention == "causal":
            loss = module.causal_loss(Tokens(x), labels, {})["loss"]
        else:
            loss = module.masked_loss(x, labels, mask_weights(torch.ones(2, 16, dtype=torch.bool)))["loss"]
        assert loss.isnan()
