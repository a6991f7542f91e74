"""Checks of configurations."""

from types import SimpleNamespace

import pytest

from layers.checks import check_positive


def test_positive_numbers_and_nothing_pass():
    check_positive("net", SimpleNamespace(width=1, scale=0.1, depth=None), "width", "scale", "depth")


@pytest.mark.parametrize("value", [0, -1, -0.5, float("nan")])
def test_others_are_named(value):
    with pytest.raises(ValueError, match=f"net.width is {value}: it must be positive"):
        check_positive("net", SimpleNamespace(width=value), "width")
