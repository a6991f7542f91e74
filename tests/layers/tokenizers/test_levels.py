"""Grey levels as ids: the digits come back bit by bit, means are rounded to the nearest level, errors."""

import pytest
import torch

from datamodules.digits import load_digits_uint8
from layers.tokenizers.base import to_uint8
from layers.tokenizers.levels import LevelsTokenizer
from lightning_modules.config import as_tokenizer, tokenizer_config


@pytest.mark.parametrize("image_size", [8, 16, 32])
def test_digits_lose_nothing(image_size):
    images, _ = load_digits_uint8(image_size)
    tokenizer = LevelsTokenizer(image_size, image_size // 8, levels=17)
    tokens = tokenizer({"image": images})
    assert tokens.x.shape == (len(images), 64) == (len(images), tokenizer.seq_len) and tokens.logdet is None
    assert tokens.x.dtype == torch.int64 and tokens.x.unique().tolist() == list(range(17))
    assert torch.equal(to_uint8(tokenizer.decode(tokens.x)), images)


def test_a_patch_becomes_its_mean_level():
    image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    image[:, :, :2, 2:] = 255
    image[:, :, 2:, :2] = torch.tensor([[0, 255], [255, 255]])
    image[:, 0, 2:, 2:] = 255  # red: a third
    tokenizer = LevelsTokenizer(4, 2, levels=5)
    raw = tokenizer.encode_image(image)
    assert raw.tolist() == [[0, 4, 3, 1]] and raw.dtype == torch.uint8
    assert torch.equal(tokenizer({"raw": raw}).x, raw.long())
    assert tokenizer.decode(raw.long())[0, 1].tolist() == [[-1, -1, 1, 1]] * 2 + [[0.5, 0.5, -0.5, -0.5]] * 2


def test_sizes_and_arguments():
    tokenizer = LevelsTokenizer(16, 4, levels=9)
    assert (tokenizer.grid, tokenizer.token_dim, tokenizer.vocab_size) == ((4, 4), 1, 9)
    again = as_tokenizer(tokenizer_config(tokenizer))
    assert again.init_args() == tokenizer.init_args() == {"image_size": 16, "patch_size": 4, "levels": 9}


@pytest.mark.parametrize("levels", [1, 257])
def test_other_numbers_of_levels_are_refused(levels):
    with pytest.raises(ValueError, match=f"levels is {levels}: an image has 2 to 256"):
        LevelsTokenizer(8, 1, levels=levels)


@pytest.mark.parametrize("bad", [-1, 17])
def test_ids_that_are_no_level_are_refused(bad):
    with pytest.raises(ValueError, match=r"the levels are 0\.\.16"):
        LevelsTokenizer(8, 4, levels=17).decode(torch.tensor([[0, 1, bad, 3]]))


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="images are 8x8, the tokenizer expects 16"):
        LevelsTokenizer(16, 2, levels=17)({"image": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)})
