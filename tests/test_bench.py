"""`make bench`: every kind of row of a shrunken recipe, what --only refuses, the meter of memory."""

import json
import sys

import pytest
import torch

from benchmarks import bench
from benchmarks.measure import peak_bytes
from benchmarks.parts import Part, time_parts
from benchmarks.references import gmm
from benchmarks.references.gmm import HeadSize
from tests.methods import test_jetformer as jetformer
from tests.methods.test_givt import TINY

QUICK = ["--batch", "2", "--sample_batch", "2", "--repeats", "1", "--sample_repeats", "1", "--warmup", "0"]


def run(monkeypatch, tmp_path, *arguments: str) -> dict:
    """The JSON of a run on the host with these arguments."""
    out = tmp_path / "bench.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--json", str(out), *QUICK, *arguments])
    bench.main()
    return json.loads(out.read_text())


@pytest.fixture
def small_heads(monkeypatch):
    monkeypatch.setitem(gmm.HEADS, "cpu", (HeadSize("small", 4, 8, 16, 600, (10,)),))


GIVT = TINY | {"model.init_args.tokenizer.init_args.image_size": 8}
JETFORMER = jetformer.TINY | jetformer.TINY_OF["jetformer_digits"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "settings", "parts"),
    [("givt_digits", GIVT, 4), ("givt_maskgit_digits", GIVT, 3), ("jetformer_digits", JETFORMER, 6)],
)
def test_rows_of_training_sampling_and_parts(experiment, settings, parts, monkeypatch, tmp_path, small_heads, capsys):
    overrides = [f"--{name}={value}" for name, value in settings.items() if not name.startswith("data.")]
    result = run(monkeypatch, tmp_path, "--exp", experiment, *overrides)
    names = [row["what"] for row in result["rows"]]
    assert names == ["train, plain", "train, ours", "sample, plain", "sample, ours"]
    assert all(row["ms"] > 0 and row["tflops"] > 0 for row in result["rows"])
    assert [row["ratio"] is None for row in result["rows"]] == [True, False, True, False]
    timed = [row for row in result["parts"] if row["plain_ms"] is not None]
    assert len(result["parts"]) == parts and len(timed) == parts - (experiment == "jetformer_digits")
    assert all(row["plain_ms"] > 0 and row["ours_ms"] > 0 for row in timed)
    assert all(row["plain_mb"] > 0 for row in result["parts"])
    printed = capsys.readouterr().out
    assert "guided draw" in printed and ("JetFormer-B" in printed) == (len(timed) < parts)


def test_a_method_without_parts_says_so(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "--exp", "jit_digits", "--only", "parts")
    assert "--only parts: nothing of that kind is compared here, use train or sample" in capsys.readouterr().err


def test_only_what_a_call_makes_counts_as_its_memory():
    given = torch.ones(1000)

    def twice() -> torch.Tensor:
        a = given * 2  # 4000 bytes
        b = a + 1  # with these, 8000
        del a
        return b.view(10, 100) + 1  # instead of the first ones

    assert peak_bytes(twice, "cpu") == 8000
    assert peak_bytes(lambda: given.view(10, 100), "cpu") == 0


def test_parts_of_shapes_are_not_timed():
    x = torch.empty(10, device="meta")
    part = Part("shapes", lambda: (x + 1, x + 2), lambda: x + 1, timed=False)
    (row,) = time_parts([part], device="cpu", repeats=3)
    assert row["plain_ms"] is row["ours_ms"] is row["time_ratio"] is None and row["memory_ratio"] == 2


def test_parts_compare_time_and_memory():
    a = torch.randn(300, 300)
    part = Part("squares", lambda: [a @ a for _ in range(20)], lambda: a @ a)
    (row,) = time_parts([part], device="cpu", repeats=3)
    assert row["part"] == "squares" and row["time_ratio"] > 1 and row["memory_ratio"] == 20
