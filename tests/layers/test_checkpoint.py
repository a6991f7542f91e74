"""Names and layouts of official checkpoints."""

import pytest
import torch

from layers.checkpoint import Rule, check_fit, to_official, to_ours

RULES = [
    Rule("net.blocks.*.ff.*.kernel", "blocks.*.mlp.*.weight", lambda w: w.T, lambda w: w.T),
    Rule("net.scale", "gain", lambda w: w * 2, lambda w: w / 2),
    Rule("net.*", "*"),
]
OFFICIAL = {
    "net.blocks.3.ff.up.kernel": torch.arange(6.0).view(2, 3),
    "net.scale": torch.ones(2),
    "net.head.weight": torch.zeros(4),
}
OURS = {
    "blocks.3.mlp.up.weight": torch.arange(6.0).view(2, 3).T,
    "gain": torch.full((2,), 2.0),
    "head.weight": torch.zeros(4),
}


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_first_matching_rule_renames_and_transforms_both_ways():
    assert_same(to_ours(OFFICIAL, RULES), OURS)
    assert_same(to_official(OURS, RULES), OFFICIAL)


def test_dots_of_a_rule_are_literal():
    with pytest.raises(ValueError, match="netXscale"):
        to_ours({"netXscale": torch.ones(1)}, [Rule("net.scale", "gain")])


FUSED = [
    Rule(("*/q", "*/k"), "*.qk", lambda q, k: torch.cat([q, 2 * k]), lambda w: (w[:2], w[2:] / 2)),
    Rule("*", "*"),
]


def test_several_official_tensors_are_one_of_ours_in_the_order_of_the_rule():
    official = {
        "a/k": torch.ones(3),
        "b/q": torch.zeros(2),
        "a/q": torch.arange(2.0),
        "b/k": torch.ones(1),
        "x": torch.ones(1),
    }
    ours = to_ours(official, FUSED)
    assert set(ours) == {"a.qk", "b.qk", "x"}
    assert ours["a.qk"].tolist() == [0, 1, 2, 2, 2] and ours["b.qk"].tolist() == [0, 0, 2]
    back = to_official(ours, FUSED)
    assert set(back) == set(official) and all(torch.equal(back[name], official[name]) for name in official)


def test_a_part_of_several_that_is_missing_is_named():
    with pytest.raises(ValueError, match=r"another model: 1 missing \(a/k\)"):
        to_ours({"a/q": torch.ones(2)}, FUSED)


@pytest.mark.parametrize("direction", [to_ours, to_official])
def test_a_name_without_a_rule_is_an_error_that_names_it(direction):
    with pytest.raises(ValueError, match=r"another model: 1 unknown \(other\.weight\)"):
        direction({"other.weight": torch.ones(1)}, [Rule("net.*", "our.*")])


def test_state_that_fits_passes():
    check_fit(OURS, {name: torch.empty_like(tensor) for name, tensor in OURS.items()}, origin="file")


def test_misfit_names_origin_and_every_kind_at_once():
    state = {"a": torch.ones(2, 3), "extra": torch.ones(1)}
    expected = {"a": torch.ones(3, 2), "lost": torch.ones(1)}
    with pytest.raises(ValueError) as error:
        check_fit(state, expected, origin="some.pth")
    assert str(error.value) == (
        "some.pth does not fit this model: 1 missing (lost); 1 unknown (extra); "
        "1 of another shape (a (2, 3) instead of (3, 2))"
    )


@pytest.mark.parametrize(
    ("count", "shown"), [(3, r"3 missing \(n0, n1, n2\)"), (5, r"5 missing \(n0, n1, n2 \.\.\.\)")]
)
def test_long_lists_are_cut_after_three(count, shown):
    with pytest.raises(ValueError, match=shown):
        check_fit({}, {f"n{i}": torch.ones(1) for i in range(count)}, origin="file")
