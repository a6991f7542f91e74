"""Text encoders: the table that is trained along, and the frozen T5 behind a package that may be missing."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from layers.text.encoder import EncoderConfig, T5Encoder, TextTable, make_encoder


def test_features_of_the_table_are_of_word_and_place():
    encoder = make_encoder(EncoderConfig(dim=6), vocab_size=9, max_len=4)
    assert isinstance(encoder, TextTable) and encoder.dim == 6
    text = torch.tensor([[3, 3, 5]])
    found = encoder(text, torch.ones(1, 3, dtype=torch.bool))
    assert found.shape == (1, 3, 6) and not torch.equal(found[0, 0], found[0, 1])
    torch.testing.assert_close(found[0, 2], encoder.ids.weight[5] + encoder.places[2])


class FakeT5(nn.Module):
    """Features that say which ids and which mask came in."""

    config = SimpleNamespace(d_model=2)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    @classmethod
    def from_pretrained(cls, path):
        if path != "there":
            raise OSError(f"{path} is no folder")
        return cls()

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(last_hidden_state=torch.stack([input_ids, attention_mask], -1) * self.weight)


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(T5EncoderModel=FakeT5))


def test_t5_is_frozen_unregistered_and_sees_its_end_symbol(transformers):
    encoder = make_encoder(EncoderConfig("t5", 2, "there"), vocab_size=9, max_len=4)
    text, words = torch.tensor([[7, 8, 1, 0]]), torch.tensor([[True, True, False, False]])
    found = encoder(text, words)
    assert found.dtype == torch.float32 and not found.requires_grad
    assert found[0].tolist() == [[7, 1], [8, 1], [1, 1], [0, 0]]
    assert not list(encoder.parameters()) and not encoder.state_dict()


def test_t5_that_is_not_there_or_of_another_width_is_named(transformers, monkeypatch):
    text = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"encoder\.path is 'elsewhere', where no T5 can be read"):
        T5Encoder("elsewhere", 2)(text, text > 0)
    with pytest.raises(ValueError, match=r"encoder\.dim is 3, but the T5 of 'there' has 2"):
        T5Encoder("there", 3)(text, text > 0)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="needs the package transformers"):
        T5Encoder("there", 2)(text, text > 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "clip"}, "encoder.kind is 'clip': use table or t5"),
        ({"dim": 0}, "encoder.dim is 0"),
        ({"path": "there"}, "table has none"),
        ({"kind": "t5"}, "t5 needs a path"),
    ],
)
def test_settings_that_cannot_work_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**arguments)
