"""`make eval`, `make stats` and `make sweep` as a user runs them, on a tiny model; the published path as a check."""

import csv
import json
import os
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import evaluate, main, stats, sweep
from experiments.image_files import read_images
from lightning_modules.extractors import RandomConvolutions, make_extractor
from lightning_modules.reference import load_reference
from tests.smoke import call
from tests.test_errors import error_of

ROOT = Path(__file__).parents[1]
SMALL = [
    "--model.init_args.net={width: 32, depth: 2, num_heads: 2, bottleneck_dim: 16}",
    "--model.init_args.sampling={num_steps: 3, cfg_scale: 2.0}",
    "--trainer.max_steps=8",
    "--trainer.val_check_interval=8",
    "--samples.num_images=2",
    "--checkpoint.every_n_train_steps=8",
]
MODEL = ["--exp", "jit_digits", "--ckpt", "last"]
SCORED = [*MODEL, "--extractor", "randconv", "--stats", "real.npz", "--num", "256"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with a trained checkpoint and statistics of the real digits."""
    path = tmp_path_factory.mktemp("work")
    with chdir(path):
        main.cli(["fit", "--exp", "jit_digits", *SMALL])
        call(stats.main, "--exp", "jit_digits", "--extractor", "randconv", "--out", "real.npz")
    return path


def run(folder: Path, module: str, *line: str) -> None:
    """A command in processes of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *line]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())


def pixels(path: Path) -> np.ndarray:
    images, _ = read_images(path)
    return images.batch(torch.arange(len(images))).numpy().astype(int)


@pytest.fixture(scope="module")
def plain(folder):
    """The figures and the PNG files of one process."""
    with chdir(folder):
        call(evaluate.main, *SCORED, "--batch_size", "32", "--save", "png", "--out", "one")
    return rows(folder / "one")[0]


def test_a_row_says_all_that_it_takes_to_repeat_it(folder, plain):
    reference = load_reference(folder / "real.npz")
    assert plain["experiment"] == "jit_digits" and plain["weights"].endswith("step=0000008.ckpt")
    assert plain["statistics"] == "real.npz" and plain["statistics_sha256"] == reference.sha256
    assert plain["extractor"] == "randconv" and plain["extractor_sha256"] == make_extractor("randconv").sha256
    assert (plain["n"], plain["seed"], plain["ema"]) == (256, 0, "first")
    assert plain["sampling"]["num_steps"] == 3 and plain["sampling"]["cfg_scale"] == 2.0
    assert plain["code"] and plain["torch"] == torch.__version__
    assert plain["not_comparable"] == ["the paper's figures are for ImageNet"] and "paper_protocol" not in plain
    assert reference.about["n"] == 1438 and "DigitsData, split train" in reference.about["images"]
    with open(folder / "one" / "results.csv") as file:
        (line,) = csv.DictReader(file)
    assert float(line["fd_randconv"]) == plain["fd_randconv"]


def test_numpy_and_torch_fidelity_agree_on_the_png_files(folder, plain):
    """The same images, three ways: our metric in memory, torch-fidelity on PNG files, NumPy in float64."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    from benchmarks.eval_fid import fidelity

    class Ours(FeatureExtractorBase):
        def __init__(self) -> None:
            super().__init__("randconv", ["features"])
            self.net = RandomConvolutions()

        def forward(self, x):
            return (self.net(x)[0],)

        @staticmethod
        def get_provided_features_list():
            return ("features",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "features"

    theirs = fidelity(folder / "png", folder / "real.npz", Ours(), batch_size=50)["frechet_inception_distance"]
    assert plain["fd_randconv"] == pytest.approx(theirs, rel=1e-3)
    images = torch.from_numpy(pixels(folder / "png").astype(np.uint8))
    f = RandomConvolutions()(images)[0].numpy().astype(np.float64)
    real = np.load(folder / "real.npz")
    product = np.cov(f, rowvar=False) @ real["sigma"]
    root = np.sqrt(np.linalg.eigvals(product).astype(complex)).real.sum()
    distance = ((f.mean(0) - real["mu"]) ** 2).sum() + np.trace(np.cov(f, rowvar=False)) + np.trace(real["sigma"])
    assert plain["fd_randconv"] == pytest.approx(distance - 2 * root, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_draw_the_same_bytes_and_figures(folder, plain, processes, tmp_path):
    line = [*SCORED, "--batch_size", "32", "--devices", str(processes), "--save", str(tmp_path / "png")]
    run(folder, "experiments.evaluate", *line, "--out", str(tmp_path))
    assert np.array_equal(pixels(tmp_path / "png"), pixels(folder / "png"))
    (row,) = rows(tmp_path)
    figures = {name: value for name, value in plain.items() if isinstance(value, float)}
    assert len(figures) > 6 and {name: row[name] for name in figures} == pytest.approx(figures, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("size", [7, 100])
def test_batch_size_moves_no_pixel_by_more_than_one_level(folder, plain, size, tmp_path):
    with chdir(folder):
        line = ["--batch_size", str(size), "--save", str(tmp_path / "all.npz"), "--out", str(tmp_path)]
        call(evaluate.main, *SCORED, *line)
    assert np.abs(pixels(tmp_path / "all.npz") - pixels(folder / "png")).max() <= 1
    assert rows(tmp_path)[0]["fd_randconv"] == pytest.approx(plain["fd_randconv"], rel=1e-3)
    assert not (tmp_path / "all.parts").exists()


@pytest.mark.parametrize("images", ["png", "npz"])
def test_files_score_as_the_model_that_drew_them(folder, plain, images, tmp_path):
    with chdir(folder):
        source = "png"
        if images == "npz":
            source = str(tmp_path / "images.npz")
            np.savez(source, arr_0=pixels(Path("png")).astype(np.uint8).transpose(0, 2, 3, 1))
        line = ["--exp", "jit_digits", "--images", source, "--extractor", "randconv", "--stats", "real.npz"]
        call(evaluate.main, *line, "--out", str(tmp_path))
    assert rows(tmp_path)[0]["fd_randconv"] == pytest.approx(plain["fd_randconv"], rel=1e-6)


@pytest.mark.slow
def test_statistics_by_two_processes_are_those_of_one(folder, tmp_path):
    out = tmp_path / "two.npz"
    line = ["--exp", "jit_digits", "--extractor", "randconv", "--devices", "2", "--out", str(out)]
    run(folder, "experiments.stats", *line)
    one, two = load_reference(folder / "real.npz"), load_reference(out)
    assert torch.allclose(one.sigma, two.sigma, rtol=1e-9) and one.about["n"] == two.about["n"]
    assert torch.allclose(one.features, two.features, atol=1e-4), "features are in the order of the rows"


def test_the_overview_of_make_sample_is_no_image_of_the_set(folder, plain, tmp_path):
    for path in (folder / "png").iterdir():
        (tmp_path / path.name).symlink_to(path)
    Image.new("RGB", (60, 60)).save(tmp_path / "grid.png")
    images, labels = read_images(tmp_path)
    assert len(images) == 256 and labels.tolist() == sorted(labels.tolist())


def test_one_process_of_torchrun_is_part_of_its_world(monkeypatch):
    """Else each would be a world of its own, and both would write a row."""
    asked = {}

    class Fabric:
        def __init__(self, **options):
            asked.update(options)

        def launch(self):
            pass

    monkeypatch.setattr(evaluate.L, "Fabric", Fabric)
    options, _ = evaluate.parse([*SCORED, "--device", "cpu"])
    evaluate.launch(options)
    assert (asked["devices"], asked["num_nodes"], asked["strategy"]) == (1, 1, "auto")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    evaluate.launch(options)
    assert (asked["devices"], asked["num_nodes"], asked["strategy"]) == (2, 2, "ddp")


@pytest.mark.slow
def test_sweep_chooses_the_best_pair_and_plots(folder, tmp_path, capsys):
    line = [*SCORED[:-1], "30", "--cfg", "1:2:1", "--ema", "0.995,raw", "--final", "40", "--out", str(tmp_path)]
    with chdir(folder):
        call(sweep.main, *line)
    *search, final = rows(tmp_path)
    assert [(row["ema"], row["cfg_scale"]) for row in search] == [("0.995", 1), ("0.995", 2), ("raw", 1), ("raw", 2)]
    best = min(search, key=lambda row: row["fd_randconv"])
    assert (final["ema"], final["cfg_scale"], final["n"]) == (best["ema"], best["cfg_scale"], 40)
    assert Image.open(tmp_path / "sweep.png").width > 300
    assert "best by fd_randconv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "scales"), [("1:2:0.5", [1, 1.5, 2]), ("1,3", [1, 3]), ("2", [2]), ("1:1.3:0.1", [1, 1.1, 1.2, 1.3])]
)
def test_scales_of_a_sweep(text, scales):
    assert sweep.parse_scales(text) == scales


FILES = ["--exp", "jit_digits", *SCORED[4:8]]
MISTAKES = [
    (evaluate, [*MODEL, "--extractor", "randconv"], ["STATS=", "make stats EXP=jit_digits EXTRACTOR=randconv"]),
    (evaluate, [*MODEL, "--extractor", "randconv", "--stats", "no.npz"], ["no statistics at 'no.npz'", "make stats"]),
    (evaluate, [*MODEL, "--stats", "real.npz"], ["weights-inception-2015-12-05-6726825d.pth", "6726825d", "https://"]),
    (evaluate, [*MODEL, "--extractor", "effnet_lite0", "--stats", "real.npz"], ["256 features", "1280"]),
    (evaluate, [*MODEL, "--extractor", "none"], ["cannot judge", "EXTRACTOR= and STATS="]),
    (evaluate, [*MODEL, "--extractor", "dino", "--stats", "real.npz"], ["unknown extractor 'dino'"]),
    (evaluate, [*SCORED, "--images", "png"], ["IMAGES=", "CKPT=", "one of them"]),
    (evaluate, [*FILES, "--images", "nowhere"], ["nothing at 'nowhere'"]),
    (evaluate, [*SCORED, "--num", "0"], ["NUM is 0"]),
    (evaluate, [*SCORED, "--num", "1"], ["one image has no covariance"]),
    (evaluate, [*SCORED, "--devices", "-1"], ["DEVICES is -1"]),
    (evaluate, [*SCORED, "--save", "real.npz"], ["real.npz", "exists already"]),
    (evaluate, [*SCORED, "--out", "real.npz"], ["OUT is 'real.npz'", "a file"]),
    (evaluate, [*SCORED, "--out", "damaged"], ["damaged/results.json", "no JSON"]),
    (evaluate, [*MODEL, "--extractor", "none", "--stats", "real.npz"], ["STATS is 'real.npz'", "EXTRACTOR="]),
    (evaluate, [*SCORED, "--model.init_args.sampling.steps=3"], ["steps", "num_steps"]),
    (evaluate, [*FILES, "--images", "png", "--ema", "0.995"], ["EMA", "IMAGES="]),
    (evaluate, [*FILES, "--images", "png", "--num", "3"], ["NUM is 3", "IMAGES="]),
    (evaluate, [*FILES, "--images", "png", "--save", "x"], ["SAVE", "IMAGES="]),
    (evaluate, [*FILES, "--images", "png", "--model.init_args.x=1"], ["--model.init_args.x=1", "IMAGES="]),
    (evaluate, [*FILES, "--images", "large"], ["16x16", "32"]),
    (evaluate, [*FILES, "--images", "mixed"], ["mixed/b.png", "another size"]),
    (evaluate, [*FILES, "--images", "deep"], ["deep/a.png", "8 bits"]),
    (evaluate, [*FILES, "--images", "empty.npz"], ["empty.npz", "not a readable npz file"]),
    (evaluate, [*FILES, "--images", "none.npz"], ["none.npz", "no images"]),
    (evaluate, [*FILES, "--images", "labels.npz"], ["labels.npz", "expected integers"]),
    (sweep, [*SCORED, "--cfg", "1", "--batch_size", "0"], ["--batch_size is 0"]),
    (sweep, [*SCORED, "--cfg", "1:inf:1"], ["CFG is '1:inf:1'"]),
    (sweep, [*SCORED, "--cfg", "1", "--final", "-5"], ["FINAL is -5"]),
    (sweep, [*SCORED, "--num", "2", "--cfg", "1", "--metric", "fidd"], ["METRIC is 'fidd'", "fd_randconv"]),
    (stats, ["--exp", "jit_digits", "--extractor", "randconv", "--batch_size", "0"], ["--batch_size is 0"]),
    (stats, ["--exp", "jit_digits", "--extractor", "randconv", "--features", "-1"], ["-1", "0 keeps none"]),
    (evaluate, [*SCORED, "--ema", "0.5"], ["no weights '0.5'", "0.995"]),
    (sweep, [*SCORED, "--cfg", "4:1:1"], ["CFG is '4:1:1'", "first:last:step"]),
    (sweep, [*SCORED, "--cfg", "1", "--ema", "0.7"], ["no weights '0.7'"]),
    (stats, ["--exp", "jit_digits", "--out", "x.pt", "--extractor", "randconv"], ["x.pt", "npz"]),
    (stats, ["--exp", "jit_digits", "--extractor", "randconv", "--model.x=1"], ["--model.x=1", "--data"]),
]


@pytest.fixture(scope="module")
def wrong_files(folder):
    """Files that cannot be scored."""
    with chdir(folder):
        for name in ("png", "large", "mixed", "deep", "damaged"):
            Path(name).mkdir(exist_ok=True)
        for i in range(3):
            Image.new("RGB", (32, 32)).save(f"large/{i}.png")
        if not list(Path("png").iterdir()):
            Image.new("RGB", (16, 16)).save("png/000000_label1.png")
        Image.new("RGB", (16, 16)).save("mixed/a.png")
        Image.new("RGB", (16, 18)).save("mixed/b.png")
        Image.new("I;16", (16, 16)).save("deep/a.png")
        Path("damaged/results.json").write_text("{")
        Path("empty.npz").write_bytes(b"")
        np.savez("none.npz", arr_0=np.zeros((0, 16, 16, 3), np.uint8))
        np.savez("labels.npz", arr_0=np.zeros((3, 16, 16, 3), np.uint8), labels=np.zeros(2, np.int64))


@pytest.mark.parametrize(("entry", "line", "parts"), MISTAKES, ids=lambda value: str(value)[-60:])
def test_mistakes_are_one_line(entry, line, parts, folder, wrong_files, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with chdir(folder):
        text = error_of(entry.main, line, capsys)
        assert [part for part in parts if part not in text] == [], text
