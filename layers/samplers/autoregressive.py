"""One token after another: ancestral sampling and beam search, as functions of callables.

The caller owns network, caches and noise; here is only the order of calls. Sources: GIVT (Tschannen et al. 2023,
official `decode.py`); the loops serve any causal model. Unusual: beams branch by drawing, not by enumeration, because
continuous tokens have no finite list. A state is what the network made of the sequence so far, rows (B', E); tokens are
continuous (B', D) or ids (B',). Out: tokens (B', L, ...).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Step = Callable[[Tensor, int], Tensor]  # (token at position j, j) -> the state before position j + 1
Draw = Callable[[Tensor, int], Tensor]  # (state before position j, j) -> token at position j
# (state (B nb, E), j, draws F) -> tokens (B nb, F, ...) and their log-probabilities (B nb, F)
Propose = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
Reorder = Callable[[Tensor], None]  # index (B nb,): row r of every cache becomes what row index[r] was


def autoregress(h: Tensor, step: Step, draw: Draw, length: int) -> Tensor:
    """`length` tokens (B, L, ...) from the state h before position 0.

    `draw` is called for each position and `step` between two draws, so L - 1 times: the official loop runs the network
    once more and throws the result away. With guidance the state holds both branches and `draw` returns one token for
    the two; known tokens are put in by a `draw` that returns them.
    """
    tokens = [draw(h, 0)]
    for j in range(1, length):
        h = step(tokens[-1], j - 1)
        tokens.append(draw(h, j))
    return torch.stack(tokens, dim=1)


class Beams(NamedTuple):
    """Beams of each image, best first (`surplus`: in the official order)."""

    tokens: Tensor  # (B, nb, L, ...)
    scores: Tensor  # (B, nb, L): log-probability of the first 1, 2, ... L tokens


def beam_search(
    h: Tensor,
    step: Step,
    propose: Propose,
    reorder: Reorder,
    length: int,
    *,
    num_beams: int,
    num_fans: int,
    surplus: bool = False,
) -> Beams:
    """Keep the `num_beams` most probable sequences, each of which branches into `num_fans` draws at every position.

    h (B nb, E): the state before position 0 in every beam, those of an image side by side. The first token is one draw
    per beam. `surplus` reproduces the official code, which ranks the finished beams once more by a token of which
    nothing is kept: `step` is then called with j = L - 1, `propose` with j = L. Raises ValueError for less than one
    beam or fan.
    """
    _check_beams(len(h), num_beams, num_fans)
    drawn, log_probs = propose(h, 0, 1)
    beams = Beams(drawn.unflatten(0, (-1, num_beams)), log_probs.unflatten(0, (-1, num_beams)))
    for j in range(1, length):
        h = step(beams.tokens[:, :, -1].flatten(0, 1), j - 1)
        parents, beams = _branch(beams, *propose(h, j, num_fans))
        if j + 1 < length + surplus:  # otherwise nobody reads the caches again
            reorder(_rows(parents))
    if not surplus:
        return _pick(beams, _best(beams.scores[:, :, -1], num_beams))  # a lone first token was never ranked
    h = step(beams.tokens[:, :, -1].flatten(0, 1), length - 1)
    parents, _ = _branch(beams, *propose(h, length, num_fans))
    return _pick(beams, parents)


def _check_beams(rows: int, num_beams: int, num_fans: int) -> None:
    for name, value in (("num_beams", num_beams), ("num_fans", num_fans)):
        if value < 1:
            raise ValueError(f"{name} is {value}: beam search needs at least 1")
    if rows % num_beams:
        raise ValueError(f"the state has {rows} rows, which {num_beams} beams do not divide: repeat each image's row")


def _branch(beams: Beams, drawn: Tensor, log_probs: Tensor) -> tuple[Tensor, Beams]:
    """The best of all beams' draws (B nb, F, ...): which beam each comes from (B, nb), and the beams with them."""
    num_beams, num_fans = beams.scores.shape[1], log_probs.shape[1]
    scores = (beams.scores[:, :, -1:] + log_probs.unflatten(0, (-1, num_beams))).flatten(1)  # (B, nb F)
    drawn = drawn.unflatten(0, (-1, num_beams)).flatten(1, 2)  # (B, nb F, ...)
    chosen = _best(scores, num_beams)
    new, parents = _pick(Beams(drawn, scores), chosen), chosen // num_fans
    old = _pick(beams, parents)
    tokens = torch.cat([old.tokens, new.tokens[:, :, None]], dim=2)
    return parents, Beams(tokens, torch.cat([old.scores, new.scores[:, :, None]], dim=2))


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices (B, count) of the highest scores (B, N), best first, of equal ones the first; top-k leaves ties open."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count]


def _pick(beams: Beams, index: Tensor) -> Beams:
    """Entries `index` (B, n) of each image."""
    images = torch.arange(len(index), device=index.device)[:, None]
    return Beams(beams.tokens[images, index], beams.scores[images, index])


def _rows(parents: Tensor) -> Tensor:
    """Beams within an image (B, nb) -> rows of the flattened batch (B nb,)."""
    images = torch.arange(len(parents), device=parents.device)[:, None]
    return (parents + images * parents.shape[1]).flatten()
