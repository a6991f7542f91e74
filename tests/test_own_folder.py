"""A user's own folder, as the README says: its name is enough, with labels or without."""

import re
from contextlib import chdir
from pathlib import Path

import pytest
from PIL import Image

from experiments import main
from tests.smoke import tiny

ROOT = Path(__file__).parents[1]
COMMAND = re.search(
    r'make train EXP=(\w+) ARGS="(--data\.init_args\.source=)/my/folder"', (ROOT / "README.md").read_text()
)
SMALL = [
    *(f"--{key}={value}" for key, value in tiny("jit").items() if key.startswith("model.init_args.net")),
    "--data.init_args.batch_size=4",
    "--data.init_args.num_workers=0",
    "--data.init_args.image_size=32",
    "--model.init_args.tokenizer.init_args.image_size=32",
    "--model.init_args.sampling.num_steps=2",
    "--model.init_args.compile=false",
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--trainer.max_steps=2",
    "--samples.num_images=4",
]


def make_folder(path: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40 + i, 50), 80).convert("RGB").save(path / name)
    return path


def train(folder: Path, *extra: str):
    assert COMMAND, "the README shows the command"
    return main.cli(["fit", "--exp", COMMAND[1], f"{COMMAND[2]}{folder}", *SMALL, *extra])


@pytest.mark.parametrize("classes", [3, 1])
def test_the_name_of_a_folder_is_enough(classes, tmp_path, capsys):
    names = [f"class{i % classes}/{i}.jpg" if classes > 1 else f"{i}.png" for i in range(9)]
    folder = make_folder(tmp_path / "mine", names)
    with chdir(tmp_path):
        trained = train(folder)
    assert trained.trainer.global_step == 2 and trained.model.num_classes == classes
    guided = trained.model.sampling.cfg_scale != 1
    assert guided == (classes > 1), "one class is no condition: nothing to guide"
    assert (trained.model.objective.label_drop_prob > 0) == (classes > 1)
    assert f"the data has {classes} class" in capsys.readouterr().out
    assert list(tmp_path.glob("runs/jit/*/samples/*.png"))


def test_what_the_line_says_stays(tmp_path, capsys):
    folder = make_folder(tmp_path / "mine", [f"{i}.png" for i in range(6)])
    with chdir(tmp_path):
        given = train(folder, "--model.init_args.num_classes=7")
        guided = train(folder, "--model.init_args.sampling.cfg_scale=1.5")
    assert given.model.num_classes == 7 and given.model.sampling.cfg_scale == 3.0
    assert guided.model.num_classes == 1 and guided.model.sampling.cfg_scale == 1.5
    assert "the data has" in capsys.readouterr().out


def test_the_recipes_own_data_changes_nothing():
    assert main.match_classes("jit", ["fit", "--trainer.max_steps=2"]) == []
    assert main.match_classes("jit_digits", ["fit", "--data.init_args.batch_size=2"]) == []
    assert main.match_classes("jit_shapes", ["fit", "--data.init_args.label_by", "shape"]) == [
        "--model.init_args.num_classes=8"
    ]


def test_captions_of_one_s_own_are_dropped_and_guided_though_there_is_one_class(tmp_path):
    folder = make_folder(tmp_path / "mine", [f"{i}.png" for i in range(4)])
    for picture in list(folder.iterdir()):
        picture.with_suffix(".txt").write_text("a picture")
    line = [
        "fit",
        "--data=datamodules.image_text.ImageTextData",
        f"--data.init_args={{source: {folder}, image_size: 32}}",
    ]
    line += ["--data.init_args.columns={caption: .txt}"]
    assert main.match_classes("dart_shapes", line) == ["--model.init_args.num_classes=1"]
