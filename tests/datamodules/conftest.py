"""Notices of the data modules can be read with pytest's `caplog`."""

import logging

import pytest


@pytest.fixture(autouse=True)
def _notices(caplog):
    """Lightning's logger keeps its records from pytest's handler if it was imported before that was there.

    Tests that silence it do so for themselves only.
    """
    logger = logging.getLogger("lightning.pytorch")
    propagates, logger.propagate = logger.propagate, False
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)
    logger.propagate = propagates
