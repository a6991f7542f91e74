"""Loops of autoregressive generation: order of calls, and beams against enumeration and against plain lists.

The official code's arrays are replayed in tests/methods/test_givt_sampling.py.
"""

from itertools import product

import pytest
import torch

from layers.samplers.autoregressive import autoregress, beam_search


class Echo:
    """A continuous model whose state depends on the whole past, kept in a cache: rows of tokens (rows, j, D)."""

    def __init__(self, rows, dim=2, *, images=1, seed=0):
        self.noise = torch.randn(12, rows, 5, dim, generator=torch.Generator().manual_seed(seed))  # by position
        self.cache = torch.zeros(rows, 0, dim)
        self.h = torch.arange(1.0, images + 1).repeat_interleave(rows // images)[:, None].expand(-1, dim)
        self.calls = []

    def step(self, token, j):
        self.calls.append(("step", j))
        self.cache = torch.cat([self.cache, token[:, None]], dim=1)
        weights = torch.arange(1.0, self.cache.shape[1] + 1)[:, None]
        return (self.cache * weights).sum(1).sin()

    def draw(self, h, j):
        self.calls.append(("draw", j))
        return h + self.noise[j, :, 0]

    def propose(self, h, j, fans):
        self.calls.append(("propose", j, fans))
        tokens = h[:, None] + self.noise[j, :, :fans]
        return tokens, -(tokens - 0.3 * h[:, None]).square().sum(-1)

    def reorder(self, index):
        self.calls.append(("reorder",))
        self.cache = self.cache[index]


def test_each_token_is_drawn_from_the_state_that_follows_all_before_it():
    model = Echo(3)
    tokens = autoregress(model.h, model.step, model.draw, 4)
    assert model.calls == [("draw", 0)] + [call for j in range(1, 4) for call in (("step", j - 1), ("draw", j))]
    again, h = Echo(3), model.h
    for j in range(4):
        torch.testing.assert_close(tokens[:, j], h + again.noise[j, :, 0], rtol=0, atol=0)
        h = again.step(tokens[:, j], j)


def test_one_token_needs_no_step_and_ids_need_no_dimension():
    ids = autoregress(torch.zeros(2, 5), None, lambda h, j: torch.tensor([3, 4]), 1)
    assert ids.tolist() == [[3], [4]]
    counted = autoregress(torch.zeros(2, 5), lambda token, j: token[:, None] + 1, lambda h, j: h[:, 0].long(), 3)
    assert counted.dtype == torch.int64 and counted.tolist() == [[0, 1, 2]] * 2


def test_the_first_axis_may_hold_both_branches_of_guidance():
    """A state of 2B rows, a draw for B: what the docstring promises."""
    tokens = autoregress(
        torch.tensor([[1.0], [10.0]]),
        lambda token, j: torch.cat([token, 10 * token]),
        lambda h, j: h[:1] + 2 * (h[1:] - h[:1]),
        3,
    )
    assert tokens.flatten().tolist() == [19, 19 + 2 * 171, 361 + 2 * 9 * 361]


def listed_beams(model, images, length, num_beams, num_fans, surplus):
    """Beam search with lists of (score after each token, tokens), one image after another at every position."""
    h, rows = model.h, range(num_beams)
    drawn, log_probs = model.propose(h, 0, 1)
    beams = [
        [([log_probs[b * num_beams + r, 0].item()], [drawn[b * num_beams + r, 0]]) for r in rows] for b in range(images)
    ]
    for j in range(1, length + surplus):
        h = model.step(torch.stack([tokens[-1] for image in beams for _, tokens in image]), j - 1)
        drawn, log_probs = model.propose(h, j, num_fans)
        index = []
        for b, image in enumerate(beams):
            candidates = [
                (image[r][0][-1] + log_probs[b * num_beams + r, f].item(), r, f) for r in rows for f in range(num_fans)
            ]
            best = sorted(candidates, key=lambda c: -c[0])[:num_beams]
            index += [b * num_beams + r for _, r, _ in best]
            if j < length:
                beams[b] = [
                    (image[r][0] + [score], image[r][1] + [drawn[b * num_beams + r, f]]) for score, r, f in best
                ]
            else:
                beams[b] = [image[r] for _, r, _ in best]
        model.reorder(torch.tensor(index))
    return beams


@pytest.mark.parametrize("surplus", [False, True])
@pytest.mark.parametrize(("num_beams", "num_fans"), [(1, 1), (1, 4), (3, 1), (2, 3), (4, 5)])
def test_beams_equal_those_of_plain_lists(num_beams, num_fans, surplus):
    images, length = 3, 5
    sizes = {"num_beams": num_beams, "num_fans": num_fans, "surplus": surplus}
    model, plain = (Echo(images * num_beams, images=images, seed=num_fans) for _ in range(2))
    beams = beam_search(model.h, model.step, model.propose, model.reorder, length, **sizes)
    assert beams.tokens.shape == (images, num_beams, length, 2) and beams.scores.shape == (images, num_beams, length)
    for b, image in enumerate(listed_beams(plain, images, length, num_beams, num_fans, surplus)):
        for r, (scores, tokens) in enumerate(image):
            torch.testing.assert_close(beams.tokens[b, r], torch.stack(tokens), rtol=0, atol=1e-6)
            torch.testing.assert_close(beams.scores[b, r], torch.tensor(scores), rtol=1e-6, atol=1e-5)
    assert [call[1:] for call in model.calls if call[0] != "reorder"] == [
        call[1:] for call in plain.calls if call[0] != "reorder"
    ]


class Enumerable:
    """A random joint distribution over `length` ids; a beam branches into all of them, so fans is their number."""

    def __init__(self, images, vocab, length, num_beams):
        logits = torch.randn(images, vocab**length, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        self.joint = logits.log_softmax(-1).unflatten(1, [vocab] * length)
        self.vocab, self.length, self.images = vocab, length, images
        self.image = torch.arange(images).repeat_interleave(num_beams)
        self.past = torch.zeros(images * num_beams, 0, dtype=torch.int64)

    def state(self):
        """log p(next | past) of every row (rows, V)."""
        given = torch.stack([self.joint[b, *past] for b, past in zip(self.image, self.past, strict=True)])
        totals = given.flatten(2).logsumexp(2) if given.ndim > 2 else given
        return totals.log_softmax(-1)

    def step(self, token, j):
        self.past = torch.cat([self.past, token[:, None]], dim=1)
        return self.state()

    def propose(self, h, j, fans):
        if j > 0:
            assert fans == self.vocab
            return torch.arange(self.vocab).expand(len(h), -1), h
        first = torch.arange(len(h)).remainder(len(h) // self.images)[:, None]  # beam i begins with id i
        alive = first < self.vocab
        log_probs = h.gather(1, first.clamp_max(self.vocab - 1)).masked_fill(~alive, -torch.inf)
        return first.clamp_max(self.vocab - 1), log_probs

    def reorder(self, index):
        self.past = self.past[index]


def test_as_many_beams_as_prefixes_find_the_most_probable_sequences_of_all():
    images, vocab, length = 2, 3, 3
    num_beams = vocab ** (length - 1)
    model = Enumerable(images, vocab, length, num_beams)
    beams = beam_search(
        model.state(), model.step, model.propose, model.reorder, length, num_beams=num_beams, num_fans=vocab
    )
    for b in range(images):
        ranked = sorted(product(range(vocab), repeat=length), key=lambda ids: -model.joint[b, *ids])
        assert beams.tokens[b].tolist() == [list(ids) for ids in ranked[:num_beams]]
        expected = torch.stack([model.joint[b, *ids] for ids in ranked[:num_beams]])
        torch.testing.assert_close(beams.scores[b, :, -1], expected)


def test_a_narrow_beam_never_beats_a_wide_one_here_and_scores_never_rise():
    best = []
    for num_beams in (3, 9):
        model = Enumerable(4, 3, 4, num_beams)
        beams = beam_search(model.state(), model.step, model.propose, model.reorder, 4, num_beams=num_beams, num_fans=3)
        assert (beams.scores.diff(dim=2) <= 0).all() and (beams.scores[:, :, -1].diff(dim=1) <= 0).all()
        best.append(beams.scores[:, 0, -1])
    assert (best[0] <= best[1]).all()


def test_the_first_of_equal_candidates_wins_and_a_lone_token_is_ranked():
    def propose(h, j, fans):
        tokens = torch.arange(len(h) * fans).reshape(len(h), fans) + 100 * j
        return tokens, torch.zeros(len(h), fans)

    sizes = {"num_beams": 2, "num_fans": 3}
    beams = beam_search(torch.zeros(2, 1), lambda token, j: torch.zeros(2, 1), propose, lambda index: None, 2, **sizes)
    assert beams.tokens.tolist() == [[[0, 100], [0, 101]]]
    lone = beam_search(
        torch.zeros(2, 1), None, lambda h, j, fans: (h.long(), torch.tensor([[-2.0], [-1]])), None, 1, **sizes
    )
    assert lone.scores[0, :, 0].tolist() == [-1, -2]


@pytest.mark.parametrize(
    ("beams", "fans", "named"), [(0, 2, "num_beams is 0"), (2, 0, "num_fans is 0"), (4, 1, "6 rows")]
)
def test_impossible_sizes_are_named(beams, fans, named):
    with pytest.raises(ValueError, match=named):
        beam_search(torch.zeros(6, 1), None, None, None, 2, num_beams=beams, num_fans=fans)


def test_nothing_is_read_on_the_host():
    """Tensors of the meta device have no values: reading one fails, where on a GPU it would wait."""
    h = torch.zeros(4, 3, device="meta")
    beams = beam_search(
        h,
        lambda token, j: h,
        lambda h, j, fans: (torch.zeros(4, fans, 2, device="meta"), torch.zeros(4, fans, device="meta")),
        lambda index: None,
        3,
        num_beams=2,
        num_fans=5,
    )
    assert beams.tokens.shape == (2, 2, 3, 2)
    assert autoregress(h, lambda token, j: h, lambda h, j: h[:, :2], 3).shape == (4, 3, 2)
