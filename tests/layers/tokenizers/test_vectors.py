"""Vectors as tokens: passed through, drawn as dots, other shapes refused."""

import pytest
import torch

from layers.tokenizers.vectors import VectorTokenizer


@pytest.mark.parametrize("token_dim", [1, 2, 3, 5])
def test_vectors_are_the_tokens(token_dim: int) -> None:
    tokenizer, raw = VectorTokenizer(3, token_dim), torch.randn(2, 9, token_dim)
    tokens = tokenizer({"raw": raw})
    assert torch.equal(tokens.x, raw) and tokens.logdet.tolist() == [0, 0]
    images = tokenizer.decode(tokens.x)
    assert images.shape == (2, 3, 3, 3)
    assert torch.equal(images[:, 0].flatten(1), raw[..., 0] / 2)


def test_other_rows_are_errors() -> None:
    tokenizer = VectorTokenizer(3, 2)
    with pytest.raises(ValueError, match=r"rows are \(4, 2\)"):
        tokenizer({"raw": torch.randn(1, 4, 2)})
    with pytest.raises(ValueError, match="not images"):
        tokenizer({"image": torch.zeros(1, 3, 3, 3, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="token_dim is 0"):
        VectorTokenizer(3, 0)
