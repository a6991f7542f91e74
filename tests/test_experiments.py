"""Every recipe parses, builds the same with and without jsonargparse, states its source, and passes its smoke run."""

import dataclasses

import pytest
import torch

from experiments import recipes
from experiments.load import instantiate, load_config, load_data, load_module
from experiments.main import cli
from tests.smoke import SMOKE, shrunken, smoke, tiny

EXPERIMENTS = recipes.names()
OFFLINE_FIRST = sorted(EXPERIMENTS, key=lambda name: (not name.endswith("_digits"), not name.endswith("_shapes"), name))
MODULES = {load_config(name)["model"]["class_path"]: name for name in reversed(OFFLINE_FIRST)}.values()  # one of each
SMOKED = ("jit_digits", "mar_digits", "rar_digits")  # the first two recipes of README.md, and one of ids
MODULES_FIRST = [pytest.param(name, marks=[] if name in MODULES else pytest.mark.slow) for name in EXPERIMENTS]
SMOKED_FIRST = [pytest.param(name, marks=[] if name in SMOKED else pytest.mark.slow) for name in EXPERIMENTS]


def plain(value):
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


@pytest.mark.parametrize("experiment", MODULES_FIRST)
def test_command_line_and_loader_build_the_same(experiment):
    with torch.device("meta"):
        parsed = cli(["--exp", experiment, "--trainer.accelerator=cpu", "--trainer.logger=false"], run=False)
        loaded, data = load_module(experiment), load_data(experiment)
    assert type(parsed.model) is type(loaded)
    assert dict(parsed.model.hparams) == dict(loaded.hparams)
    assert {n: p.shape for n, p in parsed.model.named_parameters()} == {
        n: p.shape for n, p in loaded.named_parameters()
    }
    assert type(parsed.datamodule) is type(data)
    ours = {name: value for name, value in vars(data).items() if not name.startswith("_")}
    assert {name: vars(parsed.datamodule)[name] for name in ours} == ours


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_image_size_of_data_and_model_agree(experiment):
    tokenizer = load_config(experiment)["model"]["init_args"]["tokenizer"]
    assert load_data(experiment).image_size == tokenizer["init_args"]["image_size"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_header_states_source_figures_hardware_and_command(experiment):
    lines = (recipes.FOLDER / f"{experiment}.yaml").read_text().splitlines()
    header = " ".join(line for line in lines if line.startswith("#"))
    for needed in ("paper", "Expected", "Hardware", f"make train EXP={experiment}"):
        assert needed.lower() in header.lower(), needed


@pytest.mark.parametrize("experiment", SMOKED_FIRST)
def test_smoke(experiment, tmp_path):
    smoke(experiment, tmp_path)


def test_overrides_beat_files_and_later_files_beat_earlier(tmp_path):
    extra = tmp_path / "extra.yaml"
    extra.write_text("model: {init_args: {net: {depth: 3}, sampling: {num_steps: 7}}}\n")
    line = [*shrunken("jit_digits"), f"--config={extra}", "--model.init_args.sampling.num_steps=9"]
    model = cli(["--exp", "jit_digits", *line, "--trainer.logger=false"], run=False).model
    assert model.sampling.num_steps == 9
    assert len(model.net.blocks) == 3  # a file that is named after --model... overrides follows them
    assert model.sampling.method == "heun"  # what nobody changed stays


def test_recipes_follow_their_name():
    assert [path.stem for path in recipes.files("jit_l16")] == ["default", "jit", "jit_l16"]


def test_recipes_can_only_name_classes_of_the_project_and_lightning():
    with pytest.raises(ValueError, match=r"os\.system"):
        instantiate({"class_path": "os.system", "init_args": {"command": "true"}}, "model")


def test_tiny_names_only_keys_that_exist():
    config = load_config("jit", [f"{key}={value}" for key, value in tiny("jit").items()], overlays=[SMOKE])
    assert config["model"]["init_args"]["net"]["width"] == tiny("jit")["model.init_args.net.width"]


def test_a_configuration_is_dumped_without_a_remark(recwarn):
    """`python -m experiments.main` would show it at every start."""
    built = cli(["--exp", "jit_digits", *shrunken("jit_digits")], run=False)
    assert "jit_digits" in built.parser.dump(built.config, skip_none=False)
    assert [w for w in recwarn if "skip_none" in str(w.message)] == []
