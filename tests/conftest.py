"""Shared by all tests: one thread, a fixed seed, and the golden cases."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture(autouse=True)
def _deterministic():
    import torch  # here, because the process that only hands tests to others needs none

    torch.set_num_threads(1)
    # without a GPU torch.manual_seed keeps a stack trace for it, each time: a fiftieth of the suite's time
    seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
    seed(0)


# files of long tests, begun first, so that neither of two processes is left alone with them at the end
LONG = ("test_experiments", "test_errors", "test_ddp", "test_plan", "test_resume", "test_evaluate", "test_contract")
LONG += ("test_survival", "test_jit_facts", "test_claims")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
