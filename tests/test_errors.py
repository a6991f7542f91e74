"""Every mistake that a user can make in the README's workflows, and the one line that it ends with, exit code 2.

Each row: the line that is typed (after `make`'s translation), and of the sentence the value that is wrong, the reason,
and the cure. What only a file's content can be wrong in, is in tests/fuzz and tests/test_safety.py.
"""

import shlex
import shutil
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import bench
from experiments import cache, caption, evaluate, export, main, measure_latents, plan, probe, recipes, sample, stats
from experiments import sweep as sweeping
from tests import smoke
from tests.documents import make
from tests.smoke import call, shrunken

DIGITS = "fit --exp jit_digits "


def images(options: str) -> str:
    """A line that trains on images of this folder, with other options of the data."""
    given = f"{{source: pets, image_size: 16, batch_size: 2, num_workers: 0, {options}}}"
    return f"{DIGITS}--data=datamodules.images.ImageData '--data.init_args={given}'"


TRAIN = [
    # which experiment, which checkpoint
    ("fit --exp jit_digit", "'jit_digit'", "unknown experiment", "did you mean jit_digits"),
    ("fit --exp", "--exp", "needs a value", "--exp"),
    ("test --exp jit_digits", "'test'", "invalid choice", "'fit', 'validate'"),
    (DIGITS + "--ckpt=", "--ckpt", "needs a value", "left out"),
    (DIGITS + "--ckpt nowhere.ckpt", "'nowhere.ckpt'", "no checkpoint", "'last'"),
    (DIGITS + "--ckpt last", "'runs/jit_digits'", "no checkpoint", "make train EXP=jit_digits"),
    (DIGITS + "--ckpt torn.ckpt", "torn.ckpt", "cut short", "give another, or 'last'"),
    (DIGITS + "--ckpt other.pth", "other.pth", "no run that could go on", "OFFICIAL="),
    (DIGITS + "--ckpt trained.ckpt", "trained.ckpt", "does not fit", "of another shape"),
    (DIGITS + "--official nowhere.pth", "'nowhere.pth'", "nothing was trained", "give a file that exists"),
    (DIGITS + "--official other.pth", "other.pth", "does not fit", "init_classes"),
    (DIGITS + "--official torn.pth", "torn.pth", "not a readable torch checkpoint", "cut short"),
    # keys and values
    (DIGITS + "--model.init_args.net.dept=3", "net.dept'", "unknown key", "did you mean --model.init_args.net.depth"),
    (DIGITS + "--trainer.max_step=3", "'--trainer.max_step'", "unknown key", "--trainer.max_steps"),
    (DIGITS + "--emma.decays=[0.9]", "--emma.decays", "unrecognized", "emma"),
    (DIGITS + "--trainer.max_steps=ten", "ten", "Expected a <class 'int'>", "trainer.max_steps"),
    (DIGITS + "--trainer.max_steps", "--trainer.max_steps", "expected one argument", "trainer.max_steps"),
    (DIGITS + "--model.init_args.net.depth=abc", "abc", "Expected a <class 'int'>", "net.depth"),
    (DIGITS + "--model.init_args.sampling.cfg_scale=abc", "abc", "Expected a <class 'float'>", "sampling.cfg_scale"),
    (DIGITS + "--model.init_args.objective.prediction=y", "y", "Expected a", "'x', 'eps', 'v'"),
    (DIGITS + "--model.init_args.init_classes=fresh", "fresh", "Expected a", "'keep', 'new'"),
    (DIGITS + "'--model.init_args.net={depth: ['", "{depth: [", "Unable to load config", 'key "net"'),
    (DIGITS + "--config=none.yaml", "none.yaml", "does not exist", "config"),
    (DIGITS + "--config=list.yaml", "'list.yaml'", "holds [1]", "model: and data:"),
    (DIGITS + "--config=broken.yaml", "'broken.yaml'", "no readable YAML", "line 2"),
    (DIGITS + "--config=strange.yaml", "'somebody.Data'", "neither this project's nor Lightning's", "--trust-config"),
    (DIGITS + "--data=os.system", "'os.system'", "neither this project's nor Lightning's", "remove it"),
    (DIGITS + "--data=datamodules.digits.Digits", "'datamodules.digits.Digits'", "does not exist", "data.class_path"),
    # models
    (DIGITS + "--model.init_args.net.num_heads=5", "96", "not divisible by", "num_heads 5"),
    (
        DIGITS + "--model.init_args.net.in_context_len=2 --model.init_args.net.in_context_start=9",
        "9",
        "0..2",
        "lower it",
    ),
    (DIGITS + "--model.init_args.objective.t_eps=0", "0.0", "division by zero", "must be positive"),
    (DIGITS + "--model.init_args.sampling.num_steps=0", "num_steps is 0", "sampling needs", "at least one step"),
    (DIGITS + "--model.init_args.tokenizer.init_args.image_size=18", "18", "not divisible by", "patch_size 4: set"),
    (DIGITS + "--model.init_args.num_classes=5", "label", "out of range", "0..4 (num_classes)"),
    ("fit --exp mar_digits --model.init_args.sampling.num_iter=64", "64", "16 tokens", "use 1..16"),
    ("fit --exp mar_digits --model.init_args.sampling.solver=euler", "'euler'", "DiffusionHead has", "ddpm, ddim"),
    ("fit --exp mar_digits --model.init_args.head.width=0", "0", "head.width", "must be positive"),
    (
        "fit --exp givt_digits --model.init_args.head.num_mixtures=0",
        "num_mixtures is 0",
        "a density has",
        "at least one",
    ),
    ("fit --exp givt_digits --model.init_args.objective.label_drop_prob=0", "cfg_scale is 1.4", "label", "to 1"),
    ("fit --exp givt_digits --model.init_args.sampling.temperature=-1", "sampling.temperature is -1", "", ""),
    ("fit --exp givt_digits --model.init_args.sampling.guidance=closedform", "closedform", "guidance", "'rejection'"),
    ("fit --exp givt_maskgit_digits --model.init_args.sampling.num_iter=65", "num_iter is 65", "", "1..64"),
    ("fit --exp jetformer_digits --model.init_args.factor.dim=0", "factor.dim is 0", "16 numbers", "use 1 to 16"),
    (
        "fit --exp vae_digits --model.init_args.objective.perceptual_weight=1",
        "vgg16-397923af.pth",
        "no file",
        "put it there",
    ),
    # optimisation, devices, callbacks
    (DIGITS + "--model.init_args.optim.blr=1e-3", "0.003", "exactly one of", "optim.blr (0.001)"),
    (DIGITS + "--model.init_args.optim.lr=-1", "optim.lr is -1", "negative", "it cannot be"),
    (DIGITS + "--model.init_args.optim.lr=1e30", "step", "not finite", "--model.init_args.optim.lr"),
    (DIGITS + "--ema.decays=[2]", "EMA decay 2", "not in [0, 1)", "0.99 to 0.9999"),
    (DIGITS + "--trainer.precision=bf16-true", "bf16-true", "round small updates away", "use bf16-mixed"),
    (DIGITS + "--trainer.devices=0", "devices='0'", "not a valid input", "cpu"),
    (DIGITS + "--trainer.accumulate_grad_batches=0", "accumulate_grad_batches=0", "must be", "at least 1"),
    (DIGITS + "--fid.every_n_steps=1", "fid.stats", "is missing", "make stats"),
    (
        DIGITS + "--fid.every_n_steps=1 --fid.extractor=randconv --fid.stats=none.npz",
        "'none.npz'",
        "no statistics",
        "make stats",
    ),
    (DIGITS + "--checkpoint.every_n_train_steps=0", "every_n_train_steps is 0", "give", "1 or more"),
    (DIGITS + "--samples.num_images=0", "num_images 0", "samples", "must be positive"),
    # data
    (DIGITS + "--data.init_args.batch_size=9999", "batch_size=9999", "exceeds the 1438", "lower batch_size"),
    (DIGITS + "--data.init_args.batch_size=0", "batch_size=0", "must be", "at least 1"),
    (DIGITS + "--data.init_args.num_workers=-1", "num_workers=-1", "must be 0", "or more"),
    (DIGITS + "--data.init_args.image_size=20", "image_size=20", "no multiple of 8", "use 8, 16"),
    (DIGITS + "--data.init_args.image_size=32", "32x32", "the tokenizer expects 16", "the same value"),
    (images("source: /no/folder"), "'/no/folder'", "does not exist", "give an existing folder"),
    (images("source: nobody/nothing"), "'nobody/nothing'", "the hub cannot be reached", "check the path"),
    (images("source: empty"), "'empty'", "holds no images", "expected files"),
    (images("source: mixed"), "'mixed'", "both images ('1.png') and folders ('cat')", "keep one of the two"),
    (images("source: image.png"), "'image.png'", "no folder", ".parquet or .arrow"),
    (images("source: damaged, val_split: null"), "'damaged/bad.png'", "no readable image", "replace or remove it"),
    (images("columns: {image: jpg}"), "{'image': 'jpg'}", "is for tables", "{label: null}"),
    (images("streaming: true"), "'pets'", "holds single images", "read it without streaming"),
    (images("streaming: true, crop_cache: x"), "streaming and crop_cache", "exclude each other", "at hand"),
    (images("crop_cache: image.png"), "'image.png'", "is a file", "name a folder"),
    (images("on_bad: ignore"), "'ignore'", "is unknown", "'skip' or 'error'"),
    (images("val_split: nosplit"), "'nosplit'", "has no split", "null to train without validation"),
    ("fit --exp jit_openmoji --data.init_args.image_size=20", "image_size=20", "no power of two", "use one of (16"),
    ("fit --exp jit_shapes --data.init_args.label_by=size", "'size'", "is unknown", "shape_colour or shape"),
    ("fit --exp mar_openmoji", "data/openmoji64", "do not exist", "make cache"),
]
JIT, MAR = "--exp jit_digits --ckpt trained.ckpt ", "--exp mar_digits --ckpt last "
EDIT = "--image image.png --mask mask.png "
SAMPLE = [
    ("--exp jit_digits", "which weights", "one of them", "CKPT=last, CKPT=path or OFFICIAL=path"),
    ("--exp jit_digits --ckpt last --official other.pth", "which weights", "one of them", "OFFICIAL=path"),
    ("--exp jit_l61 --ckpt last", "'jit_l61'", "unknown experiment", "jit_l16"),
    ("--exp jit_digits --ckpt last", "'runs/jit_digits'", "no checkpoint", "train first"),
    ("--exp jit_digits --ckpt torn.ckpt", "torn.ckpt", "cut short", "'last'"),
    ("--exp jit_digits --ckpt other.pth", "other.pth", "not a checkpoint of ours", "OFFICIAL="),
    ("--exp jit_digits --official nowhere.pth", "'nowhere.pth'", "no checkpoint", "give a file that exists"),
    ("--exp jit_digits --official torn.pth", "torn.pth", "not a readable", "cut short"),
    ("--exp jit_digits --official other.pth --ema 0.7", "'0.7'", "other.pth has no weights", "model_ema1"),
    ("--exp mar_digits --ckpt trained.ckpt", "trained.ckpt", "of another method", "did you mean MARSampling.num_iter"),
    (JIT + "--ema 0.7", "'0.7'", "no weights", "it has raw, ema, 0.5, 0.9"),
    (JIT + "--labels 3,11", "label 11", "out of range", "0..9 (LABELS=)"),
    (JIT + "--labels three", "'three'", "LABELS", "such as 0,1,2"),
    (JIT + "--text 'red apple'", "'red apple'", "draws classes", "give LABELS="),
    (JIT + "--num 0", "NUM is 0", "number of images", "give"),
    (JIT + "--num many", "'many'", "invalid int value", "--num"),
    (JIT + "--batch_size 0", "--batch_size is 0", "at once", "give the images"),
    (JIT + "--compile", "--compile", "the device is the cpu", "leave it out"),
    (JIT + "--out trained.ckpt", "'trained.ckpt'", "is a file", "give a folder"),
    (JIT + "--trainer.max_steps=3", "'--trainer.max_steps=3'", "changes nothing here", "--model.init_args.<key>"),
    (JIT + "--model.init_args.samplin.x=3", "samplin'", "unknown key", "did you mean model.init_args.sampling"),
    (JIT + "--model.init_args.sampling.num_steps=0", "num_steps is 0", "sampling needs", "at least one step"),
    (JIT + "--model.init_args.net.width=64", "trained.ckpt", "does not fit", "of another shape"),
    (JIT + "'--model.init_args.sampling={num_steps: ['", "{num_steps: [", "is no YAML", "quote it, or correct it"),
    (JIT + "--model.init_args=5", "5", "where keys and their values belong", "such as {depth: 4}"),
    (JIT + EDIT, "JiTModule", "cannot edit", "MAR's recipes can"),
    (MAR + "--mask mask.png", "--mask", "without --image", "needs both IMAGE= and MASK="),
    (MAR + "--image image.png", "--image", "without --mask", "needs both IMAGE= and MASK="),
    (MAR + EDIT + "--mask small.png", "8x8", "differ in size", "give both the model's size"),
    (MAR + EDIT + "--mask black.png", "'black.png'", "nothing white", "make white what"),
    (MAR + EDIT + "--mask clear.png", "'clear.png'", "transparency", "black (keep) and white"),
    (MAR + EDIT + "--image other.pth", "'other.pth'", "no readable image", "replace or remove it"),
    (MAR + EDIT + "--mask nowhere.png", "'nowhere.png'", "no readable image", "replace or remove it"),
    ("--exp vae_digits --ckpt last " + EDIT, "vae_digits", "edits none", "leave out IMAGE= and MASK="),
]
ASK = "--exp jetformer_shapes --ckpt last "
CAPTION = [
    (JIT + "--image image.png", "JiTModule", "has no captions", "JetFormer's recipes"),
    (ASK + "--image none.png", "'none.png'", "no image", "give a file, or a folder"),
    (ASK + "--image empty", "'empty'", "no image", "folder of images"),
    (ASK + "--image image.png --batch_size 0", "--batch_size is 0", "at once", "give"),
    (ASK + "--image image.png", "'runs/jetformer_shapes'", "no checkpoint", "make train EXP=jetformer_shapes"),
    (ASK, "--image", "required", "--image"),
]
EXPORT = [
    (JIT + "--out weights.bin", "'weights.bin'", "OUT", ".pth or .safetensors"),
    (JIT + "--ema 0.7 --out w.safetensors", "'0.7'", "no weights", "0.5, 0.9"),
    ("--exp jit_digits --out w.pth", "which weights", "one of them", "CKPT=last"),
    ("--exp jit_digits --ckpt last --out w.pth", "'runs/jit_digits'", "no checkpoint", "train first"),
    ("--exp jit_digits --official other.pth --out w.pth", "other.pth", "does not fit", "missing"),
]
SCORE = JIT + "--extractor randconv --stats stats.npz --num 2 "
FILES = "--exp jit_digits --extractor randconv --stats stats.npz "
EVAL = [
    (JIT, "STATS=", "no statistics to measure against", "make stats EXP=jit_digits"),
    (JIT + "--stats stats.npz --inception none.pth", "'none.pth'", "no Inception weights", "EXTRACTOR=effnet_lite0"),
    (JIT + "--extractor randconv --stats none.npz", "'none.npz'", "no statistics", "make stats"),
    (JIT + "--extractor randconv --stats text.npz", "text.npz", "not a readable npz", "not a zip file"),
    (
        JIT + "--extractor randconv --stats narrow.npz",
        "'narrow.npz'",
        "have 3 features",
        "make stats EXTRACTOR=randconv",
    ),
    (JIT + "--extractor none --stats stats.npz", "'stats.npz'", "no extractor compares", "EXTRACTOR="),
    (JIT + "--extractor dino --stats stats.npz", "'dino'", "unknown extractor", "effnet_lite0, randconv"),
    (JIT + "--extractor none", "jit_digits", "cannot judge", "EXTRACTOR= and STATS="),
    (SCORE + "--num 0", "NUM is 0", "give", "1 or more"),
    (SCORE + "--devices 0", "DEVICES is 0", "give", "1 or more"),
    (SCORE + "--save drawn", "'drawn'", "holds PNG files already", "give a new folder"),
    (SCORE + "--out image.png", "'image.png'", "is a file", "give a folder"),
    (SCORE + "--trainer.max_steps=2", "'--trainer.max_steps=2'", "changes nothing here", "--model.init_args"),
    (SCORE + "--images drawn", "IMAGES=", "scores files", "give one of them"),
    (FILES, "which weights", "one of them", "CKPT=last"),
    (FILES + "--images none", "'none'", "nothing at", "a folder of PNG files or an npz"),
    (FILES + "--images empty", "'empty'", "no PNG files", "IMAGES="),
    (FILES + "--images text.npz", "text.npz", "not a readable npz", "not a zip file"),
    (FILES + "--images drawn --save x", "SAVE", "scores files as they are", "leave it out"),
    (FILES + "--images drawn --ema raw", "EMA", "scores files as they are", "leave it out"),
    ("--exp jit_shapes --images unlabelled --extractor none", "no labels", "to judge by", "an npz with labels"),
]
SWEEP = [
    (SCORE, "--cfg", "required", "--cfg"),
    (SCORE + "--cfg ''", "CFG is ''", "give first:last:step", "1:4:0.5"),
    (SCORE + "--cfg a", "'a'", "CFG", "1:4:0.5"),
    (SCORE + "--cfg 4:1:0.5", "'4:1:0.5'", "CFG", "1:4:0.5"),
    (SCORE + "--cfg 1:4:0", "'1:4:0'", "CFG", "1:4:0.5"),
    (SCORE + "--cfg 1 --ema 0.7", "'0.7'", "no weights", "0.5, 0.9"),
    (SCORE + "--cfg 1 --final -1", "FINAL is -1", "0 to stop", "give the images"),
    (SCORE + "--cfg 1 --metric fid", "'fid'", "METRIC", "measured were n, fd_randconv"),
]
STATS = [
    ("--exp jit_digits --inception none.pth", "'none.pth'", "no Inception weights", "EXTRACTOR=effnet_lite0"),
    ("--exp jit_digits --extractor randconv --out x.txt", "'x.txt'", "OUT", "npz files"),
    ("--exp jit_digits --extractor randconv --split test", "'test'", "invalid choice", "'train', 'val'"),
    ("--exp jit_digits --extractor randconv --batch_size 0", "--batch_size is 0", "give", "1 or more"),
    ("--exp jit_digits --extractor randconv --features -1", "-1", "features are kept", "0 keeps none"),
    (
        "--exp jit_digits --extractor randconv --model.x=1",
        "'--model.x=1'",
        "changes nothing here",
        "--data.init_args.<key>",
    ),
    ("--exp jit --extractor randconv", "imagenet-1k", "the hub cannot be reached", "check the path, or the network"),
]
CACHE = [
    ("--exp jit_digits", "jit_digits", "reads images, not latents", "OUT="),
    (
        "--exp jit_digits --out c --model.init_args.net.depth=3",
        "net.depth=3'",
        "changes nothing here",
        "tokenizer.<key>=",
    ),
    ("--exp vae_digits --out c", "KLVAETokenizer", "trained along with the model", "does not last"),
    ("--exp mar_l", "'pretrained/kl16.ckpt'", "no tokenizer", "--model.init_args.tokenizer.init_args.weights"),
    ("--exp jit_digits --out c --shard_rows 0", "--shard_rows is 0", "give", "1 or more"),
    ("--exp jit_digits --out c --split test", "'test'", "invalid choice", "'train', 'val'"),
    ("--exp jit_digits --out c --data.init_args.image_size=8", "8 pixels", "do not fit", "image_size equal"),
    ("--exp jit --out c --data.init_args.streaming=true", "a stream", "no rows to share", "streaming=false"),
]
LATENTS = [
    (JIT, "jit_digits", "trains no tokenizer", "EXP=vae"),
    (JIT + "--num 0", "NUM is 0", "at least one image", "measured"),
    ("--exp vae_digits --ckpt last", "'runs/vae_digits'", "no checkpoint", "make train EXP=vae_digits"),
]
PROBE = [
    (JIT, "JiTModule", "no representations to probe", "EXP=givt"),
    (JIT + "--num 0", "NUM is 0", "must be", "positive"),
    ("--exp givt_digits --ckpt last", "'runs/givt_digits'", "no checkpoint", "make train EXP=givt_digits"),
]
PLAN = [
    ("--exp jit_digits --gpu h1000", "'h1000'", "unknown GPU", "there are h100"),
    ("--exp jit_digits --mfu 2", "--mfu 2.0", "must be above 0", "at most 1"),
    ("--exp jit_digits --gpus 0", "--gpus 0", "must be", "at least 1"),
    ("--exp jit_digits --gpus 7", "batch_size 64", "no multiple of 7 GPUs", "GPUS="),
    ("--exp jit_digits --trainer.max_steps=-1", "the recipe", "has no end", "--trainer.max_steps"),
    ("--exp jit_digits --modell.x=3", "'--modell.x=3'", "changes nothing here", "--model.*"),
    ("--exp jit_digits --model.init_args.net.dept=3", "net.dept'", "unknown key", "net.depth"),
    (
        "--exp jit --data.init_args.source=nobody/nothing",
        "'nobody/nothing'",
        "not known before a download",
        "max_steps",
    ),
]
BENCH = [
    ("--exp jit_digit", "'jit_digit'", "unknown experiment", "jit_digits"),
    ("--exp vae_digits", "vae_digits", "no plain path", "benchmarks/references/autoencoder.py"),
    ("--exp jit_digits --num_iter 3", "--num_iter", "no such setting", "JiTModule"),
]
SMOKE = [
    ("", "one experiment", "give", "make smoke EXP=jit_digits"),
    ("jit_digit", "'jit_digit'", "unknown experiment", "jit_digits"),
]
TABLES = {
    main.main: TRAIN,
    sample.main: SAMPLE,
    caption.main: CAPTION,
    export.main: EXPORT,
    evaluate.main: EVAL,
    sweeping.main: SWEEP,
    stats.main: STATS,
    cache.main: CACHE,
    measure_latents.main: LATENTS,
    probe.main: PROBE,
    plan.main: PLAN,
    bench.main: BENCH,
    smoke.run: SMOKE,
}
ROWS = [(entry, *row) for entry, table in TABLES.items() for row in table]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with a checkpoint of ours, wrong and torn ones, pictures, statistics and configurations."""
    path = tmp_path_factory.mktemp("work")
    with chdir(path):
        main.cli(["fit", "--exp", "jit_digits", *shrunken("jit_digits"), "--trainer.default_root_dir=elsewhere"])
        recipes.find_checkpoint("jit_digits", "last").rename("trained.ckpt")
        shutil.rmtree("runs")
        weights = {"net.pos_embed": torch.zeros(1, 4, 8)}
        torch.save({"model": weights, "model_ema1": weights}, "other.pth")
        for whole, torn in (("other.pth", "torn.pth"), ("trained.ckpt", "torn.ckpt")):
            Path(torn).write_bytes(Path(whole).read_bytes()[:300])
        for name, colour, side in (("image", 90, 16), ("mask", 255, 16), ("black", 0, 16), ("small", 255, 8)):
            Image.new("L", (side, side), colour).save(f"{name}.png")
        Image.new("LA", (16, 16), (255, 0)).save("clear.png")
        names = ("damaged/good", "mixed/cat/0", "mixed/1", "pets/cat/0", "pets/dog/1", "pets/dog/2", "unlabelled/0")
        for name in (*names, "drawn/0_label0", "empty/x"):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16)).save(f"{name}.png")
        Path("empty/x.png").unlink()
        Path("damaged/bad.png").write_bytes(b"no picture")
        for name, text in (
            ("list.yaml", "- 1\n"),
            ("broken.yaml", "a: [\n"),
            ("strange.yaml", "data: {class_path: somebody.Data}\n"),
            ("text.npz", "no archive"),
        ):
            Path(name).write_text(text)
        np.savez("stats.npz", mu=np.zeros(256), sigma=np.eye(256))
        np.savez("narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    return path


def error_of(entry, line: list[str], capsys) -> str:
    """The one line that an entry point ends with."""
    with pytest.raises(SystemExit) as stopped:
        call(entry, *line)
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in last[:20], last  # the parser of options puts the command's name before it
    return last


@pytest.mark.parametrize(
    ("entry", "line", "value", "reason", "cure"), ROWS, ids=[f"{row[0].__module__}: {row[1][:70]}" for row in ROWS]
)
def test_mistake(entry, line, value, reason, cure, folder, capsys):
    with chdir(folder):
        before = set(Path.cwd().rglob("*"))
        text = error_of(entry, shlex.split(line), capsys)
        assert [part for part in (value, reason, cure) if part not in text] == [], text
        assert len(text) < 600, text
        made = [path.name for path in set(Path.cwd().rglob("*")) - before]
        assert not [name for name in made if name.endswith((".ckpt", ".png", ".safetensors", ".pth"))], made
        shutil.rmtree("runs", ignore_errors=True)


def test_make_without_experiment_says_so():
    done = make("train")
    assert done.returncode != 0 and "EXP is missing" in done.stderr


def test_make_passes_values_and_exit_codes_on(tmp_path):
    python = tmp_path / "python"  # says what it is given, and fails
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\necho "error: mine" >&2\nexit 2\n')
    python.chmod(0o755)
    done = make("sample", "EXP=jit_digits", "CKPT=a b.ckpt", "LABELS=1,0", "OUT=out/", python=str(python))
    given = done.stdout.splitlines()
    assert dict(zip(given[::2], given[1::2], strict=True)) == {
        "-m": "experiments.sample",
        "--exp": "jit_digits",
        "--ckpt": "a b.ckpt",
        "--labels": "1,0",
        "--num": "64",
        "--seed": "0",
        "--out": "out/",
    }
    assert done.returncode == 2 and "error: mine" in done.stderr and "Error 2" in done.stderr


def test_make_help_explains_every_target():
    text = make("help").stdout
    targets = ["setup", "train", "sample", "export", "eval", "sweep", "stats", "plan", "claims", "smoke", "tensorboard"]
    for target in [*targets, "test", "test-slow", "test-gpu", "lint", "bench"]:
        assert f"make {target} " in text
