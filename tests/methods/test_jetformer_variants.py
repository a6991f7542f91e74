"""JetFormer without golden files: constants of the likelihood, noise, both orders, samplers, captions, ablations."""

import logging
from dataclasses import asdict

import lightning as L
import pytest
import torch
from torch import Tensor

from datamodules.synthetic import SyntheticData
from experiments import costs
from layers.flows.factored import FactorConfig
from layers.flows.jet import JetConfig
from layers.networks.jetformer import DecoderConfig
from layers.samplers.gmm_cfg import product
from layers.text.byte import ByteTokenizer
from layers.tokenizers.base import Tokens, to_uint8
from layers.tokenizers.dequantised import DequantisedTokenizer
from layers.tokenizers.pixels import PixelTokenizer
from lightning_modules.jet import JetModule
from lightning_modules.jetformer import (
    Draws,
    HeadConfig,
    JetFormerModule,
    JetFormerObjective,
    JetFormerSampling,
    rgb_noise,
)

FLOW = {"depth": 4, "block_depth": 1, "width": 16, "num_heads": 2, "kinds": ["channels"]}
BOTH = {"text_first_prob": 0.5, "text_weight": 0.1}
QUIET = {"token_noise": 0.0, "rgb_noise_max": 0.0}
PROMPTS = ["ab", "a longer one", ""]


def module(captions: bool = False, **changes) -> JetFormerModule:
    """A small model of class labels, or of captions in both orders; nothing is at its initial value."""
    torch.manual_seed(0)
    options = {"objective": JetFormerObjective(**(BOTH if captions else {}))}
    if captions:
        options |= {"text": ByteTokenizer(), "text_len": 14, "ignore_pad": True}
    text = {"text_tables": 1, "text_head": "untied"} if captions else {"text_tables": 2}
    sizes = {"width": 24, "depth": 2, "num_heads": 2, "head_dim": 12, "mlp_hidden": 32, "dropout": 0.0}
    options |= {
        "tokenizer": DequantisedTokenizer(8, 4),
        "num_classes": 5,
        "net": DecoderConfig(**sizes, **text),
        "head": HeadConfig(num_mixtures=3, dtype="float32"),
        "flow": JetConfig(**FLOW),
        "factor": FactorConfig(dim=20),
    }
    built = JetFormerModule(**options | changes)
    for coupling in built.front.jet.couplings:
        for p in coupling.net.final_proj.parameters():
            torch.nn.init.normal_(p, std=0.05)
    return built.eval()


def images(count: int, side: int = 8) -> Tensor:
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8)


def fit(built, data=None, *, steps=2, **options) -> L.Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        max_steps=steps,
        max_epochs=-1,
        **options,
    )
    trainer.fit(built.train(), SyntheticData(8, 4, num_classes=5, length=32) if data is None else data)
    built.eval()
    return trainer


# The constants


class Strip(DequantisedTokenizer):
    """Grey images of one row and two columns with four levels, as one token."""

    def __init__(self) -> None:
        super().__init__(1, 1, channels=1, levels=4)
        self.grid, self.token_dim = (1, 1), 2

    def init_args(self):
        return {}

    def encode_image(self, images: Tensor) -> Tensor:
        left, right = (DequantisedTokenizer.encode_image(self, column) for column in images.split(1, dim=-1))
        return torch.cat([left, right], dim=-1)

    def encode_raw(self, raw, generator=None) -> Tokens:
        x, logdet = super().encode_raw(raw, generator)
        return Tokens(x.flatten(1)[:, None], logdet)


def world() -> Tensor:
    """All 16 images."""
    levels = torch.cartesian_prod(torch.arange(4), torch.arange(4)) * 85
    return levels.to(torch.uint8)[:, None, None].expand(-1, 3, -1, -1)


FRONTS = [{"dim": 1}, {"dim": None, "split": "linear"}]
MORE_FRONTS = [pytest.param(front, marks=pytest.mark.slow) for front in ({"dim": None}, {"dim": None, "split": "pca"})]


@pytest.mark.parametrize("factor", [*FRONTS, *MORE_FRONTS], ids=str)
def test_probabilities_of_all_images_of_a_small_world_sum_to_one(factor):
    """By integration over each image's cell, of the density that bits per dimension say; trained on the middle of the
    world, so that next to nothing lies outside."""
    built = module(tokenizer=Strip(), factor=FactorConfig(**factor), objective=JetFormerObjective(**QUIET))
    middle = world()[[5, 6, 9, 10]].repeat(4, 1, 1, 1)
    batch = {"image": middle, "label": torch.arange(16) % 5}
    if factor.get("split") == "pca":
        built.front.linear.fit([built.tokenizer(batch).x])
    optimizer = torch.optim.Adam(built.parameters(), lr=2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        built.train().training_loss(batch)["loss"].backward()
        optimizer.step()
    side = (torch.arange(12) + 0.5) / 12
    points = torch.special.ndtri(torch.cartesian_prod(side, side))  # (144, 2) in the unit square, as normal numbers
    cells = points.repeat(16, 1)[:, None, None]  # (16 * 144, 1, 1, 2)
    for label in (0, 3):
        bits = built.image_bits(world().repeat_interleave(144, 0), [label] * len(cells), lambda shape: cells)
        mass = torch.exp2(-2 * bits.double()).view(16, 144).mean(1)
        assert mass.sum().item() == pytest.approx(1, abs=0.02)
        assert mass[[5, 6, 9, 10]].sum() > 0.5 and mass.max() < 0.5, "it has learnt what is there"


def test_bits_at_the_start_are_those_of_the_specification():
    """8.3201 + 0.7213 E[z^2]: every latent standard normal, the flow the identity."""
    built = module(head=HeadConfig(num_mixtures=3, init="zero", dtype="float32"))
    for coupling in built.front.jet.couplings:
        for p in coupling.net.final_proj.parameters():
            torch.nn.init.zeros_(p)
    shown, place = images(4), torch.randn(4, 3, 8, 8)
    energy = built.tokenizer({"image": shown}, lambda shape: place).x.square().mean((1, 2))
    bits = built.image_bits(shown, [0, 1, 2, 3], lambda shape: place)
    torch.testing.assert_close(bits, 8.3201 + 0.7213 * energy, atol=1e-3, rtol=0)


# Noise


def test_noise_spares_images_that_come_first_and_keeps_whole_levels():
    built = module(captions=True).train()
    shown, first = images(2), torch.tensor([True, False])
    draws = built.draw(shown.shape, None)._replace(text_first=first, rgb_sigma=40.0)
    found = levels(built, built.tokens_of(shown, draws), draws)
    assert not torch.equal(found[0], shown[0]) and (found - found.round()).abs().max() < 1e-3
    assert found[0].min() < 0 or found[0].max() > 255, "noisy levels are not clipped"
    torch.testing.assert_close(found[1], shown[1].float(), atol=1e-3, rtol=0)
    soft = torch.randn(2, 4, 20, requires_grad=True)
    noised = built.noised(soft, draws)
    assert (noised[0] != soft[0]).all() and torch.equal(noised[1], soft[1])
    noised.sum().backward()
    assert soft.grad[0].eq(1).all() and soft.grad[1].eq(0).all()


def levels(built: JetFormerModule, tokens: Tokens, draws: Draws) -> Tensor:
    """What levels became tokens, noise of dequantisation taken off."""
    again = built.tokenizer.encode_raw(torch.zeros_like(draws.place), lambda shape: draws.place).x
    difference = (tokens.x - again) / built.tokenizer.step
    return difference.view(-1, 2, 2, 4, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(draws.place.shape)


def test_noise_is_in_levels_of_256_whatever_the_tokenizers():
    built = module(tokenizer=DequantisedTokenizer(8, 4, levels=52)).train()
    shown = torch.full((64, 3, 8, 8), 25, dtype=torch.uint8)
    draws = built.draw(shown.shape, None)._replace(rgb_sigma=50.0)
    assert levels(built, built.tokens_of(shown, draws), draws).std().item() == pytest.approx(10, rel=0.05)


def test_dropped_prefixes_are_texts_that_come_first():
    built = module(captions=True).train()
    draws = built.draw((2000, 3, 8, 8), None)
    dropped = built.dropped(draws)
    assert draws.text_first.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert not (dropped & ~draws.text_first).any()
    assert (dropped.sum() / draws.text_first.sum()).item() == pytest.approx(0.1, abs=0.03)
    assert draws.token_sigma.max() <= 0.3 and draws.token_sigma.std() > 0.05
    assert built.dropped(built.eval().draw((4, 3, 8, 8), None)) is None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_noise_on_pixels_falls_over_the_run_by_optimiser_steps(accumulate):
    built, seen = module(), []
    draw = built.draw
    built.draw = lambda *args: (seen.append(draw(*args)), seen[-1])[1]
    fit(built, SyntheticData(8, 4 * accumulate, num_classes=5, length=32), steps=4, accumulate_grad_batches=accumulate)
    expected = [rgb_noise(k, 4, largest=64.0, smallest=0.0) for k in range(4) for _ in range(accumulate)]
    assert [draws.rgb_sigma for draws in seen] == pytest.approx(expected)


def test_noise_without_an_end_to_fall_to_is_refused():
    with pytest.raises(ValueError, match=r"falls to rgb_noise_min .* no end: give --trainer.max_steps"):
        fit(module(), steps=-1)


# Both orders


def test_validation_scores_every_image_behind_its_text_and_every_text_behind_its_image():
    built = module(captions=True)
    shown, captions = images(4), ["a", "bc", "def", ""]
    draws = Draws(torch.tensor([True, False, True, False]), torch.randn(4, 3, 8, 8))
    built.draw = lambda *_: draws
    with torch.no_grad():
        found = built.training_loss({"image": shown, "label": torch.zeros(4, dtype=torch.int64), "caption": captions})
    bits = built.image_bits(shown, captions, lambda shape: draws.place)
    nats = built.caption_nats(shown, captions, lambda shape: draws.place)
    torch.testing.assert_close(found["bpd"].float(), bits.mean())
    torch.testing.assert_close(found["text_nats"], nats.mean())
    torch.testing.assert_close(found["loss"], torch.where(draws.text_first, bits, 0.1 * nats).mean())


@pytest.mark.parametrize("captions", [False, True])
def test_the_likelihood_of_texts_is_logged_by_models_that_learn_it(captions):
    batch = {"image": images(2), "label": torch.zeros(2, dtype=torch.int64), "caption": ["a", "b"]}
    assert ("text_nats" in module(captions=captions).training_loss(batch)) == captions


def test_image_first_examples_do_not_train_the_flow():
    built = module(captions=True).train()
    shown = images(3)
    for first in (True, False):
        draws = built.draw(shown.shape, None)._replace(text_first=torch.full((3,), first))
        built.draw, draw = lambda *_, draws=draws: draws, built.draw
        built.zero_grad()
        built.training_loss({"image": shown, "label": torch.zeros(3), "caption": ["a", "b", "c"]})["loss"].backward()
        built.draw = draw
        moved = any(p.grad is not None and p.grad.abs().max() > 0 for p in built.front.parameters())
        assert moved == first


# Samplers


def exactly(built: JetFormerModule, texts, soft: Tensor, *, dropped: bool) -> tuple[Tensor, Tensor]:
    """loc and scale of the one component, teacher forced."""
    every = torch.ones(len(soft), dtype=torch.bool)
    h = built.hidden(soft, texts, every, every if dropped else None)
    mixture = built.head.distribution(h.image)
    return mixture.loc[..., 0, :], mixture.scale[..., 0, :]


@pytest.mark.parametrize("captions", [False, True])
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@torch.no_grad()
def test_without_noise_each_token_is_the_mean_that_teacher_forcing_gives(captions, cfg_scale):
    """One component, noise of zeros: the cache, the prompts' padding and both branches are then checked at once."""
    built = module(captions, head=HeadConfig(num_mixtures=1, dtype="float32"))
    sampling = JetFormerSampling(cfg_scale=cfg_scale, prompts=PROMPTS if captions else [])
    texts = built._encoded_texts(PROMPTS if captions else [0, 3, 4])
    soft = built.soft_tokens(texts, sampling, lambda shape: torch.zeros(*shape))
    loc, scale = exactly(built, texts, soft, dropped=False)
    if cfg_scale > 1:
        loc_u, scale_u = exactly(built, texts, soft, dropped=True)
        assert (loc - loc_u).abs().max() > 0.01
        loc = loc + scale * product(loc, scale, loc_u, scale_u, cfg_scale - 1).mean
    torch.testing.assert_close(soft, loc, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_prompts_of_unlike_lengths_do_not_disturb_each_other():
    built = module(captions=True)

    def draw(prompts, seeds):
        sampling = JetFormerSampling(cfg_scale=2.0, prompts=prompts)
        return built.sample(range(len(prompts)), sampling, [torch.Generator().manual_seed(s) for s in seeds])

    together = draw(PROMPTS, [0, 1, 2])
    for i, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(draw([prompt], [i])[0], together[i], atol=1e-4, rtol=0)


@torch.no_grad()
def test_guidance_by_the_official_algorithm_draws_too():
    built = module()
    sampling = JetFormerSampling(cfg_scale=2.0, guidance="rejection")
    assert built.sample([1, 2], sampling, torch.Generator().manual_seed(0)).shape == (2, 3, 8, 8)


@torch.no_grad()
def test_latents_of_an_image_give_the_image_back():
    built, shown = module(), images(4)
    latents = built.front(built.tokenizer({"image": shown}).x)
    assert torch.equal(to_uint8(built.tokenizer.decode(built.front.inverse(latents.soft, latents.rest))), shown)


def test_labels_of_a_model_of_captions_are_prompts_round_and_round():
    built = module(captions=True, sampling=JetFormerSampling(prompts=["ab", "cd"]))
    assert built.num_classes == 2 and module(captions=True).num_classes == 1
    again = [[torch.Generator().manual_seed(i) for i in (0, 1)] for _ in range(2)]
    assert torch.equal(built.sample([0, 1], generator=again[0]), built.sample([2, 3], generator=again[1]))
    assert module(captions=True).sample([0]).shape == (1, 3, 8, 8)


# Captions


@torch.no_grad()
def test_greedy_captions_are_the_likeliest_words_under_teacher_forcing():
    built, shown, seen = module(captions=True), images(3), []
    built.decode_text = lambda ids: seen.append(ids)
    place = torch.randn(3, 3, 8, 8)
    built.caption(shown, generator=lambda shape: place)
    soft = built.front(built.tokenizer({"image": shown}, lambda shape: place).x).soft
    h = built.net(soft, seen[0], torch.zeros(3, dtype=torch.bool))
    assert torch.equal(built.net.text_logits(h.text).argmax(-1), seen[0]) and seen[0].shape == (3, 14)


def test_captions_at_a_temperature_follow_their_generators():
    built, shown = module(captions=True), images(2)

    def caption(seeds, shown):
        return built.caption(shown, temperature=1.0, generator=[torch.Generator().manual_seed(s) for s in seeds])

    both = caption([1, 2], shown)
    assert both == caption([1, 2], shown) != caption([3, 4], shown)
    assert caption([2], shown[1:]) == both[1:]


def test_log_probabilities_of_texts_and_the_likeliest_one():
    built, shown, place = module(captions=True), images(2), torch.randn(2, 3, 8, 8)
    texts = ["one", "three or four", ""]
    found = built.text_log_probs(shown, texts, lambda shape: place)
    for k, text in enumerate(texts):
        nats = built.caption_nats(shown, [text] * 2, lambda shape: place)
        torch.testing.assert_close(found[:, k], -nats * min(len(text) + 1, 14))
    assert torch.equal(built.classify(shown, texts, lambda shape: place), found.argmax(1))


def test_reading_images_leaves_the_mode_alone():
    built = module(captions=True).train()
    built.caption(images(1)), built.image_bits(images(1), ["a"]), built.text_log_probs(images(1), ["a"])
    assert built.training


# Ablations


def test_a_flow_that_was_trained_alone_is_taken_over_and_kept(tmp_path):
    alone = JetModule(DequantisedTokenizer(8, 4), 5, JetConfig(**FLOW))
    fit(alone, steps=3).save_checkpoint(tmp_path / "jet.ckpt")
    expected = {name.removeprefix("net."): tensor for name, tensor in alone.state_dict().items()}
    factor = FactorConfig(dim=20, frozen_flow=True)
    built = module(factor=factor, flow_from=str(tmp_path / "jet.ckpt"))
    fit(built, steps=2)
    found = built.front.jet.state_dict()
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in found)
    with pytest.raises(ValueError, match=r"the flow of .*jet.ckpt \(flow_from\) does not fit"):
        fit(module(flow=JetConfig(**FLOW | {"depth": 3}), flow_from=str(tmp_path / "jet.ckpt")))


def test_principal_components_are_fitted_to_the_data_once(tmp_path):
    data = SyntheticData(8, 4, num_classes=5, length=32)
    built = module(factor=FactorConfig(dim=20, split="pca"))
    fit(built, data, steps=2).save_checkpoint(tmp_path / "a.ckpt")
    images = torch.cat([batch["image"] for batch in data.ordered_loader("train")])
    codes, _ = built.front.linear(built.tokenizer({"image": images}).x)
    torch.testing.assert_close(codes.flatten(0, 1).mean(0), torch.zeros(48), atol=0.1, rtol=0)
    assert codes.flatten(0, 1).std(0)[:20].sub(1).abs().max() < 0.1
    again = JetFormerModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(again.front.linear.components, built.front.linear.components)


@pytest.mark.parametrize("changes", [{"dim": None}, {"split": "linear"}, {"split": "pca"}, {"frozen_flow": True}])
def test_every_front_trains_and_draws(changes):
    built = module(factor=FactorConfig(**{"dim": 20} | changes))
    fit(built, steps=2)
    assert built.sample([0, 1]).isfinite().all()


# Files


def test_new_classes_get_rows_in_every_table_and_special_ones_stay():
    theirs, ours = module(num_classes=7), module(num_classes=5, init_classes="new")
    fresh = ours.net.text_embed.weight.detach().clone().view(2, 8, -1)
    state = ours._with_new_classes(dict(theirs.state_dict()))
    found, official = state["net.text_embed.weight"].view(2, 8, -1), theirs.net.text_embed.weight.view(2, 10, -1)
    assert torch.equal(found[:, :5], fresh[:, :5]) and torch.equal(found[:, 5:], official[:, 7:])
    for other in ({"text_tables": 3}, {"width": 64}):  # the strict load says what differs
        wrong = module(num_classes=5, init_classes="new", net=asdict(theirs.net.config) | other)
        assert wrong._with_new_classes(dict(theirs.state_dict())).keys() == theirs.state_dict().keys()
    with pytest.raises(ValueError, match="init_classes=new is for class labels"):
        module(captions=True, init_classes="new")._with_new_classes({})


# Precision and costs


@torch.no_grad()
def test_bits_under_autocast_are_those_of_float32():
    built, shown, place = module(), images(4), torch.randn(4, 3, 8, 8)
    exact = built.image_bits(shown, [0, 1, 2, 3], lambda shape: place)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = built.image_bits(shown, [0, 1, 2, 3], lambda shape: place)
    assert rounded.dtype == torch.float32 and (rounded - exact).abs().max() < 0.02


@pytest.mark.parametrize("captions", [False, True])
def test_costs_can_be_counted_without_data(captions):
    with torch.device("meta"):
        built = module(captions).to("meta")
    assert costs.training_flops(built)[0] > 0 and costs.sampling_flops(built) > 0


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": PixelTokenizer(8, 4)}, "PixelTokenizer has no density: use .*DequantisedTokenizer"),
        ({"sampling": {"prompts": ["a"]}}, r"prompts is \['a'\], but this model learns class labels: give LABELS="),
        ({"objective": {"token_noise": -1.0}}, "token_noise is -1.0"),
        ({"objective": {"rgb_noise_min": 65.0}}, "must not grow"),
        ({"objective": {"text_first_prob": 1.5}}, "text_first_prob is 1.5: it must be in 0..1"),
        ({"factor": {"dim": 49}}, "factor.dim is 49, but tokens have 48 numbers"),
        ({"sampling": {"temperature": 0.0}}, "temperature is 0.0"),
        ({"sampling": {"inv_temperature": -1.0}}, "inv_temperature is -1.0"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        module(**changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.caption(images(1)), "trained on class labels and knows no text"),
        (lambda m: m.image_bits(images(1), ["a"]), "trained on class labels and knows no text: give LABELS="),
        (lambda m: m.image_bits(images(1), [5]), "label 5 is out of range"),
        (lambda m: m.image_bits(images(2), [0]), "1 labels or captions were given for 2 images"),
        (lambda m: m.image_bits(images(1, 9), [0]), "images are 9x9, the tokenizer expects 8"),
        (lambda m: m.sample([0], JetFormerSampling(temperature=0.0)), "temperature is 0.0"),
    ],
)
def test_a_model_of_labels_says_what_it_cannot_do(call, message):
    with pytest.raises(ValueError, match=message):
        call(module())


def test_errors_of_a_model_of_captions():
    built = module(captions=True)
    with pytest.raises(ValueError, match=r"temperature is -1.0: it must not be negative"):
        built.caption(images(1), temperature=-1.0)
    with pytest.raises(ValueError, match="the data has no captions, which this model learns"):
        built.training_loss({"image": images(1), "label": torch.zeros(1)})
    with pytest.raises(ValueError, match="trained on captions and knows no labels: give one text for each image"):
        built.image_bits(images(2), [0, 1])
    with pytest.raises(ValueError, match="no texts were given to compare"):
        built.classify(images(1), [])


def test_guidance_of_a_model_that_always_saw_its_texts_is_refused():
    built = module(objective=JetFormerObjective(prefix_drop_prob=0.0))
    with pytest.raises(ValueError, match=r"cfg_scale is 2.0, but guidance needs .* set cfg_scale to 1"):
        built.sample([0], JetFormerSampling(cfg_scale=2.0))
    built.sample([0])
    with pytest.raises(ValueError, match=r"cfg_scale is 2.0, but guidance needs"):  # before a step is lost
        fit(module(objective={"prefix_drop_prob": 0.0}, sampling={"cfg_scale": 2.0}))


def test_flow_from_a_file_of_another_kind_is_refused(tmp_path):
    torch.save({"model": {}}, tmp_path / "official.pth")
    with pytest.raises(ValueError, match=r"official.pth \(flow_from\) is no checkpoint of ours"):
        fit(module(flow_from=str(tmp_path / "official.pth")))


def test_long_captions_are_cut_and_empty_ones_are_their_end():
    built = module(captions=True)
    batch = built.encode_text(["0123456789abcdef", ""])
    assert built.decode_text(batch["text"]) == ["0123456789abcd", ""]
    assert batch["text_loss"].sum(1).tolist() == [14, 1] and batch["text_mask"].sum(1).tolist() == [14, 0]
    assert built.caption_nats(images(2), ["0123456789abcdef", ""]).isfinite().all()
