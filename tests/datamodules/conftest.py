"""Notices of the data modules can be read with pytest's `caplog`."""

import logging

import pytest


@pytest.fixture(autouse=True)
def _notices(caplog):
    """Lightning's logger keeps its records from pytest's handler if it was imported before that was there."""
    logger = logging.getLogger("lightning.pytorch")
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
    logger.propagate = propagates
