"""Places, positions and masks of texts and images in either order, against plain loops."""

import pytest
import torch

from layers.text_image import Inputs, attention_mask, input_order, output_places, right_aligned

T, N = 3, 4
FIRST = torch.tensor([True, False, True])
VALID = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()


@pytest.mark.parametrize("tables", [1, 16])
@pytest.mark.parametrize(("text_len", "image_len"), [(T, N), (1, 5), (0, N), (T, 0)])
def test_order_and_the_places_that_predict(tables, text_len, image_len):
    """Each token is predicted from the place before it; ids before the first table's copy."""
    pieces = ["BOS", "BOI", *[f"t{i}" for _ in range(tables) for i in range(text_len)]]
    pieces += [f"i{k}" for k in range(image_len)]
    text, image = pieces[2 : 2 + tables * text_len], pieces[2 + tables * text_len :]
    order = input_order(FIRST, text_len=tables * text_len, image_len=image_len)
    lengths = {"text_len": text_len, "text_tables": tables, "image_len": image_len}
    image_places, text_places = output_places(FIRST, **lengths)
    for b, first in enumerate(FIRST.tolist()):
        expected = ["BOS", *text, "BOI", *image] if first else ["BOI", *image, "BOS", *text]
        assert [pieces[i] for i in order[b]] == expected
        assert [expected[i + 1] for i in image_places[b]] == image
        assert [expected[i + 1] for i in text_places[b]] == text[:text_len]
        starts = {"BOI": image_places[b], "BOS": text_places[b]}
        assert all(expected[places[0]] == name for name, places in starts.items() if len(places))


@pytest.mark.parametrize("prefix", [None, torch.tensor([2, 5, 0])])
def test_mask_is_the_loop_over_queries_and_keys(prefix):
    mask = attention_mask(VALID, prefix)
    for b in range(len(VALID)):
        for query in range(VALID.shape[1]):
            for key in range(VALID.shape[1]):
                inside = prefix is not None and key < prefix[b]
                assert mask[b, query, key] == (VALID[b, key] and (key <= query or inside))


def test_positions_count_valid_tokens_and_the_mask_is_spared_where_it_says_nothing():
    x = torch.randn(3, 6, 2)
    for b, positions in enumerate(Inputs(x, VALID, None).positions()):
        assert positions.tolist() == [sum(VALID[b, : i + 1].tolist()) - 1 for i in range(6)]
    plain = Inputs(x, None, None)
    assert plain.positions().tolist() == [[0, 1, 2, 3, 4, 5]] and plain.mask() is None
    everywhere, prefix = torch.ones_like(VALID), torch.tensor([2, 0, 3])
    assert torch.equal(Inputs(x, everywhere, prefix).mask(), Inputs(x, None, prefix).mask())
    shorter = Inputs(x, VALID, prefix).without_last()
    assert torch.equal(shorter.x, x[:, :-1]) and torch.equal(shorter.valid, VALID[:, :-1])
    assert shorter.prefix is prefix


@pytest.mark.parametrize("prefix", [None, torch.tensor([2, 5, 0])])
def test_alignment_moves_valid_tokens_to_the_end_with_whom_they_see(prefix):
    x, mask = torch.randn(3, 6, 2), attention_mask(VALID, prefix)
    moved, valid, seen = right_aligned(x, VALID, mask)
    for b in range(3):
        there = VALID[b].nonzero()[:, 0]
        begin = 6 - len(there)
        assert valid[b].tolist() == [False] * begin + [True] * len(there)
        assert torch.equal(moved[b, begin:], x[b, there]) and not moved[b, :begin].any()
        assert torch.equal(seen[b, begin:, begin:], mask[b, there][:, there])
        assert not seen[b, :begin].any() and not seen[b, :, :begin].any()
