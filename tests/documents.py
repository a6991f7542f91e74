"""What the documents say: the commands, options, files and names in README.md, CONTRIBUTING.md, docs/ and the recipes'
headers, read from the text, so that a test can hold them against the code."""

import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = sorted((ROOT / "experiments").glob("*.yaml"))
STARTS = re.compile(r"(\w+=\S+ +)*(make|srun|python3?|(\.venv/bin/)(python3?|torchrun|hf|pip))\s")
ASSIGNED = re.compile(r"([A-Z_]+)=(.*)", re.DOTALL)
PLACEHOLDER = ("...", "<name>", "<m>")
PACKAGES = "layers|lightning_modules|datamodules|experiments|tests|benchmarks|docs|\\.ci"
PATH = re.compile(rf"(?:{PACKAGES})/[\w./*<>-]*|[\w-]+\.(?:md|toml|txt)|Makefile")


class Command(NamedTuple):
    """A command and the document that has it."""

    text: str
    document: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def commands() -> list[Command]:
    """Every command, once for each text."""
    found = {}
    for path in DOCUMENTS:
        for text in _commands_of(path.read_text()):
            found.setdefault(text, Command(text, path.relative_to(ROOT).as_posix()))
    for path in RECIPES:
        header = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
        for match in re.finditer(r'make \w+ EXP=[\w<>]+(?: [A-Z]+=(?:"[^"]*"|[\w./=-]+\b))*', header):
            found.setdefault(match[0], Command(match[0], path.relative_to(ROOT).as_posix()))
    return list(found.values())


def code(text: str) -> Iterator[str]:
    """Lines of indented and fenced blocks but those of Python, joined where they end in a backslash."""
    block = "\n".join(
        line for line in re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL).splitlines() if line.startswith("    ")
    )
    fenced = re.findall(r"```(?:\w+)?\n(.*?)```", re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL), re.DOTALL)
    for part in (block, *fenced):
        yield from re.sub(r"\\\n\s*", "", part).splitlines()


def spans(text: str) -> Iterator[str]:
    """Code spans of the prose, in one line each."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith("    "))
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))


def python_blocks(text: str) -> list[str]:
    """Fenced blocks of Python."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def _commands_of(text: str) -> Iterator[str]:
    for line in (*code(text), *spans(text)):
        line = re.sub(r"\s+# .*", "", line.strip())
        if STARTS.match(line):
            yield line


# make


@functools.cache
def makefile() -> dict[str, set[str]]:
    """The variables that each target's recipe reads, those of its named parts included."""
    text = (ROOT / "Makefile").read_text()
    parts = {m[1]: m[2] for m in re.finditer(r"^(\w+) = (.*)$", text, re.MULTILINE)}
    targets = {}
    for match in re.finditer(r"^([a-z-]+):.*?##.*\n((?:\t.*\n)*)", text, re.MULTILINE):
        recipe = match[2]
        for _ in range(2):  # parts of parts
            recipe = re.sub(r"\$\((\w+)\)", lambda found: f"{found[0]} {parts.get(found[1], '')}", recipe)
        targets[match[1]] = set(re.findall(r"[(,]([A-Z]+)\)", recipe))
    return targets


def assignments(command: Command) -> tuple[str, dict[str, str]]:
    """Target and variables of a make command."""
    words = command.words[command.words.index("make") + 1 :]
    given = {match[1]: match[2] for word in words if (match := ASSIGNED.fullmatch(word))}
    targets = [word for word in words if not ASSIGNED.fullmatch(word)]
    assert len(targets) == 1, f"{command.text}: not one target"
    return targets[0], given


def make(*words: str, python: str = sys.executable) -> subprocess.CompletedProcess:
    """make as it is started from a shell: without what a make that runs the tests hands on."""
    handed_on = ("ARGS", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in handed_on}
    line = ["make", *words, f"PYTHON={python}"]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


@functools.cache
def lines(command: Command) -> list[list[str]]:
    """The Python command lines that a command comes to, each as module and arguments; of make, by a dry run."""
    words = command.words
    if "make" in words[:3]:
        done = make("-n", *words[words.index("make") + 1 :])
        assert done.returncode == 0, f"{command.text}: {done.stderr}"
        split = [shlex.split(line) for line in done.stdout.replace("\\\n", " ").splitlines()]
    else:
        split = [words]
    return [line[line.index("-m") + 1 :] for line in split if "-m" in line]


# names


def paths(text: str) -> set[str]:
    """Files and folders of this repository that code spans and links name."""
    linked = re.findall(r"\]\(([^)#]+)\)", text)
    named = [word for span in spans(text) for word in PATH.findall(span)]
    return {name.rstrip(".,:") for name in [*named, *linked] if "://" not in name}


def table_names(text: str) -> Iterator[tuple[str, str]]:
    """(file, name in it) of every "`file.py: A`, `b`" in a document: names go on until the next file or cell."""
    for row in text.splitlines():
        for cell in row.split("|") if row.startswith("|") else []:
            file = ""
            for span in re.findall(r"`([^`]+)`", cell):
                if match := re.fullmatch(rf"((?:{PACKAGES})/[\w/]+\.py)(?:: *(.*))?", span):
                    file, span = match[1], match[2] or ""
                if file and re.fullmatch(r"[\w.]+", span):
                    yield file, span
