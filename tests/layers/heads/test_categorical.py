"""Categorical head: cross-entropy, and sampling by inverting the distribution function."""

import pytest
import torch

from layers.heads.categorical import CategoricalHead
from layers.heads.mixtures import quantile

R, E, V = 5, 6, 7
NOTHING = torch.empty(0)


def head_of() -> CategoricalHead:
    head = CategoricalHead(V, E)
    torch.nn.init.normal_(head.linear.bias)
    return head


def by_normal(logits: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
    """The ids that a head draws by standard normal numbers."""
    return quantile(logits, torch.special.ndtr(normal.double()))


def test_loss_is_the_cross_entropy_of_each_row():
    head, ids, z = head_of(), torch.tensor([0, 6, 2, 2, 5]), torch.randn(R, E)
    loss = head.loss(ids, z, NOTHING, NOTHING)["loss"]
    expected = -head.linear(z).softmax(-1)[torch.arange(R), ids].log()
    torch.testing.assert_close(loss, expected[None])


def test_ids_have_their_probabilities():
    """Draws at the midpoints of N equal parts: each id's count is N p, up to one at either end."""
    n, logits = 10_000, torch.tensor([1.0, -2.0, 0.5, -9.0, 2.0])
    normal = torch.special.ndtri((torch.arange(n).double() + 0.5) / n).float()
    counts = by_normal(logits.expand(n, 5), normal).bincount(minlength=5)
    assert (counts - n * logits.softmax(0)).abs().max() <= 1.01


@pytest.mark.parametrize("normal", [-40.0, -5.0, 0.0, 5.0, 9.0, 40.0, float("inf"), -float("inf")])
def test_an_id_without_mass_is_never_taken(normal):
    never = -float("inf")
    logits = torch.tensor([[never, 0.0, never, 1.0, never], [never, never, never, 0.0, never]])
    first, second = by_normal(logits, torch.full((2,), normal)).tolist()
    assert first in (1, 3) and second == 3
    assert first == (1 if normal < -0.6 else 3)  # Phi(-0.6) = 0.274; id 1 has 0.269


def test_rare_ids_are_found_where_their_mass_lies():
    """Draws at the middle of every id's share, shares down to 1e-8: float32 sums would have lost the place."""
    size = 2000
    logits = 3 * torch.randn(size)
    mass = logits.double().softmax(0)
    middle = torch.special.ndtri(mass.cumsum(0) - mass / 2)
    assert mass.min() < 1e-7
    assert torch.equal(by_normal(logits.expand(size, size), middle), torch.arange(size))


def test_guidance_acts_on_logits_and_temperature_divides_them():
    head, z, uncond, noise = head_of(), torch.randn(R, E), torch.randn(R, E), torch.randn(1, R, 1)
    cond, other = head.linear(z), head.linear(uncond)
    ids = head.sample(z, noise, uncond=uncond, cfg_scale=3.0, temperature=0.7)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, by_normal((other + 3 * (cond - other)) / 0.7, noise[0, :, 0]))
    assert torch.equal(head.sample(z, noise, temperature=1e-6), cond.argmax(-1))


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=f"temperature is {temperature}"):
        head_of().sample(torch.randn(R, E), torch.randn(1, R, 1), temperature=temperature)
