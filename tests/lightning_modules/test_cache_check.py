"""Latents of another tokenizer never train a model; the digest of weights sees every change."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from layers.tokenizers.pixels import PixelTokenizer
from lightning_modules.cache_check import check_cache
from lightning_modules.config import tokenizer_config
from lightning_modules.weights import state_sha256


class Learned(PixelTokenizer):
    """Pixels, and some weights."""

    def __init__(self, image_size=8):
        super().__init__(image_size, 4)
        self.encoder = nn.Linear(3, 2)


def cached(tokenizer, **changed):
    facts = {
        "root": "latents",
        "image_size": tokenizer.image_size,
        "tokenizer_class": tokenizer_config(tokenizer)["class_path"],
        "tokenizer_arch": tokenizer_config(tokenizer)["init_args"].get("arch"),
        "tokenizer_checksum": state_sha256(tokenizer.state_dict()),
    }
    return SimpleNamespace(**facts | changed)


def test_the_same_tokenizer_passes_and_data_without_latents_is_not_asked():
    tokenizer = Learned()
    check_cache(SimpleNamespace(tokenizer=tokenizer), cached(tokenizer))
    check_cache(SimpleNamespace(tokenizer=tokenizer), SimpleNamespace(image_size=3))
    check_cache(SimpleNamespace(tokenizer=tokenizer), None)


def test_another_tokenizer_is_refused():
    tokenizer = Learned()
    data = cached(tokenizer)
    cure = r"set the tokenizer that made them, or write others with make cache EXP="
    with torch.no_grad():
        tokenizer.encoder.bias[0] += 1e-6
    with pytest.raises(ValueError, match=rf"'latents' .* sha256 of the weights [0-9a-f]{{64}}, .* {cure}"):
        check_cache(SimpleNamespace(tokenizer=tokenizer), data)
    with pytest.raises(ValueError, match=r"with class .*Learned, the model's has layers.tokenizers.pixels"):
        check_cache(SimpleNamespace(tokenizer=PixelTokenizer(8, 4)), data)
    with pytest.raises(ValueError, match=r"with arch \{'norm_groups': 4\}, the model's has None"):
        check_cache(SimpleNamespace(tokenizer=Learned()), cached(Learned(), tokenizer_arch={"norm_groups": 4}))
    with pytest.raises(ValueError, match=r"with image_size 8, the model's has 16"):
        check_cache(SimpleNamespace(tokenizer=Learned(16)), data)


def test_the_digest_sees_names_types_shapes_and_bytes_but_not_the_order():
    state = {"a": torch.arange(6.0), "b": torch.tensor(1.0), "c": torch.ones(2, dtype=torch.bfloat16)}
    digest = state_sha256(state)
    assert state_sha256(dict(reversed(state.items()))) == digest
    assert state_sha256(state | {"a": torch.arange(12.0)[::2] / 2}) == digest, "strides are no content"
    others = [
        {"d": state["a"], "b": state["b"], "c": state["c"]},
        state | {"a": state["a"].view(2, 3)},
        state | {"a": state["a"].view(torch.int32)},
        state | {"b": torch.tensor(1.0000001)},
        state | {"c": torch.ones(2)},
        {"a": state["a"], "b": state["b"]},
    ]
    assert len({digest, *map(state_sha256, others)}) == 7
