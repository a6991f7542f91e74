"""DART-AR, DART-FM, Matryoshka and captions: what each of them promises, and checkpoints that fit no other settings."""

from typing import Any

import pytest
import torch
from torch import Tensor

from layers.diffusion.nomad import Nomad, mix
from layers.heads.flow import FlowHead
from layers.kv_cache import KVCache
from layers.samplers.nomad import Prediction, denoise
from layers.text.byte import ByteTokenizer
from layers.tokenizers.half import halved
from layers.tokenizers.pixels import PixelTokenizer
from layers.tokenizers.vectors import VectorTokenizer
from lightning_modules.dart import Copies, DARTModule, DARTSampling
from lightning_modules.optim import OptimConfig
from tests.methods.test_dart import images, spied, tiny

NET = {"width": 32, "depth": 2, "num_heads": 2, "mlp_hidden": 48}
CAPTIONS = ["a red ring", "two", ""]


def draws(module: DARTModule, batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, s.num_steps, s.block, module.tokenizer.token_dim) for s in module.net.stages]


# DART-AR


def test_ar_loss_predicts_each_token_from_those_before_it():
    """The velocity of copy t's token k stands where the token before token k of copy t - 1 is read."""
    module = tiny("dart_ar")
    process, x, noise = module.processes[0], torch.randn(2, 4, 12), torch.randn(2, 3, 4, 12)
    condition = module.net.of_classes(torch.tensor([0, 2]))
    found = module.denoising_loss([Copies(process, x, noise)], condition)["loss"]
    sequence = torch.cat([process.noised(x, noise).flatten(1, 2), x[:, :-1]], dim=1)  # x_T .. x_1, x_0 but one
    cache = module.net.init_cache(2, "cpu")
    h = torch.cat([module.net.extend(token, condition.vectors, cache) for token in sequence.split(1, 1)], dim=1)
    v = module.net.linear(h[:, 3:]).view(2, 3, 4, 12)
    torch.testing.assert_close(found, process.loss(v, x, noise), rtol=1e-4, atol=0)


@torch.no_grad()
def test_ar_sampling_predicts_what_training_does():
    """Teacher forcing on its own sample finds the tokens that it drew."""
    module = tiny("dart_ar")
    calls, noise = [], draws(module)[0]
    extend = module.net.extend
    module.net.extend = lambda x, *rest: calls.append(x) or extend(x, *rest)
    labels = torch.tensor([0, 2])
    x = module.generate([noise], {"label": labels}, DARTSampling(1.0))
    sequence = torch.cat([*calls, x[:, -1:]], dim=1)
    process = module.processes[0]
    v = module.net.linear(module.net(sequence[:, :-1], module.net.of_classes(labels))).view(2, 3, 4, 12)
    x_t = sequence[:, :12].view(2, 3, 4, 12)
    xhat = process.clean(x_t, v)
    torch.testing.assert_close(
        x_t[:, 1:], mix(xhat, noise.roll(-1, 1), process.gamma.roll(-1, 0))[:, :-1], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(x, xhat[:, -1], atol=1e-4, rtol=0)


# DART-FM


def test_flow_starts_at_a_draw_with_the_same_noise_and_teaches_the_trunk_through_h_alone(monkeypatch):
    module = tiny("dart_fm")
    calls = spied(module, "flow_loss", monkeypatch)
    heads: list[tuple] = []
    forward = module.head.forward
    module.head.forward = lambda *args: heads.append(args) or forward(*args)
    terms = module.training_loss(images(2))
    torch.testing.assert_close(terms["loss"], terms["denoise"] + terms["flow"])
    part, x_t, v, _ = calls[0]
    goal, hidden, time, start = heads[0]
    xhat = part.process.clean(x_t, v)[:, :-1]
    rest = part.process.gamma[1:]
    drawn = rest.sqrt() * xhat + (1 - rest).sqrt() * part.noise[:, 1:]
    torch.testing.assert_close(start[0], drawn.flatten(0, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(goal, x_t[:, 1:].flatten(0, 2))
    assert time.shape == (1, 2 * 2 * 4) and not start.requires_grad and hidden.requires_grad
    gap = (goal - start[0]).view(2, 2, 4, 12)  # the noise is gone from it
    torch.testing.assert_close(gap, rest.sqrt() * (part.x[:, None] - xhat), atol=1e-5, rtol=0)
    terms["flow"].backward()
    assert module.net.linear.weight.grad is None and module.net.x_embedder.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_flow_moves_every_copy_but_the_last_image_on_the_condition(monkeypatch):
    module = tiny("dart_fm")
    steps = spied(module.net, "extend", monkeypatch)
    runs: list[tuple] = []
    sample = module.head.sample
    monkeypatch.setattr(module.head, "sample", lambda *a, **k: runs.append((*a, k)) or sample(*a, **k))
    module.generate(draws(module), {"label": torch.tensor([0, 2])}, DARTSampling(1.5, head_steps=5))
    assert len(runs) == 2 and all(run[2]["num_steps"] == 5 for run in runs)
    moved = sample(*runs[0][:2], num_steps=5, solver="euler").view(2, 4, 12)
    torch.testing.assert_close(steps[1][0], moved.repeat(2, 1, 1))
    conditional = module.net(steps[0][0][:2].repeat(1, 3, 1), module.net.of_classes(torch.tensor([0, 2])))[:, :4]
    torch.testing.assert_close(runs[0][0], conditional.flatten(0, 1), atol=1e-4, rtol=1e-3)


def exact(process: Nomad, x_t: Tensor) -> tuple[Tensor, Tensor]:
    """E[x_0 | x_T..x_t] of data +-1, and what a head may know of them (B, T', 1, 4): x_t (B, T', 1, 1), noise first."""
    gamma = process.gamma[: x_t.shape[1]]
    x = torch.tanh((gamma.sqrt() / (1 - gamma) * x_t).cumsum(1))
    steps = torch.eye(3)[: x_t.shape[1], None].expand(len(x), -1, 1, -1)
    return x, torch.cat([x, steps], dim=-1)


def test_flow_makes_two_points_of_what_is_one_heap_without_it():
    """1-D data +-1, three steps, exact denoiser: the last copy, of signal 0.87, has two modes, a plain draw one."""
    torch.manual_seed(0)
    net = {"width": 16, "depth": 1, "num_heads": 1, "mlp_hidden": 16}
    module = DARTModule(VectorTokenizer(1, 1), 1, "dart_fm", net=net, objective={"num_steps": 3})
    module.head, process, steps = FlowHead(1, 4, width=32, depth=1), module.processes[0], 250
    optimizer = torch.optim.AdamW(module.head.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for _ in range(steps):
        part = Copies(
            process, torch.randint(0, 2, (512, 1, 1)) * 2.0 - 1, torch.randn(512, 3, 1, 1), torch.rand(512, 2, 1)
        )
        x, h = exact(process, part.noised)
        optimizer.zero_grad()
        module.flow_loss(part, part.noised, velocity_of(x, part.noised, process.gamma), h).backward()
        optimizer.step()
        schedule.step()
    assert valley(module, flow=True) < 0.7 and valley(module, flow=False) > 1.8  # seen: 0.58 and 2.4; data: 0.48


def velocity_of(x: Tensor, x_t: Tensor, gamma: Tensor) -> Tensor:
    """The v that says x_0 = x."""
    return (gamma.sqrt() * x_t - x) / (1 - gamma).sqrt()


@torch.no_grad()
def valley(module: DARTModule, *, flow: bool) -> float:
    """Density of the last copy at 0 over that at +-0.87, where the true one has its modes."""
    process, history = module.processes[0], []

    def predict(x_t: Tensor, i: int) -> Prediction:
        history.append(x_t)
        x, h = exact(process, torch.stack(history, dim=1))
        return Prediction(x[:, -1], h[:, -1])

    def refine(x: Tensor, prediction: Prediction) -> Tensor:
        hidden = prediction.hidden.flatten(0, 1)
        return module.head.sample(hidden, x.flatten(0, 1)[None], num_steps=16, solver="euler").view_as(x)

    noise = torch.randn(20_000, 3, 1, 1, generator=torch.Generator().manual_seed(1))
    denoise(predict, noise, process.gammas, refine=refine if flow else None)
    x = history[-1].flatten()
    middle, modes = (x.abs() < 0.15).sum() / 0.3, ((x.abs() - 0.87).abs() < 0.15).sum() / 0.6
    return (middle / modes).item()


# Matryoshka


def fine(variant: str = "dart", **changes: Any) -> DARTModule:
    arguments = {"net": NET, "head": {"width": 16, "depth": 1}, "objective": {"num_steps": 3, "hires_steps": 2}}
    return DARTModule(PixelTokenizer(8, 2), 3, variant, **arguments | changes)


def large(count: int) -> dict[str, Tensor]:
    return {"image": torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8), "label": torch.arange(count) % 3}


def test_both_resolutions_are_learnt_and_every_step_counts_alike(monkeypatch):
    module, batch = fine(), large(2)
    calls = spied(module, "denoising_loss", monkeypatch)
    loss = module.training_loss(batch)["loss"]
    coarse, own = calls[0][0]
    torch.testing.assert_close(own.x, module.tokenizer(batch).x)
    torch.testing.assert_close(coarse.x, PixelTokenizer(4, 2)({"image": halved(batch["image"])}).x)
    assert coarse.noise.shape == (2, 3, 4, 12) and own.noise.shape == (2, 2, 16, 12)
    zero = [part.process.loss(torch.zeros_like(part.noise), part.x, part.noise) for part in (coarse, own)]
    torch.testing.assert_close(loss, (3 * zero[0] + 2 * zero[1]) / 5)  # a fresh network predicts 0


@pytest.mark.parametrize("variant", ["dart", "dart_fm"])
def test_fine_copies_follow_the_coarse_ones_in_one_cache(variant, monkeypatch):
    module = fine(variant).eval()
    calls = spied(module.net, "extend", monkeypatch)
    x = module.sample_tokens(torch.tensor([0, 1]), DARTSampling(1.5, 2), torch.Generator().manual_seed(0))
    assert x.shape == (2, 16, 12)
    assert [call[0].shape[1] for call in calls] == [4, 4, 4, 16, 16]
    caches: set[KVCache] = {call[2] for call in calls}
    assert len(caches) == 1 and caches.pop().filled == 3 * 4 + 2 * 16


def test_cached_latents_have_one_size_only():
    with pytest.raises(ValueError, match=r"hires_steps is 2: .* cached latents will not do"):
        fine().training_loss({"raw": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "label": torch.tensor([0, 1])})


def saved(module: DARTModule, path: Any) -> str:
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}, path)
    return str(path)


def coarse_model(**changes: Any) -> DARTModule:
    return DARTModule(PixelTokenizer(4, 2), 3, **{"net": NET, "objective": {"num_steps": 3}} | changes)


@torch.no_grad()
def test_phase_two_begins_as_phase_one_ended(tmp_path):
    first, second = coarse_model(), fine()
    for param in first.parameters():
        torch.nn.init.normal_(param, std=0.2)
    second.load_coarse(saved(first, tmp_path / "last.ckpt"))
    x, labels = torch.randn(2, 12, 12), torch.tensor([0, 2])
    both = torch.cat([x, torch.randn(2, 32, 12)], dim=1)
    h = second.net(both, second.net.of_classes(labels))[:, :12]
    torch.testing.assert_close(h, first.net(x, first.net.of_classes(labels)), atol=1e-4, rtol=1e-3)


def test_phase_two_wants_the_same_coarse_model(tmp_path):
    other = saved(coarse_model(objective={"num_steps": 4}), tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"trained with objective.num_steps=4, this model has 3"):
        fine().load_coarse(other)
    torch.save({"weights": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of ours"):
        fine().load_coarse(str(tmp_path / "foreign.ckpt"))


# Checkpoints


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"num_steps": 4}}, "objective.num_steps=3, this model has 4"),
        ({"objective": {"num_steps": 3, "schedule": "matched"}}, "objective.schedule=direct, this model has matched"),
        ({"variant": "dart_ar"}, "variant=dart, this model has dart_ar"),
        ({"tokenizer": PixelTokenizer(8, 2)}, "tokens=2x2, this model has 4x4"),
        (
            {"tokenizer": PixelTokenizer(8, 2), "objective": {"num_steps": 3, "hires_steps": 2}},
            "objective.hires_steps=0, this model has 2",
        ),
    ],
)
def test_weights_of_other_settings_are_refused(changes, message, tmp_path):
    path = saved(coarse_model(), tmp_path / "last.ckpt")
    arguments = {"tokenizer": PixelTokenizer(4, 2), "num_classes": 3, "net": NET, "objective": {"num_steps": 3}}
    other = DARTModule(**arguments | changes)
    with pytest.raises(ValueError, match=message):
        other.load_official(path)


def test_a_checkpoint_rebuilds_its_model(tmp_path):
    module = tiny("dart_fm")
    again = DARTModule.load_from_checkpoint(saved(module, tmp_path / "last.ckpt"))
    assert again.variant == "dart_fm" and again.objective == module.objective
    seeds = (torch.Generator().manual_seed(0) for _ in range(2))
    assert torch.equal(*(m.sample([0, 1], generator=g) for m, g in zip((module, again), seeds, strict=True)))


# Captions


def reader(variant: str = "dart", **changes: Any) -> DARTModule:
    arguments = {"net": NET, "objective": {"num_steps": 3}, "text": ByteTokenizer(), "text_len": 12}
    arguments |= {"encoder": {"dim": 8}, "sampling": {"prompts": CAPTIONS[:2]}, "head": {"width": 16, "depth": 1}}
    module = DARTModule(PixelTokenizer(4, 2), 3, variant, **arguments | changes)
    for param in module.parameters():
        torch.nn.init.normal_(param, std=0.3)
    return module.eval()


@pytest.mark.parametrize("variant", ["dart", "dart_ar", "dart_fm"])
def test_captions_are_learnt_and_drawn(variant):
    module = reader(variant)
    loss = module.train().training_loss(images(3) | {"caption": CAPTIONS})["loss"]
    loss.backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []
    first, again, other = (
        module.sample([0, i, j], generator=torch.Generator().manual_seed(1)) for i, j in ((1, 2), (1, 0), (0, 1))
    )
    assert torch.equal(first, again) and not torch.equal(first[1], other[1])  # two prompts, round and round


@torch.no_grad()
def test_a_dropped_caption_is_no_text(monkeypatch):
    module = reader()
    texts = module.encode_text(CAPTIONS)
    asked = module.condition(texts, torch.tensor([True, False, False])).prefix
    assert torch.equal(asked[0], module.net.no_text.expand_as(asked[0]))
    assert torch.equal(asked[2], asked[0])  # the empty text
    both = module.condition(texts, torch.arange(6) >= 3).prefix
    assert torch.equal(both[1], asked[1]) and torch.equal(both[3:], asked[:1].expand(3, -1, -1))
    assert not torch.equal(asked[1, 0], asked[1, 1])


def test_no_caption_is_an_error_and_no_prompt_is_no_text():
    with pytest.raises(ValueError, match="the data has no captions"):
        reader().training_loss(images(2))
    module = reader(sampling={"prompts": []})
    assert module.num_classes == 1 and module.sample([0, 5]).shape == (2, 3, 4, 4)


def test_step_vectors_join_the_class_vector():
    module = coarse_model(net=NET | {"step_embed": True}, optim=OptimConfig(lr=1e-3))
    torch.nn.init.normal_(module.net.step_embed)
    torch.nn.init.normal_(module.net.adaLN_modulation[1].weight)
    vectors = module.net.of_classes(torch.tensor([0, 1])).vectors
    assert vectors.shape == (2, 3, 6 * 2 + 2, 32) and not torch.equal(vectors[:, 0], vectors[:, 1])
    assert module.sample([0, 1]).isfinite().all()
