"""The paper's variants of MAR: what a position may see, cached decoding, every head, fast paths against plain ones."""

import pytest
import torch

from layers.gather import put, take
from layers.orders import scan_order
from layers.samplers.masked import mask_lengths
from layers.tokenizers.pixels import PixelTokenizer
from lightning_modules.mar import HeadConfig, MARConfig, MARModule, MARObjective, MARSampling

VARIANTS = [("bidirectional", "random"), ("bidirectional", "raster"), ("causal", "random"), ("causal", "raster")]
ONE_SHOT = {"num_steps": 1, "solver": "direct"}


def build(attention="bidirectional", order="random", kind="diffusion", **net) -> MARModule:
    """A small module whose weights are all random, so that zero initialisation hides nothing."""
    config = MARConfig(
        **{"width": 32, "depth": 2, "num_heads": 2, "buffer_size": 3, "attn_dropout": 0.0, "proj_dropout": 0.0} | net,
        attention=attention,
        order=order,
    )
    module = MARModule(PixelTokenizer(8, 2), 5, config, HeadConfig(kind, 16, 2, 2), MARObjective())
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.ndim > 1 else 0.1)
    return module.eval()


def batch(size=3):
    return {"image": torch.randint(0, 256, (size, 3, 8, 8), dtype=torch.uint8), "label": torch.arange(size)}


def split(module, size, num_known):
    orders = module.orders(torch.rand(size, module.net.seq_len))
    return orders[:, num_known:], orders[:, :num_known]


@pytest.mark.parametrize(("attention", "order"), VARIANTS)
@torch.no_grad()
def test_a_prediction_sees_what_comes_before_it_and_nothing_else(attention, order):
    """Every token is moved in turn: only the predictions that come after it may change, and all of them do."""
    module = build(attention, order)
    x, labels = torch.randn(2, 16, 12), torch.tensor([0, 4])
    if attention == "causal":
        masked, known = split(module, 2, 0)
    else:
        orders = module.orders(torch.rand(2, 16))
        masked, known = orders[:, :10], orders[:, 10:]
    before = module.conditions(x, labels, masked, known)
    for position in range(16):
        moved = x.clone()
        moved[:, position] += torch.randn(12)
        changed = (module.conditions(moved, labels, masked, known) - before).abs().amax(-1) > 1e-6  # (B, R)
        for b in range(2):
            if attention == "causal":
                place = (masked[b] == position).nonzero().item()
                allowed = torch.arange(16) > place
            else:
                allowed = (known[b] == position).any().expand(masked.shape[1])
            assert torch.equal(changed[b], allowed), (position, b)


@pytest.mark.parametrize("order", ["random", "raster"])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward_at_every_position(order):
    module = build("causal", order, decoder_width=48, decoder_depth=3, decoder_heads=4)
    x, labels = torch.randn(2, 16, 12), torch.tensor([0, 4])
    orders, _ = split(module, 2, 0)
    full = module.conditions(x, labels, orders, orders[:, :0])
    cache = module.net.init_cache(2, dtype=torch.float32, device="cpu")
    for j in range(16):
        last = orders[:, max(j - 1, 0) : j]
        z = module.net.causal(take(x, last), last, orders[:, j : j + 1], labels if j == 0 else None, cache)
        torch.testing.assert_close(z[:, 0], full[:, j], atol=1e-5, rtol=0)


def test_raster_orders_go_from_the_first_token_to_the_last():
    keys = torch.rand(2, 16)
    assert build("causal", "raster").orders(keys).tolist() == [list(range(16))] * 2
    assert (
        build("bidirectional", "raster").orders(keys).tolist() == [list(range(15, -1, -1))] * 2
    )  # last revealed first


@pytest.mark.parametrize("kind", ["diffusion", "flow", "regression"])
@pytest.mark.parametrize(("attention", "order"), VARIANTS)
def test_every_variant_trains_and_samples_with_every_head(attention, order, kind):
    module = build(attention, order, kind).train()
    module.training_loss(batch())["loss"].backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []
    sampling = MARSampling(num_iter=4, cfg_scale=2.0, **(ONE_SHOT if kind == "regression" else {"num_steps": 5}))
    images = module.sample([0, 1, 4], sampling, generator=torch.Generator().manual_seed(0))
    assert images.shape == (3, 3, 8, 8)


@torch.no_grad()
def test_causal_sampling_equals_sampling_by_full_forwards():
    """The plain form: at each position the whole sequence so far goes through the trunk, without a cache."""
    module = build("causal", "random", "flow")
    sampling = MARSampling(num_steps=4, cfg_scale=3.0, cfg_schedule="constant", temperature=0.7)
    labels, (orders, _) = torch.tensor([1, 4]), split(module, 2, 0)
    noise = torch.randn(16, 1, 2, 12)
    drawn = iter(noise)
    fast = module.generate(labels, orders, lambda *_: next(drawn), sampling)
    x = torch.zeros(2, 16, 12)
    for j in range(16):
        z = [module.conditions(x, y, orders, orders[:, :0])[:, j] for y in (labels, torch.full_like(labels, 5))]
        token = module.head.sample(
            z[0], noise[j], uncond=z[1], cfg_scale=3.0, temperature=0.7, num_steps=4, solver="euler"
        )
        x = put(x, orders[:, j : j + 1], token[:, None])
    torch.testing.assert_close(fast, x, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_masked_sampling_equals_its_plain_form():
    """Plain: both branches apart, every row of the decoder, nothing shared in the first iteration."""
    module = build(kind="flow")
    sampling = MARSampling(num_iter=5, num_steps=4, cfg_scale=3.0)
    labels, orders = torch.tensor([1, 4, 1]), module.orders(torch.rand(3, 16))
    noise = [torch.randn(1, 3 * n, 12) for n in (1, 3, 3, 5, 4)]
    drawn = iter(noise)
    fast = module.generate(labels, orders, lambda *_: next(drawn), sampling)
    x, everywhere, unknown = torch.zeros(3, 16, 12), torch.arange(16).expand(3, -1), 16
    lengths = mask_lengths(16, 5)
    for k, m in enumerate(lengths):
        known, new = orders[:, unknown:], orders[:, (m if k < 4 else 0) : unknown].sort(1).values
        z = [
            take(module.net(take(x, known), known, everywhere, y), new).flatten(0, 1)
            for y in (labels, torch.full_like(labels, 5))
        ]
        scale = 1 + 2 * (16 - m) / 16
        x = put(
            x,
            new,
            module.head.sample(z[0], noise[k], uncond=z[1], cfg_scale=scale, num_steps=4, solver="euler").unflatten(
                0, new.shape
            ),
        )
        unknown = m
    torch.testing.assert_close(fast, x, atol=1e-4, rtol=1e-4)


def test_more_iterations_than_tokens_are_refused():
    with pytest.raises(ValueError, match="num_iter is 17, but 16 tokens"):
        build().sample([0], MARSampling(num_iter=17, num_steps=5))


def test_a_head_that_does_not_suit_the_tokens_is_refused():
    with pytest.raises(ValueError, match=r"head\.kind is categorical, but the tokenizer's tokens are continuous"):
        build(kind="categorical")


def test_recomputed_blocks_give_the_same_gradients():
    plain, saving = build(), build(grad_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    inputs = batch()
    grads = []
    for module in (plain.train(), saving.train()):
        module.training_loss(inputs, torch.Generator().manual_seed(3))["loss"].backward()
        grads.append([p.grad for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_mask_count_is_one_for_all_and_follows_the_seed():
    module = build()
    counts = [module.num_masked(torch.Generator().manual_seed(seed)) for seed in range(200)]
    assert counts == [module.num_masked(torch.Generator().manual_seed(seed)) for seed in range(200)]
    assert set(counts) == {12, 13, 14, 15, 16}  # 16 x [0.7, 1], rounded up
    module.objective.mask_multiple = 4
    assert {module.num_masked(torch.Generator().manual_seed(seed)) for seed in range(200)} == {12, 16}


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_falling_step_counts_reach_the_head(attention):
    module, seen = build(attention), []
    sample = module.head.sample
    module.head.sample = lambda *args, **kwargs: seen.append(kwargs["num_steps"]) or sample(*args, **kwargs)
    module.sample([0], MARSampling(num_iter=4, num_steps=20, num_steps_last=5))
    assert len(seen) == (4 if attention == "bidirectional" else 16)
    assert seen[0] == 20 and seen[-1] == 5 and seen == sorted(seen, reverse=True)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_every_named_scan_is_an_order(attention):
    """The names are RAR's; bidirectional orders reveal their last place first."""
    module, keys = build(attention, "spiral_in"), torch.rand(2, 16)
    order = module.orders(keys)[0].tolist()
    assert (order if attention == "causal" else order[::-1]) == scan_order("spiral_in", (4, 4))
    assert module.sample([0, 1], MARSampling(num_iter=4, num_steps=5)).shape == (2, 3, 8, 8)
    assert "scan" not in module.state_dict()
