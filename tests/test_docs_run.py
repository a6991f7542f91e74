"""Every command of the documents runs, shrunken, in a folder that holds what it needs, made up: a run of two steps, a
released file, pictures. `NOT_RUN` names those that another test runs, or why none can."""

import re
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from benchmarks import judge_digits
from experiments import evaluate, export, main, probe, recipes, sample, stats, sweep
from experiments import plan as planning
from experiments.load import instantiate, load_config
from lightning_modules.weights import read_torch
from tests.documents import ROOT, commands, lines, python_blocks
from tests.smoke import SMOKE, call, tiny, train

RECIPES = "tests/test_experiments.py trains, resumes, samples and exports every recipe"
NOT_RUN = {  # pattern of commands -> reason
    r"make train EXP=\w+( CKPT=last)?": RECIPES,
    r"make smoke EXP=\S+": RECIPES,
    r"make sample EXP=\w+ CKPT=last TEXT=.*": "tests/test_caption.py",
    r"make caption .*": "tests/test_caption.py",
    r"make cache EXP=.*": "tests/test_cache.py; ImageNet and a released autoencoder are needed",
    r'make train EXP=jit ARGS="--data\.init_args\.source=/my/folder"': "tests/test_own_folder.py reads this very line",
    r'make train EXP=\w+ ARGS="--trainer\.strategy=.*': "tests/test_fsdp.py, by two processes",
    r"(\.venv/bin/torchrun|srun) .*": "several nodes; tests/test_ddp.py and tests/test_fsdp.py start two processes",
    r"make (setup|test|test-slow|test-gpu|lint|help|tensorboard|claims)": "the suite itself, or without an end",
    r"make bench EXP=.*": "tests/test_bench.py",
    r"make train EXP=dart_xl_512 .*coarse_from=.*": "tests/methods/test_dart.py",
    r"make \w+": "the name of a target in prose",
    r"(GOLDEN_DIR|HYPOTHESIS_PROFILE)=.*": "the suite itself",
    r".*-m pytest.*": "the suite itself",
    r"python -m benchmarks\.claims\.\w+": "tests/test_claims.py and others, in small; hours of two cores",
    r"python -m benchmarks\.kills .*": "tests/test_kills.py, a few of them",
    r"\.venv/bin/hf auth login": "an account of the Hugging Face hub",
    r"python -m benchmarks\.eval_fid .*": "tests/test_evaluate.py; released Inception weights are needed",
    r"make .*(\.\.\.|<).*": "a pattern, no command",
}


def is_run(text: str) -> bool:
    return not any(re.fullmatch(pattern, text) for pattern in NOT_RUN)


def test_every_reason_is_of_some_command_and_names_tests_that_exist():
    texts = [command.text for command in commands()]
    assert [p for p in NOT_RUN if not any(re.fullmatch(p, text) for text in texts)] == []
    for name in re.findall(r"tests/\w+\.py", " ".join(NOT_RUN.values())):
        assert (ROOT / name).exists(), name


class Recipe:
    """A recipe shrunken: options that do so, and sizes."""

    def __init__(self, exp: str) -> None:
        self.exp = exp
        self.options = [f"--{key}={value}" for key, value in tiny(exp).items()]
        self.config = load_config(exp, self.options)
        self.image_size = self.config["model"]["init_args"]["tokenizer"]["init_args"]["image_size"]
        self.num_classes = self.config["model"]["init_args"].get("num_classes", 10)
        self.model_options = [word for word in self.options if word.startswith("--model.")]

    def module(self):
        return instantiate(self.config["model"], "model").eval()

    def synthetic(self, batch_size: int = 4) -> list[str]:
        """Options for data of its size that need no file."""
        sizes = f"image_size: {self.image_size}, batch_size: {batch_size}, num_classes: {self.num_classes}"
        options = f"{{{sizes}, length: {2 * batch_size}, val_length: 4}}"
        return ["--data.class_path=datamodules.synthetic.SyntheticData", f"--data.init_args={options}"]

    def save_official(self, path: str) -> None:
        """What a released file holds."""
        module = self.module()
        torch.save(dict.fromkeys(module.OFFICIAL_KEYS, module.official_state_dict()), path)

    def save_pictures(self) -> None:
        """A folder of one's own with two classes, a local copy of ImageNet, an image and a mask."""
        for folder in ("my/folder", "data/imagenet/train", "data/imagenet/val"):
            for i in range(6):
                path = Path(folder) / f"class{i % 2}" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.effect_noise((40 + i, 50), 80).convert("RGB").save(path)
        side = self.image_size
        Image.effect_noise((side, side), 80).convert("RGB").save("in.png")
        Image.fromarray(np.tril(np.full((side, side), 255, np.uint8))).save("mask.png")


def with_values(arguments: list[str], **values: str) -> list[str]:
    """The line with other values for those of these options that it has."""
    line = list(arguments)
    for name, value in values.items():
        if f"--{name}" in line:
            line[line.index(f"--{name}") + 1] = value
    return line


def fit(recipe: Recipe, arguments: list[str]) -> None:
    """Training; where the line names data they are those, from this folder, and not synthetic ones."""
    overlay = yaml.safe_load(SMOKE.read_text())
    small = recipe.options
    if any(word.startswith("--data") for word in arguments):
        overlay["data"] = {"init_args": {"image_size": recipe.image_size, "batch_size": 4, "num_workers": 0}}
        small = [word for word in recipe.model_options if "num_classes" not in word]  # it follows the data
    Path("overlay.yaml").write_text(yaml.safe_dump(overlay))
    line = [word.replace("source=/", "source=") for word in arguments]
    trained = main.cli([*line, "--config=overlay.yaml", *small, "--trainer.max_steps=2"])
    assert trained.trainer.global_step == 2
    for word in line:
        name, _, value = word.partition("=")
        assert name != "--data.init_args.source" or str(trained.datamodule.source) == value


def draw(recipe: Recipe, arguments: list[str]) -> None:
    if "--labels" in arguments:
        labels = arguments[arguments.index("--labels") + 1].split(",")
        arguments = with_values(arguments, labels=",".join(str(int(label) % recipe.num_classes) for label in labels))
    call(sample.main, *with_values(arguments, num="3"), *recipe.model_options)
    assert len(np.load("out/samples.npz")["arr_0"]) == 3


def make_statistics(recipe: Recipe, arguments: list[str]) -> None:
    call(stats.main, *with_values(arguments, extractor="randconv"), *recipe.synthetic())
    assert Path(arguments[arguments.index("--out") + 1]).exists()


def score(entry, recipe: Recipe, arguments: list[str]) -> None:
    options = [word for word in recipe.model_options if "none" not in arguments or "num_classes" not in word]
    if "--stats" in arguments:
        path = arguments[arguments.index("--stats") + 1]
        make_statistics(recipe, ["--exp", recipe.exp, "--extractor", "randconv", "--out", path])
        options = [*options, "--extractor", "randconv", *recipe.synthetic()]
    call(entry.main, "--num", "4", *with_values(arguments, num="4", final="4"), *options)
    assert (Path("runs") / recipe.exp / ("sweep" if entry is sweep else "eval") / "results.json").exists()


def plan(recipe: Recipe, arguments: list[str]) -> None:
    call(planning.main, *arguments, *recipe.model_options, *recipe.synthetic(64), "--trainer.max_steps=10")


def write(recipe: Recipe, arguments: list[str]) -> None:
    call(export.main, *arguments)
    out = Path(arguments[arguments.index("--out") + 1])
    assert out.exists() and (out.suffix == ".safetensors" or "model" in read_torch(out))


RUN = {
    "experiments.main": fit,
    "experiments.sample": draw,
    "experiments.stats": make_statistics,
    "experiments.evaluate": lambda recipe, arguments: score(evaluate, recipe, arguments),
    "experiments.sweep": lambda recipe, arguments: score(sweep, recipe, arguments),
    "experiments.plan": plan,
    "experiments.export": write,
    "experiments.probe": lambda recipe, arguments: call(probe.main, *arguments, "--num", "64", *recipe.model_options),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [c for c in commands() if is_run(c.text)], ids=lambda c: f"{c.document}: {c.text[:90]}"
)
def test_command_runs(command, tmp_path):
    ((module, *arguments),) = lines(command)
    with chdir(tmp_path):
        if module == "benchmarks.judge_digits":
            Path("out").mkdir()
            np.savez("out/samples.npz", arr_0=np.zeros((20, 16, 16, 3), np.uint8), labels=np.arange(20) % 10)
            call(judge_digits.main, *arguments)
            return
        recipe = Recipe(arguments[arguments.index("--exp") + 1])
        if "--ckpt" in arguments:
            decays = arguments[arguments.index("--ema") + 1] if "--ema" in arguments else "0.5"
            # what judges samples without an extractor knows the recipe's classes
            whole = load_config(recipe.exp)["model"]["init_args"]
            classes = [f"--model.init_args.num_classes={whole['num_classes']}"] if "none" in arguments else []
            train(recipe.exp, f"--ema.decays=[{decays}]", *classes)
        if "--official" in arguments:
            recipe.save_official(arguments[arguments.index("--official") + 1])
        recipe.save_pictures()
        RUN[module](recipe, arguments)


def test_python_in_the_readme_runs(tmp_path, monkeypatch):
    """As it stands, but for the device, the labels, and recipes that are shrunken."""
    block = "\n".join(python_blocks((ROOT / "README.md").read_text()))
    block = re.sub(r"\b(207|360)\b", "7", block).replace('device="cuda"', 'device="cpu"')
    jit, mar = Recipe("jit_b16"), Recipe("mar")
    monkeypatch.setattr("experiments.load.load_module", lambda experiment: jit.module())
    with chdir(tmp_path):
        wanted = Path(re.search(r'"(runs/jit_digits/\S+\.ckpt)"', block)[1])
        train("jit_digits")
        found = recipes.find_checkpoint("jit_digits", "last").rename("kept.ckpt")
        wanted.parent.mkdir(parents=True, exist_ok=True)
        found.rename(wanted)
        jit.save_official("checkpoint-last.pth")
        side = mar.image_size
        known = {"mar": mar.module(), "mask": torch.ones(side, side, dtype=torch.bool).tril()}
        block = block.replace("to_uint8(images), mask", f"to_uint8(images)[..., :{side}, :{side}], mask")
        exec(compile(block, "README.md", "exec"), known)
        assert known["images"].shape == (2, 3, side, side)
