"""Nats per token, bits per dimension, and what lies above the entropy."""

import math

import torch

from layers.tokenizers.base import Tokens
from lightning_modules.likelihood import likelihood_terms


def test_figures_of_a_known_density() -> None:
    x, nats = torch.zeros(2, 5, 4), torch.tensor([10.0, 30.0])
    plain = likelihood_terms(nats, Tokens(x), {})
    assert plain.keys() == {"nats_per_token"} and plain["nats_per_token"] == 4
    scaled = likelihood_terms(nats, Tokens(x, torch.tensor([-10.0, -10.0])), {})
    assert math.isclose(scaled["bpd"], 30 / (20 * math.log(2)), rel_tol=1e-6)


def test_gap_to_a_known_entropy() -> None:
    terms = likelihood_terms(
        torch.tensor([10.0, 30.0]),
        Tokens(torch.zeros(2, 5, 4), torch.zeros(2)),
        {"true_nats": torch.tensor([9.0, 28.0])},
    )
    assert math.isclose(terms["nats_above_entropy"], 0.3, rel_tol=1e-6) and "bpd" not in terms
