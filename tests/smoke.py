"""`make smoke EXP=name`: a recipe, shrunken, through the real command line: train, resume, sample, export.

Shrinking is `experiments/smoke.yaml` plus the TINY overrides at the head of the method's test.
"""

import importlib
import json
import sys
import tempfile
from contextlib import chdir
from pathlib import Path
from typing import Any

from experiments import export, main, recipes, sample
from experiments.errors import one_line_errors
from experiments.load import find_class, load_config
from lightning_modules.weights import read_torch

SMOKE = recipes.FOLDER / "smoke.yaml"


def tiny(experiment: str) -> dict[str, Any]:
    """TINY of tests/methods/test_<module>.py, where <module> is the file of the recipe's LightningModule.

    Its TINY_OF[experiment] comes on top; a class there drops the arguments of the one it replaces.
    """
    class_path = load_config(experiment)["model"]["class_path"]
    test = importlib.import_module(f"tests.methods.test_{class_path.split('.')[1]}")
    own = getattr(test, "TINY_OF", {}).get(experiment, {})
    replaced = tuple(key.replace("class_path", "init_args.") for key in own if key.endswith("class_path"))
    return {key: value for key, value in test.TINY.items() if not (replaced and key.startswith(replaced))} | own


def shrunken(experiment: str) -> list[str]:
    """What follows `fit --exp NAME` for a smoke run."""
    return [f"--config={SMOKE}", *(f"--{key}={value}" for key, value in tiny(experiment).items())]


def asked(experiment: str) -> list[str]:
    """What is asked for when it draws: labels, or, of an autoencoder, the data whose images it gives back."""
    overrides = [f"{key}={value}" for key, value in tiny(experiment).items()]
    config = load_config(experiment, overrides, overlays=[SMOKE])
    if not hasattr(find_class(config["model"]["class_path"], "model"), "reconstruct"):
        return ["--labels", "1,0"]
    data = config["data"]
    return [f"--data.class_path={data['class_path']}", f"--data.init_args={json.dumps(data['init_args'])}"]


def train(experiment: str, *extra: str) -> Any:
    """A smoke run through the command line in this process; the CLI object."""
    return main.cli(["fit", "--exp", experiment, *shrunken(experiment), *extra])


def smoke(experiment: str, folder: Path) -> None:
    """Train two steps, resume for two more, sample and export, all inside `folder`; asserts what came of it."""
    with chdir(folder):
        assert train(experiment).trainer.global_step == 2
        first = recipes.find_checkpoint(experiment, "last")
        resumed = train(experiment, "--ckpt", "last", "--trainer.max_steps=4")
        assert resumed.trainer.global_step == 4
        last = recipes.find_checkpoint(experiment, "last")
        assert last.parent == first.parent and not first.exists(), "a resumed run goes on in its own folder"
        assert read_torch(last)["global_step"] == 4
        assert list(last.parent.parent.glob("samples/*.png")), "no sample grid was written"
        call(sample.main, "--exp", experiment, "--ckpt", "last", "--num", "3", "--out", "out", *asked(experiment))
        assert {"grid.png", "samples.npz", "settings.json"} <= {path.name for path in Path("out").iterdir()}
        call(export.main, "--exp", experiment, "--ckpt", "last", "--out", "weights.safetensors")
        assert Path("weights.safetensors").stat().st_size > 0


def call(entry: Any, *line: str) -> None:
    """Run an entry point with this command line."""
    before = sys.argv
    sys.argv = [entry.__module__, *line]
    try:
        entry()
    finally:
        sys.argv = before


@one_line_errors
def run() -> None:
    if len(sys.argv) != 2:
        raise ValueError("give one experiment: make smoke EXP=jit_digits")
    recipes.files(sys.argv[1])
    main.quiet()
    with tempfile.TemporaryDirectory() as folder:
        smoke(sys.argv[1], Path(folder))
    print(f"smoke of {sys.argv[1]}: trained, resumed, sampled, exported")


if __name__ == "__main__":
    run()
