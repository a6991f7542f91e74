"""The two ends of the line: uint8 images, and pixel tokens."""

import pytest
import torch

from layers.tokenizers.base import Tokenizer, Tokens, from_uint8, to_uint8
from layers.tokenizers.pixels import PixelTokenizer


def test_every_byte_survives_the_way_to_floats_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    floats = from_uint8(values)
    assert floats.dtype == torch.float32
    assert (floats[0], floats[-1]) == (-1, 1)
    assert torch.equal(to_uint8(floats), values)


def test_the_eight_bits_of_the_papers():
    """v = 127.5 (x + 1), clipped, rounded half to even."""
    values = torch.tensor([-1.02, -1, -0.0039, 0, 0.5, 1, 1.02])
    assert to_uint8(values).tolist() == [0, 0, 127, 128, 191, 255, 255]


def test_halves_round_to_even():
    halves = torch.arange(255) + 0.5
    images = halves / 127.5 - 1
    exact = (images + 1) / 2 * 255 == halves  # float32 can't express the others
    assert exact.sum() > 50 and exact[127]
    assert to_uint8(images[exact]).tolist() == [round(half) for half in halves[exact].tolist()]


@pytest.mark.parametrize(("value", "byte"), [(-1.5, 0), (1.5, 255), (float("inf"), 255), (-float("inf"), 0)])
def test_values_outside_are_clipped(value, byte):
    assert to_uint8(torch.tensor([value])).item() == byte


def test_nan_is_an_error_and_never_a_colour():
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([0.0, float("nan")]))


@pytest.mark.parametrize(("size", "patch", "channels"), [(8, 4, 3), (6, 2, 1), (5, 5, 3)])
def test_decode_inverts_the_encoding(size, patch, channels):
    tokenizer = PixelTokenizer(size, patch, channels=channels)
    images = torch.randint(0, 256, (2, channels, size, size), dtype=torch.uint8)
    tokens = tokenizer({"image": images})
    assert tokens.x.shape == (2, tokenizer.seq_len, tokenizer.token_dim) and tokens.logdet is None
    assert tokenizer.seq_len == (size // patch) ** 2 and tokenizer.grid == (size // patch,) * 2
    assert tokens.x.abs().max() <= 1
    assert torch.equal(to_uint8(tokenizer.decode(tokens.x)), images)


def test_token_is_the_patch_with_channels_fastest():
    images = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8)
    x = PixelTokenizer(4, 2)({"image": images}).x
    expected = images[0, :, 2:4, 0:2].permute(1, 2, 0).flatten()  # second row of tokens, first column
    torch.testing.assert_close(x[0, 2], expected / 127.5 - 1)


@pytest.mark.parametrize(("size", "patch"), [(10, 4), (4, 8), (0, 4), (8, 0), (-8, 4)])
def test_sizes_that_do_not_divide_are_an_error_naming_both(size, patch):
    with pytest.raises(ValueError, match=f"image_size {size} .* patch_size {patch}"):
        PixelTokenizer(size, patch)


@pytest.mark.parametrize(("height", "width"), [(8, 16), (16, 8), (8, 8)])
def test_images_of_another_size_are_an_error_naming_both(height, width):
    with pytest.raises(ValueError, match=f"images are {height}x{width}, the tokenizer expects 16"):
        PixelTokenizer(16, 4)({"image": torch.zeros(1, 3, height, width, dtype=torch.uint8)})


def test_init_args_rebuild_the_tokenizer():
    tokenizer = PixelTokenizer(12, 3, channels=1)
    again = PixelTokenizer(**tokenizer.init_args())
    names = ("image_size", "patch_size", "channels", "grid", "token_dim", "seq_len", "vocab_size", "frozen")
    assert [getattr(again, n) for n in names] == [getattr(tokenizer, n) for n in names]


class Doubling(Tokenizer):
    """Says which of its stages ran."""

    def encode_image(self, images):
        return images * 2

    def encode_raw(self, raw, generator=None):
        return Tokens(raw + 1)


def test_cached_rows_skip_the_costly_stage():
    one = torch.ones(1)
    assert Doubling()({"image": one}).x.item() == 3
    assert Doubling()({"raw": one, "image": one}).x.item() == 2
