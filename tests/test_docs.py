"""Documents cannot rot: every command in README.md, CONTRIBUTING.md, docs/ and the recipes' headers names a target, an
experiment and options that exist, and every file and name that they point at is there. Commands are run in
test_docs_run.py."""

import argparse
import ast
import importlib
import importlib.util
import inspect
import re
import runpy
import sys

import pytest

from experiments import main, recipes
from experiments.keys import check_keys
from experiments.load import TRUST, load_config
from tests.documents import (
    DOCUMENTS,
    PLACEHOLDER,
    ROOT,
    assignments,
    commands,
    lines,
    makefile,
    paths,
    python_blocks,
    table_names,
)

COMMANDS = commands()
MAKE = [command for command in COMMANDS if "make" in command.words[:2]]
COMPLETE = [
    c for c in COMMANDS if not any(part in c.text for part in PLACEHOLDER) and not re.fullmatch(r"make \w+", c.text)
]
FOREIGN = ("pytest", "ruff", "tensorboard.main", "pip", "tests.smoke")  # modules whose options are not looked at
SECTIONS = "|".join(("model", "data", *main.SECTIONS))


def shown(command) -> str:
    return f"{command.document}: {command.text[:90]}"


def test_the_commands_are_found():
    texts = [command.text for command in COMMANDS]
    for text in (
        "make train EXP=jit_digits",  # a block
        "make plan EXP=jit_l16 GPU=h100",  # prose, over two lines
        "make train EXP=jit OFFICIAL=checkpoint-last.pth",  # continued by a backslash
        "python -m benchmarks.eval_fid folder --stats x.npz",
        ".venv/bin/torchrun --nnodes=4",
        'make sample EXP=jetformer_shapes CKPT=last TEXT="a red ring on black"',  # a recipe's header
    ):
        assert any(found.startswith(text) for found in texts), text
    assert len(texts) > 80


@pytest.mark.parametrize("command", MAKE, ids=shown)
def test_target_variables_and_experiment_exist(command):
    target, given = assignments(command)
    assert target in makefile(), f"no target {target}"
    read = makefile()[target]
    assert set(given) <= read | {"PYTHON", "GOLDEN_DIR"}, f"make {target} reads none of {set(given) - read}"
    name = given.get("EXP", "")
    if given and "EXP" in read:  # without any, it is a target's name in prose
        assert name in recipes.names() or name in PLACEHOLDER or (target, name) == ("bench", "data"), name


class Parsed(BaseException):
    """Stops a command once its options are read."""


def parsed(module: str, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What an entry point reads of a line, and what it leaves over."""
    original = argparse.ArgumentParser.parse_known_args

    def stop(parser, line=None, namespace=None):
        raise Parsed(*original(parser, line, namespace))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        with pytest.raises(Parsed) as stopped:
            patch.setattr(sys, "argv", [module, *arguments])
            runpy.run_module(module, run_name="__main__")
    return stopped.value.args


def training_line(arguments: list[str]) -> tuple[str, list[str]]:
    """Experiment and overrides of a line for experiments.main."""
    command, *rest = [word for word in arguments if word != TRUST]
    assert command in main.COMMANDS
    ours = {rest[i]: rest[i + 1] for i in range(len(rest)) if rest[i] in ("--exp", "--ckpt", "--official")}
    return ours["--exp"], [word for word in rest if word not in {*ours, *ours.values()}]


@pytest.mark.parametrize("command", COMPLETE, ids=shown)
def test_options_exist(command):
    """Each option is one that its entry point knows, each override a key of the recipe."""
    for module, *arguments in lines(command):
        assert importlib.util.find_spec(module), module
        if module in FOREIGN:
            continue
        if module == "experiments.main":
            exp, overrides = training_line(arguments)
        else:
            options, overrides = parsed(module, arguments)
            exp = getattr(options, "exp", None)
        assert [word for word in overrides if not re.match(rf"--({SECTIONS})\.[\w.]+\+?=", word)] == []
        if exp:
            check_keys(overrides, load_config(exp), main.SECTIONS)


# Names


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(document):
    missing = []
    for name in sorted(paths(document.read_text())):
        places = [document.parent, ROOT]
        pattern = re.sub(r"<\w+>", "*", name)
        if not any(next(place.glob(pattern), None) if "*" in pattern else (place / name).exists() for place in places):
            missing.append(name)
    assert missing == []


def defined(file: str) -> set[str]:
    """Names that a file defines: functions, classes, constants, and methods as Class.method."""
    found = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        match node:
            case ast.FunctionDef(name=name):
                found.add(name)
            case ast.ClassDef(name=name, body=body):
                found |= {name, *(f"{name}.{part.name}" for part in body if isinstance(part, ast.FunctionDef))}
            case ast.Assign(targets=targets):
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_equations_and_official_files_lead_to_code_that_exists():
    """docs/parity.md."""
    pairs = list(table_names((ROOT / "docs/parity.md").read_text()))
    assert len(pairs) > 100 and ("layers/samplers/ode.py", "euler") in pairs
    assert [pair for pair in pairs if not (ROOT / pair[0]).exists()] == []
    assert [pair for pair in pairs if pair[1] not in defined(pair[0])] == []


def test_golden_cases_that_the_table_names_exist():
    sections = re.split(r"^## ", (ROOT / "docs/parity.md").read_text(), flags=re.MULTILINE)[1:]
    found = 0
    for section in sections:
        method = {"jet": "jetformer"}.get(name := section.split()[0].lower(), name)
        files = " ".join(path.as_posix() for path in (ROOT / "tests/golden" / method).rglob("*"))
        for name in re.findall(r"[\w*]+", " ".join(re.findall(r"`golden: ([^`]+)`", section))):
            assert name.rstrip("*s") in files, f"no golden case {name} of {method}"
            found += 1
    assert found > 30


def test_python_in_the_readme_uses_names_that_exist():
    """Imports, and methods with these arguments."""
    for block in python_blocks((ROOT / "README.md").read_text()):
        tree, known = ast.parse(block), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                known |= {alias.name: getattr(module, alias.name) for alias in node.names}
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
            ):
                owner = known.get(node.func.value.id)
                if isinstance(owner, type):
                    arguments = inspect.signature(getattr(owner, node.func.attr)).parameters
                    assert {word.arg for word in node.keywords} <= set(arguments)
