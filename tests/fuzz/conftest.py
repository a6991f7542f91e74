"""Settings of the fuzz tests. In the suite a few dozen examples per test, always the same ones; 10,000, other ones each
time, with `HYPOTHESIS_PROFILE=long make test ARGS=tests/fuzz`, about an hour of a core (FUZZ_CASES= for another number;
each reader has several tests)."""

import os
import resource

import pytest
from hypothesis import HealthCheck, settings

from tests.fuzz.guard import ADDRESS_SPACE, status

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "suite")
COMMON = {
    "database": None,
    "deadline": None,  # guard.py measures the processor's time: the machine may be busy
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
}
settings.register_profile("suite", max_examples=30, derandomize=True, **COMMON)
settings.register_profile("long", max_examples=int(os.environ.get("FUZZ_CASES", "10000")), print_blob=True, **COMMON)
settings.load_profile(PROFILE)


def pytest_collection_modifyitems(items):
    for item in items:
        if PROFILE == "long" and "tests/fuzz/" in item.path.as_posix():
            item.add_marker(pytest.mark.timeout(7200))


@pytest.fixture(autouse=True)
def _limited_address_space():
    """What asks for far more than a reader may have gets a MemoryError, and not the machine's memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + ADDRESS_SPACE, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
