"""Schedules, choice and loop of masked generation: golden tables exactly, the loop against a plain masked one."""

import math
import re

import pytest
import torch

from layers.samplers.maskgit import (
    choice_temperatures,
    gumbel_from_normal,
    mask_counts,
    mask_ratio,
    maskgit_decode,
    num_masked,
    official_counts,
    random_masks,
    split_by_confidence,
)
from tests.golden_cases import Golden, case_id, golden_paths, read_json

PATHS = golden_paths("givt", "**/mask_schedule*.safetensors")


@pytest.mark.parametrize("path", PATHS, ids=case_id)
def test_golden_schedules_and_choices(path):
    with Golden(path) as golden:
        for name in golden.names():
            kind, *rest = name.split("/")
            if kind == "train" and len(rest) == 2:
                check_training(golden, *rest)
            elif kind == "decode":
                check_decoding(golden, *rest)
        for i, temperature in enumerate(read_json(path.with_suffix(".json"))["topk_temperatures"]):
            check_choice(golden, f"topk/{i}", temperature)


def check_training(golden, schedule, what):
    ratio = mask_ratio(golden["train/keep_uniform"], schedule)
    expected = golden[f"train/{schedule}/{what}"]
    if what == "mask_ratio":
        assert torch.equal(ratio, expected)
    else:
        assert torch.equal(num_masked(ratio, int(what.removeprefix("num_masked_S"))), expected.long())


def check_decoding(golden, schedule, what):
    seq_len, num_iter = (int(n) for n in re.fullmatch(r"mask_len_S(\d+)_T(\d+)", what).groups())
    expected = golden[f"decode/{schedule}/{what}"].tolist()
    assert official_counts(seq_len, num_iter, schedule) == expected
    if num_iter <= seq_len:
        assert mask_counts(seq_len, num_iter, schedule) == expected


def check_choice(golden, name, temperature):
    confidence = golden["topk/probs"].log() + temperature * golden[f"{name}/gumbel"]
    for row, count, expected in zip(confidence, golden["topk/mask_len"].flatten(), golden[f"{name}/mask"], strict=True):
        masked, fixed = split_by_confidence(row[None], int(count))
        assert masked[0].tolist() == expected.nonzero().flatten().tolist()
        assert fixed[0].tolist() == (1 - expected).nonzero().flatten().tolist()


@pytest.mark.parametrize("schedule", ["cosine", "pow:0.5", "pow:1", "pow:3"])
@pytest.mark.parametrize("seq_len", [1, 2, 37, 256])
def test_every_iteration_fixes_a_token_and_the_last_all(schedule, seq_len):
    for num_iter in {1, 2, seq_len // 2, seq_len} & set(range(1, seq_len + 1)):
        counts = mask_counts(seq_len, num_iter, schedule)
        assert len(counts) == num_iter and counts[-1] == 0
        assert all(before > after or before == 0 for before, after in zip([seq_len, *counts], counts, strict=False))


def test_counts_are_those_of_float32():
    assert mask_counts(256, 12, "cosine")[7] == 127


@pytest.mark.parametrize("num_iter", [0, -1, 17])
def test_impossible_iterations_name_value_and_range(num_iter):
    with pytest.raises(ValueError, match=rf"num_iter is {num_iter}, but 16 tokens.*1\.\.16"):
        mask_counts(16, num_iter, "cosine")


@pytest.mark.parametrize("schedule", ["linear", "pow", "pow:", "pow:x", "pow:0", "pow:-1", "pow:nan", "pow:inf", ""])
def test_unknown_schedules_are_named(schedule):
    with pytest.raises(ValueError, match=re.escape(f"schedule is {schedule!r}: use cosine, or pow:p")):
        mask_counts(16, 4, schedule)


def test_choice_temperature_falls_to_zero_or_stays():
    assert choice_temperatures(4.0, 4, anneal=True) == [3, 2, 1, 0]
    assert choice_temperatures(4.0, 3, anneal=False) == [4, 4, 4]


def test_training_masks_have_the_counts_of_their_rows_where_keys_are_smallest():
    u, keys = torch.rand(64), torch.rand(64, 37)
    masks = random_masks(u, keys, min_rate=0.3, schedule="cosine")
    expected = num_masked(mask_ratio(u * 0.7, "cosine"), 37)
    assert masks.dtype == torch.bool and torch.equal(masks.sum(1), expected)
    for mask, row in zip(masks, keys, strict=True):
        assert row[mask].max() <= row[~mask].min() if not mask.all() else mask.all()
    assert torch.equal(random_masks(u[5:6], keys[5:6], min_rate=0.3, schedule="cosine")[0], masks[5])


def test_training_rate_has_the_stated_range_and_mean():
    """spec/givt.md section 5: [0.454, 1], mean 0.810, for a minimum of 0.3."""
    u = (torch.arange(20000) + 0.5) / 20000
    ratio = mask_ratio(u * 0.7, "cosine")
    assert ratio.min().item() == pytest.approx(0.454, abs=1e-3) and ratio.max() <= 1
    assert ratio.mean().item() == pytest.approx(0.810, abs=1e-3)
    assert random_masks(torch.zeros(2), torch.rand(2, 9), min_rate=0.3, schedule="cosine").all()


def test_gumbel_noise_has_its_quantiles_and_no_infinities():
    normal = torch.tensor([-6.0, -1.0, 0.0, 1.0, 6.0])
    share = torch.special.ndtr(normal.double())
    expected = -(-share.log()).log()
    assert gumbel_from_normal(normal).tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert gumbel_from_normal(torch.zeros(1)).item() == pytest.approx(-math.log(math.log(2)), rel=1e-6)


def masked_decode(x, unknown, propose, counts, temperatures, noise):
    """The loop as the official code has it: masks instead of positions, all tokens ranked, known ones infinitely sure.

    x (B, L, D), unknown (B, L).
    """
    everywhere = torch.arange(x.shape[1]).expand(x.shape[:2])
    for k, (count, temperature) in enumerate(zip(counts, temperatures, strict=True)):
        tokens, log_prob = propose(x, unknown, everywhere, k)
        sampled = torch.where(unknown[..., None], tokens, x)
        confidence = torch.where(unknown, log_prob, torch.inf) + temperature * noise(k)
        still = torch.zeros_like(unknown)
        for row, order in zip(still, confidence.argsort(dim=1, stable=True), strict=True):
            row[order[:count]] = True
        x, unknown = sampled.masked_fill(still[..., None], 0), still
    return x


class Random:
    """Draws and log-probabilities that depend on what is known, on iteration and position; seen: masks it was given."""

    def __init__(self, seed=0, dim=2):
        self.a, self.b = torch.randn(2, 8, 64, dim, generator=torch.Generator().manual_seed(seed))
        self.seen = []

    def __call__(self, x, unknown, positions, k):
        self.seen.append((x.clone(), unknown.clone(), positions.clone()))
        rows = torch.arange(len(x))[:, None]
        tokens = torch.tanh(self.a[k, positions] + x.sum(1, keepdim=True) + unknown.sum(1)[:, None, None])
        confidence = (self.b[k, positions] * (x.mean(1, keepdim=True) + rows[..., None] + 1)).sum(-1)
        return tokens, confidence.mul(2).round()  # rounded: ties occur


def noise_of(images, length, seed=1):
    noise = gumbel_from_normal(torch.randn(8, images, length, generator=torch.Generator().manual_seed(seed)))
    return lambda k: noise[k]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize(("length", "num_iter"), [(1, 1), (7, 7), (16, 5), (33, 8)])
def test_decoding_equals_the_loop_with_masks(length, num_iter, temperature):
    x, positions = torch.zeros(3, length, 2), torch.arange(length).expand(3, -1)
    counts = mask_counts(length, num_iter, "cosine")
    temperatures = choice_temperatures(temperature, num_iter, anneal=True)
    noise = noise_of(3, length)
    out = maskgit_decode(x, positions, Random(), counts=counts, temperatures=temperatures, gumbel=noise)
    plain = masked_decode(x, torch.ones(3, length, dtype=torch.bool), Random(), counts, temperatures, noise)
    assert torch.equal(out, plain) and not x.any()  # the argument is not changed in place


def test_a_fixed_token_is_never_changed_and_known_ones_stay():
    model, x = Random(), torch.zeros(2, 12, 2)
    unknown = torch.ones(2, 12, dtype=torch.bool)
    unknown[0, [2, 5, 6, 11]] = unknown[1, [0, 1, 7, 8]] = False
    x[~unknown] = torch.randn(8, 2)
    positions = unknown.nonzero()[:, 1].reshape(2, 8)
    counts = mask_counts(8, 4, "cosine")
    out = maskgit_decode(x, positions, model, counts=counts, temperatures=[9.0] * 4, gumbel=noise_of(2, 12))
    assert torch.equal(out[~unknown], x[~unknown])
    assert [int(seen[1][0].sum()) for seen in model.seen] == [8, *counts[:-1]]
    for (earlier, open_then, _), (later, open_now, positions) in zip(model.seen, model.seen[1:], strict=False):
        assert (open_now <= open_then).all() and torch.equal(later[~open_then], earlier[~open_then])
        assert not later[open_now].any() and torch.equal(positions, open_now.nonzero()[:, 1].reshape(2, -1))


def test_without_noise_the_surest_are_kept():
    log_prob = torch.tensor([[0.1, 3, 2, 5, 1, 4]])

    def propose(x, unknown, positions, k):
        return torch.full(positions.shape, k), log_prob.gather(1, positions)

    ids = maskgit_decode(
        torch.full((1, 6), -1),
        torch.arange(6)[None],
        propose,
        counts=[4, 1, 0],
        temperatures=[0.0] * 3,
        gumbel=lambda k: torch.zeros(1, 6),
    )
    assert ids.tolist() == [[2, 1, 1, 0, 1, 0]]


def test_iterations_without_unknown_tokens_are_not_run():
    model, counts = Random(), official_counts(3, 6, "cosine")
    assert counts == [2, 1, 0, 0, 0, 0]
    x, positions = torch.zeros(2, 3, 2), torch.arange(3).expand(2, -1)
    maskgit_decode(x, positions, model, counts=counts, temperatures=[0.0] * 6, gumbel=noise_of(2, 3))
    assert len(model.seen) == 3


def test_an_image_does_not_depend_on_its_batch():
    counts, temperatures, noise = mask_counts(16, 5, "cosine"), [2.0] * 5, noise_of(3, 16)
    table = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))

    def decode(images):
        def propose(x, unknown, positions, k):
            return (table[images].gather(1, positions) + k)[..., None], table[images].gather(1, positions)

        positions = torch.arange(16).expand(len(images), -1)
        return maskgit_decode(
            torch.zeros(len(images), 16, 1),
            positions,
            propose,
            counts=counts,
            temperatures=temperatures,
            gumbel=lambda k: noise(k)[images],
        )

    together = decode([0, 1, 2])
    for image in range(3):
        assert torch.equal(decode([image])[0], together[image])


def test_nothing_is_read_on_the_host():
    """Tensors of the meta device have no values: reading one fails, where on a GPU it would wait."""
    x, positions = torch.zeros(2, 9, 3, device="meta"), torch.arange(9, device="meta").expand(2, -1)

    def propose(x, unknown, positions, k):
        return torch.zeros(*positions.shape, 3, device="meta"), torch.zeros(positions.shape, device="meta")

    counts, temperatures = mask_counts(9, 3, "cosine"), choice_temperatures(2.0, 3, anneal=True)
    noise = torch.zeros(2, 9, device="meta")
    out = maskgit_decode(x, positions, propose, counts=counts, temperatures=temperatures, gumbel=lambda k: noise)
    assert out.shape == x.shape
    assert random_masks(noise[:, 0], noise, min_rate=0.3, schedule="cosine").shape == (2, 9)
