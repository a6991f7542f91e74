"""Embeddings of time, labels and places."""

import math

import pytest
import torch

from layers.embed import LabelEmbedder, TimestepEmbedder, sincos_2d, timestep_features


def test_time_features_are_cosines_then_sines_of_the_raw_time():
    t, dim = torch.tensor([0.0, 0.3, 1.0]), 8
    features = timestep_features(t, dim, max_period=100.0)
    for row, time in zip(features.tolist(), t.tolist(), strict=True):
        angles = [time * 100.0 ** (-k / 4) for k in range(4)]
        assert row == pytest.approx([*map(math.cos, angles), *map(math.sin, angles)], abs=1e-6)


def test_time_features_are_float32_whatever_the_autocast_or_dtype():
    assert timestep_features(torch.tensor([0.5], dtype=torch.bfloat16), 8).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        inside = timestep_features(torch.tensor([0.37]), 256)
    assert torch.equal(inside, timestep_features(torch.tensor([0.37]), 256))


def test_timestep_embedder_is_linear_silu_linear_of_256_features():
    embedder, t = TimestepEmbedder(6), torch.tensor([0.2, 0.9])
    hidden = timestep_features(t, 256) @ embedder.mlp[0].weight.T + embedder.mlp[0].bias
    expected = (hidden * hidden.sigmoid()) @ embedder.mlp[2].weight.T + embedder.mlp[2].bias
    torch.testing.assert_close(embedder(t), expected, atol=1e-6, rtol=1e-5)


def test_last_row_of_the_label_table_is_the_null_label():
    embedder = LabelEmbedder(4, 3)
    assert embedder.null_label == 4 and embedder.embedding_table.weight.shape == (5, 3)
    assert torch.equal(embedder(torch.tensor([4, 1])), embedder.embedding_table.weight[[4, 1]])


def test_special_rows_lie_between_the_classes_and_the_null_label():
    embedder = LabelEmbedder(4, 3, num_special=2)
    assert embedder.null_label == 6 and embedder.embedding_table.weight.shape == (7, 3)
    alone = LabelEmbedder(4, 3, null=False)
    assert alone.null_label is None and alone.embedding_table.weight.shape == (4, 3)


def test_positions_equal_their_formula_columns_in_the_first_half():
    width, grid = 8, (2, 3)
    table = sincos_2d(width, grid)
    for row in range(2):
        for col in range(3):
            angles = [[place * 10000.0 ** (-k / 2) for k in range(2)] for place in (col, row)]
            expected = [f(a) for axis in angles for f in (math.sin, math.cos) for a in axis]
            assert table[row * 3 + col].tolist() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("width", [6, 10, 13])
def test_width_of_positions_must_be_divisible_by_4(width):
    with pytest.raises(ValueError, match=f"divisible by 4, not {width}"):
        sincos_2d(width, (2, 2))
