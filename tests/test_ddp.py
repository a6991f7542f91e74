"""Two gloo processes train as one with the same global batch, under DDP and under FSDP2: the same curves, the same
weights, one set of files."""

import pytest
import torch

from tests.processes import Run, steps, train
from tests.test_contract import FAMILIES

pytestmark = pytest.mark.timeout(900)  # seconds: processes that wait for each other do so for ever
FEW = ["jit"]  # all others in test_every_method_trains_as_one_for_fifty_steps
STEPS, LONG = 12, 50
STRATEGIES = ["ddp", "fsdp2"]
SPEEDS = {"images_per_s", "tflops"}
OF_A_BATCH = {"component_entropy", "min_scale", "usage", "perplexity"}  # no means over images: each process has its own


def assert_same_curves(actual: Run, expected: Run) -> None:
    """Losses of every step, all figures of it and of uneven validation rows, and which files there are."""
    assert actual.files == expected.files
    assert actual.curves.keys() == expected.curves.keys()
    for tag, values in expected.curves.items():
        name = tag.rpartition("/")[2]
        if name not in SPEEDS | OF_A_BATCH:
            close = 1e-5 if name == "loss" else 1e-3
            assert actual.curves[tag] == pytest.approx(values, rel=close, abs=close), tag


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return train(tmp_path_factory.mktemp("one"), "one", FEW, *steps(STEPS))


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(strategy, one, tmp_path):
    for actual, expected in zip(train(tmp_path, strategy, FEW, *steps(STEPS)), one, strict=True):
        assert len(actual.curves["train/loss"]) == STEPS
        assert_same_curves(actual, expected)
        for name, tensor in expected.tensors().items():
            torch.testing.assert_close(actual.tensors()[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    return train(tmp_path_factory.mktemp("every"), "one", FAMILIES, *steps(LONG))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_method_trains_as_one_for_fifty_steps(strategy, every, tmp_path):
    for actual, expected in zip(train(tmp_path, strategy, FAMILIES, *steps(LONG)), every, strict=True):
        assert len(actual.curves["train/loss"]) == LONG
        assert_same_curves(actual, expected)
        assert actual.tensors().keys() == expected.tensors().keys()
