"""What makes a figure incomparable with the paper's is said, and nothing else."""

from dataclasses import replace

import pytest

from lightning_modules.jit import JiTModule
from lightning_modules.protocol import Figure, differences

PAPER = Figure("fid", 50_000, 1000, 256, "jit_in256_stats.npz", "first", {})


def test_the_papers_own_protocol_differs_in_nothing():
    assert differences(PAPER, JiTModule.PROTOCOL) == []
    assert differences(replace(PAPER, image_size=512, statistics="jit_in512_stats.npz"), JiTModule.PROTOCOL) == []
    assert differences(replace(PAPER, weights="model_ema1"), JiTModule.PROTOCOL) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"key": "fd_randconv"}, "fd_randconv is no FID"),
        ({"num_images": 1000}, "1000 images where the paper drew 50000"),
        ({"num_classes": 10}, "figures are for ImageNet"),
        ({"image_size": 64}, "no statistics for 64 pixels"),
        ({"statistics": "adm.npz"}, "statistics adm.npz, the paper used jit_in256_stats.npz"),
        ({"weights": "raw"}, "weights raw, the paper's are the average 0.9999"),
        ({"changed": {"cfg_scale": 1.5}}, "sampling.cfg_scale is 1.5"),
    ],
)
def test_each_difference_is_named(change, text):
    (reason,) = differences(replace(PAPER, **change), JiTModule.PROTOCOL)
    assert text in reason


def test_a_method_without_protocol():
    assert differences(PAPER, None) == ["this method has no published protocol here"]
