"""The README's first command, whole: its samples are digits, and not copies of one."""

from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.judge_digits import judge
from experiments import sample
from experiments.main import cli
from tests.smoke import call


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_samples_of_jit_digits_are_digits(tmp_path):
    torch.set_num_threads(2)
    with chdir(tmp_path):
        cli(["fit", "--exp", "jit_digits"])
        call(sample.main, "--exp", "jit_digits", "--ckpt", "last", "--num", "200", "--out", "out")
        arrays = np.load(Path("out/samples.npz"))
    verdict = judge(torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2), arrays["labels"])
    assert verdict["accuracy"] >= 0.97
    assert verdict["variance_ratio"] >= 0.70


def test_judge_tells_real_digits_from_noise_and_copies():
    from datamodules.digits import DigitsData

    data = DigitsData(image_size=16, batch_size=1)
    data.setup()
    images, labels = data.val_set.images, data.val_set.labels.numpy()
    real = judge(images, labels)
    assert real["accuracy"] > 0.95 and 0.8 < real["variance_ratio"] < 1.2
    assert judge(torch.randint_like(images, 0, 256), labels)["accuracy"] < 0.3
    first = np.array([np.flatnonzero(labels == label)[0] for label in labels])
    assert judge(images[first], labels)["variance_ratio"] < 0.01
