"""`make sample TEXT=` and `make caption`: a run of captions, shrunken, through the real command lines; and mistakes."""

import json
from contextlib import chdir

import numpy as np
import pytest
from PIL import Image

from experiments import caption, sample
from tests.smoke import call, train

RUN = ("--exp", "jetformer_shapes", "--ckpt", "last")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a run, an image that is no square, and a folder of images."""
    folder = tmp_path_factory.mktemp("captions")
    with chdir(folder):
        train("jetformer_shapes", "--trainer.max_steps=1")
    Image.new("RGB", (20, 11), "red").save(folder / "apple.png")
    (folder / "many").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (90 * i, 0, 0)).save(folder / "many" / f"{i}.png")
    (folder / "many" / "notes.txt").write_text("no image")
    return folder


def printed(run, capsys, entry, *line) -> str:
    with chdir(run):
        capsys.readouterr()
        call(entry, *RUN, *line)
        return capsys.readouterr().out


def refused(run, capsys, entry, *line) -> str:
    with chdir(run), pytest.raises(SystemExit):
        call(entry, *line)
    return capsys.readouterr().err


def test_texts_of_the_line_are_drawn_in_turn(run, capsys):
    printed(run, capsys, sample.main, "--text", "a red ring| a: b, c", "--num", "3", "--out", "out")
    settings = json.loads((run / "out" / "settings.json").read_text())
    assert settings["sampling"]["prompts"] == ["a red ring", "a: b, c"]
    assert np.load(run / "out" / "samples.npz")["labels"].tolist() == [0, 1, 0]


def test_an_image_of_any_size_gets_a_caption(run, capsys):
    (line,) = printed(run, capsys, caption.main, "--image", "apple.png").splitlines()
    assert line.startswith("apple.png: ")


def test_a_folder_is_captioned_by_name_whatever_the_batch(run, capsys):
    line = ("--image", "many", "--temperature", "1", "--batch_size")
    lines = printed(run, capsys, caption.main, *line, "2")
    assert [text.partition(":")[0] for text in lines.splitlines()] == ["0.png", "1.png", "2.png"]
    assert lines == printed(run, capsys, caption.main, *line, "3")


def test_given_texts_are_ranked(run, capsys):
    (line,) = printed(run, capsys, caption.main, "--image", "apple.png", "--text", "ring|blue square").splitlines()
    shares = dict(part.rsplit(" ", 1) for part in line.removeprefix("apple.png: ").split(", "))
    assert set(shares) == {"ring", "blue square"} and sum(map(float, shares.values())) == pytest.approx(1, abs=0.002)
    assert list(map(float, shares.values())) == sorted(map(float, shares.values()), reverse=True)


def test_mistakes_are_one_line_each(run, capsys):
    sampled = ("--ckpt", "last", "--text", "a ring")
    assert "JiTModule draws classes: give LABELS=" in refused(run, capsys, sample.main, "--exp", "jit_digits", *sampled)
    image = ("--image", "apple.png")
    line = ("--exp", "jit_digits", "--ckpt", "last", *image)
    assert "JiTModule has no captions" in refused(run, capsys, caption.main, *line)
    assert "no image at 'pear.png' (IMAGE=)" in refused(run, capsys, caption.main, *RUN, "--image", "pear.png")
    (run / "broken.png").write_bytes(b"no image")
    assert "'broken.png'" in refused(run, capsys, caption.main, *RUN, "--image", "broken.png")
    line = (*RUN, *image, "--temperature", "-1")
    assert "temperature is -1.0" in refused(run, capsys, caption.main, *line)
