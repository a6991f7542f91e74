"""Mistakes that a user can make in the README's workflows: each is one line with value and cure, exit code 2."""

import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from PIL import Image

from experiments import export, main, sample
from tests.smoke import call, shrunken

ROOT = Path(__file__).parents[1]
FIT = ["fit", "--exp", "jit_digits"]
FOLDER = [
    "--data=datamodules.images.ImageData",
    "--data.init_args={source: damaged, image_size: 16, batch_size: 2, num_workers: 1}",
    "--data.init_args.val_split=null",
]
TRAIN_MISTAKES = [
    (["fit", "--exp", "jit_digit"], ["unknown experiment 'jit_digit'", "did you mean jit_digits"]),
    ([*FIT, "--ckpt", "nowhere.ckpt"], ["no checkpoint at 'nowhere.ckpt'", "'last'"]),
    ([*FIT, "--ckpt", "last"], ["no checkpoint in 'runs/jit_digits'", "make train EXP=jit_digits"]),
    ([*FIT, "--official", "nowhere.pth"], ["no checkpoint at 'nowhere.pth'", "nothing was trained"]),
    ([*FIT, "--official", "other.pth"], ["other.pth", "does not fit", "of another shape", "init_classes"]),
    ([*FIT, "--official", "torn.pth"], ["torn.pth", "damaged"]),
    (
        [*FIT, "--model.init_args.net.dept=3"],
        ["'--model.init_args.net.dept'", "did you mean --model.init_args.net.depth"],
    ),
    ([*FIT, "--trainer.max_step=3"], ["'--trainer.max_step'", "--trainer.max_steps"]),
    ([*FIT, "--emma.decays=[0.9]"], ["--emma.decays"]),
    ([*FIT, "--model.init_args.net.depth=abc"], ["depth", "int", "abc"]),
    ([*FIT, "--model.init_args.net.num_heads=5"], ["96", "not divisible", "5"]),
    ([*FIT, "--model.init_args.objective.prediction=y"], ["prediction", "'x', 'eps', 'v'", "y"]),
    ([*FIT, "--model.init_args.optim.blr=1e-3"], ["exactly one of optim.lr (0.003)", "optim.blr (0.001)"]),
    ([*FIT, "--ema.decays=[2]"], ["EMA decay 2", "[0, 1)"]),
    ([*FIT, "--data.init_args.image_size=20"], ["image_size=20", "multiple of 8"]),
    ([*FIT, "--model.init_args.tokenizer.init_args.image_size=18"], ["18", "not divisible by patch_size 4"]),
    ([*FIT, "--data.init_args.image_size=32"], ["images are 32x32", "expects 16", "--data.init_args.image_size"]),
    ([*FIT, "--ckpt", "trained.ckpt"], ["trained.ckpt", "does not fit", "of another shape", "CKPT="]),
    ([*FIT, "--trainer.precision=bf16-true"], ["--trainer.precision=bf16-true", "bf16-mixed"]),
    ([*FIT, "--trainer.devices=0"], ["devices='0'"]),
    ([*FIT, "--model.init_args.sampling.num_steps=0"], ["num_steps is 0"]),
    (["fit", "--exp", "mar_digits", "--model.init_args.sampling.num_iter=64"], ["num_iter is 64", "16 tokens"]),
    (["fit", "--exp", "mar_digits", "--model.init_args.sampling.solver=euler"], ["solver is 'euler'", "ddpm"]),
    (["fit", "--exp", "mar_digits", "--model.init_args.head.width=0"], ["head.width is 0", "positive"]),
    ([*FIT, "--model.init_args.objective.t_eps=0"], ["t_eps is 0"]),
    (["test", "--exp", "jit_digits"], ["test", "fit", "validate"]),
    ([*FIT, *FOLDER], ["damaged/bad.png", "no readable image"]),
    ([*FIT, "--model.init_args.num_classes=5"], ["out of range", "0..4", "num_classes"]),
    ([*FIT, "--model.init_args.optim.lr=1e30"], ["not finite", "step", "--model.init_args.optim.lr"]),
    ([*FIT, "--data=datamodules.images.ImageData", "--data.init_args.source=/no/folder"], ["/no/folder"]),
    ([*FIT, "--data=datamodules.images.ImageData", "--data.init_args.source=nobody/nothing"], ["nobody/nothing"]),
    ([*FIT, "--data.init_args.batch_size=9999"], ["batch_size=9999", "1438"]),
    (
        [*FIT, "--model.init_args.net.in_context_len=2", "--model.init_args.net.in_context_start=9"],
        ["in_context_start is 9"],
    ),
]
EDIT = ["--image", "image.png", "--mask", "mask.png"]
SAMPLE_MISTAKES = [
    (["--exp", "jit_digits"], ["CKPT=last", "OFFICIAL=path"]),
    (["--exp", "jit_l61", "--ckpt", "last"], ["unknown experiment 'jit_l61'", "jit_l16"]),
    (["--exp", "jit_digits", "--ckpt", "last"], ["no checkpoint in 'runs/jit_digits'"]),
    (["--exp", "jit_digits", "--ckpt", "trained.ckpt", "--labels", "3,11"], ["label 11", "0..9", "LABELS="]),
    (["--exp", "jit_digits", "--ckpt", "trained.ckpt", "--labels", "three"], ["LABELS is 'three'", "0,1,2"]),
    (["--exp", "jit_digits", "--ckpt", "trained.ckpt", "--num", "0"], ["NUM is 0"]),
    (["--exp", "mar_digits", "--ckpt", "last", "--mask", "mask.png"], ["--mask", "without --image", "IMAGE="]),
    (["--exp", "mar_digits", "--ckpt", "last", "--image", "image.png"], ["--image", "without --mask", "MASK="]),
    (["--exp", "jit_digits", "--ckpt", "trained.ckpt", *EDIT], ["JiTModule cannot edit", "MASK="]),
    (["--exp", "mar_digits", "--ckpt", "last", *EDIT, "--mask", "small.png"], ["differ in size", "16x16", "8x8"]),
    (["--exp", "mar_digits", "--ckpt", "last", *EDIT, "--mask", "black.png"], ["'black.png'", "nothing white"]),
    (["--exp", "mar_digits", "--ckpt", "last", *EDIT, "--mask", "clear.png"], ["'clear.png'", "transparency", "MASK="]),
    (["--exp", "vae_digits", "--ckpt", "last", *EDIT], ["vae_digits", "edits none"]),
    (["--exp", "mar_digits", "--ckpt", "last", *EDIT, "--image", "other.pth"], ["'other.pth'", "no readable image"]),
    (["--exp", "mar_digits", "--ckpt", "last", *EDIT, "--mask", "nowhere.png"], ["'nowhere.png'", "no readable image"]),
    (["--exp", "mar_digits", "--ckpt", "last", *EDIT], ["no checkpoint in 'runs/mar_digits'"]),
    (["--exp", "jit_digits", "--ckpt", "trained.ckpt", "--ema", "0.7"], ["no weights '0.7'", "raw", "0.9"]),
    (["--exp", "jit_digits", "--ckpt", "trained.ckpt", "--trainer.max_steps=3"], ["--trainer.max_steps=3", "--model"]),
    (["--exp", "jit_digits", "--ckpt", "trained.ckpt", "--model.init_args.samplin.x=3"], ["samplin", "sampling"]),
    (["--exp", "jit_digits", "--ckpt", "trained.ckpt", "--model.init_args.sampling.num_steps=0"], ["num_steps is 0"]),
    (["--exp", "jit_digits", "--ckpt", "other.pth"], ["other.pth", "not a checkpoint of ours", "OFFICIAL="]),
    (
        ["--exp", "jit_digits", "--official", "other.pth", "--ema", "0.7"],
        ["other.pth", "no weights '0.7'", "model_ema1"],
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with a checkpoint of ours, a wrong one and a torn one."""
    path = tmp_path_factory.mktemp("work")
    with chdir(path):
        from experiments.recipes import find_checkpoint

        main.cli([*FIT, *shrunken("jit_digits"), "--trainer.default_root_dir=elsewhere"])
        find_checkpoint("jit_digits", "last").rename("trained.ckpt")
        weights = {"net.pos_embed": torch.zeros(1, 4, 8)}
        torch.save({"model": weights, "model_ema1": weights}, "other.pth")
        Path("damaged").mkdir()
        Image.new("RGB", (20, 20)).save("damaged/good.png")
        Path("damaged/bad.png").write_bytes(b"no picture")
        for name, colour, side in (("image", 90, 16), ("mask", 255, 16), ("black", 0, 16), ("small", 255, 8)):
            Image.new("L", (side, side), colour).save(f"{name}.png")
        Image.new("LA", (16, 16), (255, 0)).save("clear.png")
        Path("torn.pth").write_bytes(Path("other.pth").read_bytes()[:300])
        for leftover in sorted(Path("runs").rglob("*"), reverse=True):
            leftover.rmdir() if leftover.is_dir() else leftover.unlink()
        Path("runs").rmdir()
    return path


def error_of(entry, line, capsys) -> str:
    """The one line that an entry point ends with."""
    with pytest.raises(SystemExit) as stopped:
        call(entry, *line)
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def assert_names(text: str, parts: list[str]) -> None:
    assert [part for part in parts if part not in text] == [], text
    assert len(text) < 500, text


@pytest.mark.parametrize(("line", "parts"), TRAIN_MISTAKES, ids=lambda value: " ".join(value)[:60])
def test_training_mistake(line, parts, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("other.pth", "torn.pth", "trained.ckpt", "damaged"):
        Path(name).symlink_to(folder / name)
    assert_names(error_of(main.main, line, capsys), parts)
    assert not list(tmp_path.glob("runs/**/*.ckpt")), "nothing may be trained after a mistake"


@pytest.mark.parametrize(("line", "parts"), SAMPLE_MISTAKES, ids=lambda value: " ".join(value)[:60])
def test_sampling_mistake(line, parts, folder, capsys):
    with chdir(folder):
        assert_names(error_of(sample.main, [*line, "--out", "made"], capsys), parts)
        assert not Path("made").exists()


def test_samples_are_not_drawn_for_an_output_that_is_a_file(folder, capsys):
    with chdir(folder):
        line = ["--exp", "jit_digits", "--ckpt", "trained.ckpt", "--out", "trained.ckpt"]
        assert_names(error_of(sample.main, line, capsys), ["trained.ckpt", "a file: give a folder"])


def test_export_to_an_unknown_kind_of_file(folder, capsys):
    with chdir(folder):
        line = ["--exp", "jit_digits", "--ckpt", "trained.ckpt", "--out", "weights.bin"]
        assert_names(error_of(export.main, line, capsys), ["weights.bin", ".pth or .safetensors"])


def make(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *words, f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True)


def test_make_without_experiment_says_so():
    done = make("train")
    assert done.returncode != 0 and "EXP is missing" in done.stderr


def test_make_passes_values_and_exit_codes_on():
    done = make("sample", "EXP=jit_digit", "CKPT=last")
    assert done.returncode != 0 and "did you mean jit_digits" in done.stderr


def test_make_help_explains_every_target():
    text = make("help").stdout
    targets = ["setup", "train", "sample", "export", "eval", "sweep", "stats", "plan", "claims", "smoke", "tensorboard"]
    for target in [*targets, "test", "test-slow", "test-gpu", "lint", "bench"]:
        assert f"make {target} " in text
