"""The experiment loader: a configuration with classes of this project, or one error that names the file or the key."""

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from experiments import recipes
from experiments.keys import check_keys
from experiments.load import PACKAGES, find_class, instantiate, load_config, merge, parse_override, read_config
from experiments.main import SECTIONS
from tests.fuzz.guard import fresh, survives
from tests.fuzz.mutations import JSON, mutated, mutated_tree

TEXTS = [(recipes.FOLDER / f"{name}.yaml").read_bytes() for name in ("jit_digits", "mar_digits", "jit_b32")]
DIGITS = load_config("jit_digits")
YAML = [
    *TEXTS,
    b"a: &a [1, 2]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    b"a: &a {b: *a}\n",
    b"<<: {a: 1}\nb: 2024-01-01\nc: !!binary aGk=\nd: !!set {x, y}\ne: !!omap [a: 1]\n",
    b"!!python/object/apply:os.system ['true']\n",
    b"model: {class_path: os.system, init_args: {command: 'true'}}\n",
    b"trainer: {callbacks: [{class_path: subprocess.Popen, init_args: {args: [ls]}}]}\n",
    b"? [a, b]\n: 1\n",
    b"a: 0x_\nb: 1:99:99\nc: .inf\nd: 1e400\ne: !!int ''\nf: !!float x\n",
]
CLASS_PATHS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["os.system", "layers.blocks.nn", "lightning.os", "datamodules", "layers..x", ".", "lightning.\0"]),
    st.builds(".".join, st.lists(st.sampled_from([*PACKAGES, "pytorch", "base", "__init__", "sys", ""]), max_size=4)),
)


OVERRIDES = ["--model.init_args.net.depth=3", "--data.init_args.batch_size=2", "--model.init_args.tokenizer.x.y=1"]


def follow(config):
    """What a training command does with a file that it has read, before anything is built."""
    check_keys(OVERRIDES, merge(DIGITS, config), SECTIONS)


@given(data=mutated(YAML, most=8))
def test_text(data, tmp_path):
    path = fresh(tmp_path, data, ".yaml")
    config = survives(lambda: read_config(path), named=path.name)
    if config is not None:
        assert all(isinstance(key, str) for key in config)
        survives(lambda: follow(config))


@given(data=st.binary(max_size=40) | st.text(max_size=60).map(str.encode))
def test_any_text(data, tmp_path):
    path = fresh(tmp_path, data, ".yaml")
    survives(lambda: read_config(path), named=path.name)


@given(config=mutated_tree(DIGITS, values=JSON | CLASS_PATHS | st.fixed_dictionaries({"class_path": CLASS_PATHS})))
def test_trees(config, tmp_path):
    path = fresh(tmp_path, yaml.safe_dump(config).encode(), ".yaml")
    config = survives(lambda: read_config(path), named=path.name)
    if config is not None:
        survives(lambda: follow(config))


@given(config=mutated_tree({key: DIGITS[key] for key in ("data", "model")}, values=JSON | CLASS_PATHS))
def test_classes_are_built_or_refused(config):
    """The data and the tokenizer: a network of any size that is asked for is what a user may want."""
    for where in ("data", "model.init_args.tokenizer"):
        with torch.device("meta"):
            survives(lambda where=where: instantiate(_at(config, where), where))


@given(class_path=CLASS_PATHS)
def test_class_paths(class_path):
    found = survives(lambda: find_class(class_path, "model"), named="class_path")
    assert found is None or (isinstance(found, type) and found.__module__.split(".")[0] in PACKAGES)


@given(
    text=st.text(max_size=30) | st.builds("--model.init_args.{}={}".format, st.text(max_size=5), st.text(max_size=9))
)
def test_overrides(text):
    survives(lambda: parse_override(text))
    survives(lambda: check_keys([text], DIGITS, SECTIONS))


def _at(config, where):
    for key in where.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


@pytest.mark.parametrize("lines", [30, 3000])
def test_anchors_that_stand_for_billions_are_refused(lines, tmp_path):
    text = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, lines))
    path = fresh(tmp_path, text.encode(), ".yaml")
    with pytest.raises(ValueError, match=rf"{path.name}' is no readable YAML"):
        read_config(path)


@pytest.mark.parametrize("text", ["[" * 5000, "{a: " * 5000, "- " * 5000, "a: &a [*a]", "x: 2024-13-40"])
def test_text_that_is_deep_or_wrong_is_one_error(text, tmp_path):
    path = fresh(tmp_path, text.encode(), ".yaml")
    with pytest.raises(ValueError, match=rf"{path.name}' is no readable YAML"):
        read_config(path)
