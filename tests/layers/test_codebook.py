"""The codebook: the nearest code, distances with gradients, the entropy that keeps codes alive, counts of their use."""

import math

import pytest
import torch

from layers import codebook
from layers.codebook import Codebook, code_usage, entropy_loss


def normal(num_codes: int, channels: int) -> Codebook:
    book = Codebook(num_codes, channels)
    torch.nn.init.normal_(book.embedding.weight)
    return book


def test_ids_are_the_nearest_codes_in_raster_order(monkeypatch):
    book, latents = normal(50, 4), torch.randn(3, 4, 5, 6)
    distances = torch.cdist(latents.flatten(2).mT.double(), book.embedding.weight.double())
    ids = book.nearest(latents)
    assert ids.shape == (3, 30) and torch.equal(ids, distances.argmin(-1))
    monkeypatch.setattr(codebook, "CHUNK", 7 * 50 * 4)  # 90 rows, seven at a time
    assert torch.equal(book.nearest(latents), ids)


def test_lowest_of_equally_near_codes():
    book = Codebook(64, 8)
    code = torch.randn(8)
    with torch.no_grad():
        book.embedding.weight[:] = 100
        book.embedding.weight[[13, 37, 63]] = code
    latents = (code + 0.1 * torch.randn(1000, 8)).T.view(1, 8, 10, 100)
    assert (book.nearest(latents) == 13).all()


def test_codes_lie_where_their_ids_do():
    book, ids = normal(50, 4), torch.randint(0, 50, (2, 9))
    latents = book.latents(ids, 3)
    assert latents.shape == (2, 4, 3, 3)
    assert torch.equal(latents[1, :, 2, 1], book.embedding.weight[ids[1, 7]])
    assert torch.equal(book.nearest(latents), ids)


@pytest.mark.parametrize("autocast", [False, True])
def test_distances_are_squared_float32_and_have_gradients(autocast):
    book, latents = normal(20, 4), torch.randn(2, 4, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = book.distances(latents)
    expected = torch.cdist(latents.flatten(2).mT.flatten(0, 1).double(), book.embedding.weight.double()).square()
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)
    found.sum().backward()
    assert latents.grad.any() and book.embedding.weight.grad.any()


def test_entropy_is_that_of_each_choice_less_that_of_all():
    distances = torch.rand(30, 7) * 3
    probs = (-distances.double() / 0.5).softmax(-1)
    each = -(probs * probs.log()).sum(-1).mean()
    together = -(probs.mean(0) * (probs.mean(0) + 1e-5).log()).sum()
    torch.testing.assert_close(entropy_loss(distances, 0.5).double(), each - together, atol=1e-5, rtol=1e-5)


def test_entropy_is_lowest_where_all_choices_are_sure_and_no_two_alike():
    apart = 100 * (1 - torch.eye(8))
    assert entropy_loss(apart, 0.01).item() == pytest.approx(-math.log(8), abs=1e-3)
    assert entropy_loss(apart[:1].expand(8, -1), 0.01).item() == pytest.approx(0, abs=1e-3)
    far = (apart * 1e4).requires_grad_()  # choices so sure that all other probabilities are 0
    entropy_loss(far, 0.01).backward()
    assert far.grad.isfinite().all()


def test_use_of_codes_is_counted():
    found = code_usage(torch.tensor([[0, 0, 3], [3, 0, 3]]), 8)
    assert found["usage"].item() == 0.25 and found["perplexity"].item() == pytest.approx(2)
    found = code_usage(torch.arange(8).view(2, 4), 8)
    assert found["usage"].item() == 1 and found["perplexity"].item() == pytest.approx(8)


def test_a_codebook_without_codes_is_an_error():
    with pytest.raises(ValueError, match="num_codes is 0: use 1 or more"):
        Codebook(0, 4)
