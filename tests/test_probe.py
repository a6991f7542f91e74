"""Linear probes: what they read, and that no label leaks into it."""

import numpy as np
import pytest
import torch

from experiments import probe
from layers.networks.givt import GIVTConfig
from layers.tokenizers.dequantised import DequantisedTokenizer
from lightning_modules.givt import GIVTModule, GIVTObjective, HeadConfig


def build(**objective):
    net = GIVTConfig(
        width=16, depth=2, num_heads=2, mlp_hidden=24, dropout=0.0, attention=objective.pop("attention", "causal")
    )
    tokenizer = DequantisedTokenizer(8, 2)
    return GIVTModule(tokenizer, 3, net, HeadConfig(2), objective=GIVTObjective(**objective)).eval()


def test_representations_do_not_see_the_labels():
    module, images = build(), torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    rows = [{"image": images, "label": torch.arange(6) % 3}, {"image": images, "label": torch.zeros(6).long()}]
    (first, labels), (second, _) = (probe.read(module, iter([row]), seed=0) for row in rows)
    assert first.keys() == {"block0_rep", "block1_rep", "pre_logits"} and labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert all(np.array_equal(first[name], second[name]) and first[name].shape == (6, 16) for name in first)


def test_no_more_rows_are_read_than_asked_for():
    class Data:
        def ordered_loader(self, split):
            return ({"image": torch.zeros(4, 3, 8, 8), "label": torch.arange(4)} for _ in range(3))

    found = [len(row["image"]) for row in probe.batches(Data(), "train", 6, "cpu")]
    assert found == [4, 2]


@pytest.mark.parametrize("settings", [{"attention": "bidirectional"}, {"label_drop_prob": 0.0}])
def test_models_without_such_representations_say_so(settings):
    batch = {"image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "label": torch.zeros(2).long()}
    with pytest.raises(ValueError, match="causal models that know 'no label'"):
        build(**settings).representations(batch)


def test_accuracy_is_that_of_a_linear_classifier():
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 4
    seen, noise = np.eye(4)[labels] + 0.1 * rng.normal(size=(200, 4)), rng.normal(size=(200, 4))
    split = slice(0, 120), slice(120, 200)
    for features, low, high in ((seen, 0.99, 1.0), (noise, 0.0, 0.5)):
        found = probe.accuracy(*(x for part in split for x in (features[part], labels[part])), l2=1.0)
        assert low <= found <= high
