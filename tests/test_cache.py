"""`make cache`: what the tokenizer returns, the same bytes after any interrupt and for any number of processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from datamodules.digits import DigitsData
from datamodules.images import ImageData
from datamodules.latents import LatentData
from datamodules.shards import Shards
from experiments import cache
from layers.conv_autoencoder import AutoencoderConfig
from layers.tokenizers.kl_vae import KLVAETokenizer
from lightning_modules.cache_check import check_cache
from lightning_modules.weights import state_sha256
from tests.smoke import call

ROOT = Path(__file__).parents[1]
ROWS, SHARD, BATCH = 38, 9, 4  # five shards, the last one shorter; batches end within shards
ARCH = {"base_channels": 8, "multipliers": (1, 2), "num_res_blocks": 1, "z_channels": 2, "norm_groups": 4}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of small pictures."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for i in range(ROWS):
        path = folder / ("cats" if i % 3 else "dogs") / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (8 + i % 3, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of a tiny autoencoder, as a file."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "vae.safetensors"
    save_file(KLVAETokenizer(8, arch=AutoencoderConfig(**ARCH), frozen=False).vae.state_dict(), path)
    return path


def line(photos, weights, root, *extra):
    """A recipe that trains on latents: its overrides, and small sizes."""
    data, images, vae = "--data.init_args", "--data.init_args.images", f"--{cache.TOKENIZER}"
    arch = ", ".join(f"{name}: {list(value) if isinstance(value, tuple) else value}" for name, value in ARCH.items())
    overrides = [
        "--data.class_path=datamodules.latents.LatentData",
        f"{data}.root={root}",
        f"{images}.class_path=datamodules.images.ImageData",
        f"{images}.init_args={{source: {photos}, image_size: 8, num_workers: 0}}",
        f"{vae}.class_path=layers.tokenizers.kl_vae.KLVAETokenizer",
        f"{vae}.init_args={{image_size: 8, arch: {{{arch}}}, weights: {weights}}}",
    ]
    sizes = ["--shard_rows", str(SHARD), "--batch_size", str(BATCH), "--device", "cpu"]
    return ["--exp", "jit_digits", *sizes, *overrides, *map(str, extra)]


def write(photos, weights, root, *extra):
    call(cache.main, *line(photos, weights, root, *extra))


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def unbroken(photos, weights, tmp_path_factory):
    """What an unbroken run of one process writes."""
    root = tmp_path_factory.mktemp("unbroken")
    write(photos, weights, root)
    return contents(root)


def job_of(photos, weights, root, *extra):
    options, overrides = cache.parse(line(photos, weights, root, *extra))
    return cache.make_job(options, overrides), options


def alone(**changed):
    """Stands in for the process group of one process, or for one process of several that run one after another."""
    facts = {"device": torch.device("cpu"), "global_rank": 0, "world_size": 1, "is_global_zero": True}
    functions = {"barrier": lambda: None, "broadcast": lambda value: value}
    return SimpleNamespace(**facts | functions | changed)


def test_latents_are_what_the_tokenizer_returns(photos, weights, tmp_path):
    write(photos, weights, tmp_path, "--dtype", "float32")
    job, _ = job_of(photos, weights, tmp_path)
    job.images.flip = False
    job.images.setup()
    batch = job.images.train_set.__getitems__([cache.RowKey(0, i) for i in range(ROWS)])
    shards = Shards(tmp_path / "train")
    raw = shards.gather("raw", range(ROWS))
    assert raw.shape == (ROWS, 2, 4, 4, 4) and shards.meta["dtype"] == "float32" and shards.meta["flip"]
    with torch.no_grad():
        torch.testing.assert_close(raw[:, 0], job.tokenizer.encode_image(batch["image"]))
        torch.testing.assert_close(raw[:, 1], job.tokenizer.encode_image(batch["image"].flip(-1)))
    assert (raw[:, 1] - raw[:, 0].flip(-1)).abs().max() > 1e-3, "mirrored latents are something else"
    assert torch.equal(shards.gather("label", range(ROWS)), batch["label"])
    assert torch.equal(shards.gather("index", range(ROWS)), torch.arange(ROWS))


def test_meta_says_what_was_made_of_what(unbroken, photos, weights):
    meta = json.loads(unbroken["train/meta.json"])
    assert set(unbroken) == {"train/meta.json", *(f"train/shard-{i:05d}.safetensors" for i in range(5))}
    expected = {"source": str(photos), "split": "train", "size": 8, "crop": "adm", "n": ROWS, "shard_rows": SHARD}
    expected |= {"flip": True, "encoded": "float32", "dtype": "float16", "shape": [2, 4, 4, 4], "num_classes": 2}
    expected |= {"class_names": ["cats", "dogs"], "encode_batch": BATCH}
    assert {name: meta[name] for name in expected} == expected
    assert meta["tokenizer"]["class_path"] == "layers.tokenizers.kl_vae.KLVAETokenizer"
    assert meta["tokenizer"]["init_args"]["arch"]["z_channels"] == 2
    vae = KLVAETokenizer(8, arch=AutoencoderConfig(**ARCH))
    vae.load_weights(load_file(weights), origin="")
    assert meta["tokenizer"]["sha256"] == state_sha256(vae.state_dict())
    assert [shard["rows"] for shard in meta["shards"]] == [9, 9, 9, 9, 2]


def test_the_cache_trains_its_tokenizer_and_no_other(photos, weights, tmp_path):
    write(photos, weights, tmp_path)
    images = ImageData(str(photos), 8)
    data = LatentData(str(tmp_path), images, batch_size=6, num_workers=0)
    data.setup()
    assert data.num_classes == 2 and next(iter(data.train_dataloader()))["raw"].shape == (6, 4, 4, 4)
    job, _ = job_of(photos, weights, tmp_path)
    check_cache(job, data)
    with torch.no_grad():
        next(job.tokenizer.parameters())[0] += 1
    with pytest.raises(ValueError, match="sha256 of the weights"):
        check_cache(job, data)


def test_pixels_of_another_recipe(tmp_path):
    """Its data are images already: they are cached where OUT says. Digits are not mirrored."""
    with chdir(tmp_path):
        for split in ("train", "val"):
            call(cache.main, "--exp", "jit_digits", "--split", split, "--out", "pixels", "--device", "cpu")
    data = LatentData(str(tmp_path / "pixels"), DigitsData(16), batch_size=10, num_workers=0)
    data.setup()
    data.images.setup()
    for split in ("train", "val"):
        raw = torch.cat([batch["raw"] for batch in data.ordered_loader(split)])
        images = torch.cat([batch["image"] for batch in data.images.ordered_loader(split)])
        assert raw.dtype == torch.uint8 and torch.equal(raw, images)


def killed(write_all, call_name, count, *, before):
    """Runs `write_all` in a process that kills itself at call number `count` of os.<call_name>; whether it came to it.

    Nothing of Python's runs any more then, as with a lost machine or an impatient scheduler.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    original, calls = getattr(os, call_name), 0

    def deadly(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count and before:
            os.kill(os.getpid(), signal.SIGKILL)
        value = original(*args, **kwargs)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    try:
        setattr(os, call_name, deadly)
        write_all()
    finally:
        os._exit(0)


REPLACED = 12  # files of a run: the plan, five shards with their notes, meta.json


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call_name", "before", "first"),
    [
        ("replace", True, 1),
        pytest.param("replace", False, 1, marks=pytest.mark.slow),
        pytest.param("unlink", True, REPLACED + 1, marks=pytest.mark.slow),  # the first unlinks find nothing
    ],
)
def test_killed_anywhere_it_goes_on_to_the_same_bytes(photos, weights, tmp_path, unbroken, call_name, before, first):
    def write_all():
        cache.write_cache(*job_of(photos, weights, tmp_path / "x"), alone())

    count = first
    while killed(write_all, call_name, count, before=before):
        write_all()
        assert contents(tmp_path / "x") == unbroken, f"killed at {call_name} {count}"
        shutil.rmtree(tmp_path / "x")
        count += 1
    assert count - first == (REPLACED if call_name == "replace" else 6), "it was killed at each"


def test_killed_again_and_again_nothing_is_lost(photos, weights, tmp_path, unbroken):
    def write_all():
        cache.write_cache(*job_of(photos, weights, tmp_path), alone())

    for _ in range(5):  # in each: a shard and its note, and the next shard without its note
        assert killed(write_all, "replace", 3, before=False)
    assert len(list(tmp_path.glob("train/shard-*.json"))) >= 4
    write_all()
    assert contents(tmp_path) == unbroken


def test_shards_that_are_there_are_kept_and_damaged_ones_encoded_again(photos, weights, tmp_path, unbroken, capsys):
    write(photos, weights, tmp_path)
    shards = sorted((tmp_path / "train").glob("*.safetensors"))
    data = bytearray(shards[3].read_bytes())
    data[-1] ^= 1
    shards[3].write_bytes(data)
    shards[1].write_bytes(shards[1].read_bytes()[:-5])
    shards[4].unlink()
    kept = [shards[0].stat().st_mtime_ns, shards[2].stat().st_mtime_ns]

    def write_all():
        cache.write_cache(*job_of(photos, weights, tmp_path), alone())

    for count in (1, 4, 6, 8):  # killed while the finished folder is taken apart, and later
        assert killed(write_all, "replace", count, before=False)
    capsys.readouterr()
    write(photos, weights, tmp_path)
    assert contents(tmp_path) == unbroken
    assert [shards[0].stat().st_mtime_ns, shards[2].stat().st_mtime_ns] == kept
    write(photos, weights, tmp_path)
    assert "5 of 5 shards are there and intact" in capsys.readouterr().out


def test_an_error_half_way_loses_the_shard_at_hand_only(photos, weights, tmp_path, unbroken, monkeypatch):
    calls = 0
    encode = cache.encode

    def failing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 6:  # the first is the probe, three make a shard
            raise RuntimeError("out of memory")
        return encode(*args, **kwargs)

    monkeypatch.setattr(cache, "encode", failing)
    with pytest.raises(RuntimeError):
        write(photos, weights, tmp_path)
    assert [path.name for path in sorted((tmp_path / "train").iterdir())] == [
        "shard-00000.json",
        "shard-00000.safetensors",
        "unfinished.json",
    ]
    monkeypatch.setattr(cache, "encode", encode)
    write(photos, weights, tmp_path)
    assert contents(tmp_path) == unbroken


@pytest.mark.parametrize("world", [2, 3, 7])
def test_processes_write_whole_shards_of_the_same_bytes(photos, weights, tmp_path, unbroken, world):
    for rank in reversed(range(world)):  # one after another; the first finishes
        job, options = job_of(photos, weights, tmp_path)
        share = {"global_rank": rank, "world_size": world, "is_global_zero": rank == 0}
        cache.write_cache(job, options, alone(**share, broadcast=lambda _: list(range(5))))
    assert contents(tmp_path) == unbroken


def test_threads_change_no_byte(photos, weights, tmp_path, unbroken):
    torch.set_num_threads(2)
    write(photos, weights, tmp_path)
    assert torch.get_num_threads() == 1, "for the bits of larger networks depend on it"
    assert contents(tmp_path) == unbroken


def start(photos, weights, root, *extra):
    words = [sys.executable, "-m", "experiments.cache", *line(photos, weights, root, *extra)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(photos, weights, tmp_path, unbroken):
    process = start(photos, weights, tmp_path, "--devices", 2)
    assert process.wait(timeout=240) == 0, process.stderr.read()[-3000:]
    assert contents(tmp_path) == unbroken


@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(photos, weights, tmp_path):
    """Of the whole program, with decoding workers and shards of two images."""
    small = ["--shard_rows", 2, "--batch_size", 1]
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    assert start(photos, weights, tmp_path / "one", *small).wait(timeout=240) == 0
    generator, found = random.Random(0), []
    for _ in range(4):
        process = start(photos, weights, tmp_path / "other", *small)
        before = len(list(tmp_path.glob("other/train/shard-*.safetensors")))
        while process.poll() is None and len(list(tmp_path.glob("other/train/shard-*.safetensors"))) == before:
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.05))
        process.kill()
        process.wait()
        found.append(len(list(tmp_path.glob("other/train/shard-*.safetensors"))))
    assert 0 < found[0] < 19, "it was killed while it wrote"
    assert start(photos, weights, tmp_path / "other", *small).wait(timeout=240) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--batch_size", 5], "was made with encode_batch=4, but 5 is asked for"),
        (["--shard_rows", 8], "was made with shard_rows=9, but 8 is asked for"),
        (["--dtype", "float32"], "was made with dtype='float16', but 'float32' is asked for"),
        (["--data.init_args.images.init_args.exif=false"], "was made with arguments.exif=True, but False is asked for"),
        (["--data.init_args.images.init_args.flip=false"], "was made with flip=True, but False is asked for"),
        (["--model.init_args.optim.lr=1"], "'--model.init_args.optim.lr=1' changes nothing here"),
        (["--trainer.devices=2"], "'--trainer.devices=2' changes nothing here"),
        (["--data.init_args.images.init_args.image_size=16"], "images of 16 pixels do not fit a tokenizer for 8"),
        ([f"--{cache.TOKENIZER}.init_args.frozen=false"], "KLVAETokenizer is trained along with the model"),
        ([f"--{cache.TOKENIZER}.init_args.weights=null"], "is frozen and has no weights yet"),
        (["--data.init_args.images.init_args.streaming=true"], "a stream has no rows to share"),
        (["--split", "val"], "has no validation split"),
        (["--shard_rows", 0], "--shard_rows is 0: give 1 or more"),
        (["--data.init_args.images=null"], "images is missing"),
    ],
)
def test_mistakes_are_one_line(photos, weights, unbroken, tmp_path, capsys, extra, message):
    for name, data in unbroken.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with pytest.raises(SystemExit):
        write(photos, weights, tmp_path, *extra)
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith("error: ") and message in errors[-1], errors
    assert contents(tmp_path) == unbroken


def test_images_without_a_folder(capsys):
    with pytest.raises(SystemExit):
        call(cache.main, "--exp", "jit_digits")
    assert "jit_digits reads images, not latents: say with OUT=" in capsys.readouterr().err


def test_random_images_are_refused():

    class Random:
        def __len__(self):
            return 3

        def __getitems__(self, keys):
            return {"image": torch.tensor([[key.epoch * key.index] for key in keys])}

    with pytest.raises(ValueError, match=r"are drawn anew in each epoch, so a cache would keep one draw"):
        cache.check_fixed(Random())


def test_a_full_disk_is_found_before_anything_is_encoded(photos, weights, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    needed = ROWS * (2 * 4 * 4 * 4 * 2 + 16)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(ValueError, match=r"the latents need 0\.00 GB in '.*train', where 0\.00 GB are free"):
        cache.write_cache(*job_of(photos, weights, tmp_path), alone())
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=needed))
    cache.write_cache(*job_of(photos, weights, tmp_path), alone())


def test_what_is_stored():
    ids = torch.tensor([[0, 16383], [70000, 2**31 - 1]])
    found = cache.stored(ids, torch.float16)
    assert found.dtype == torch.int32 and torch.equal(found.long(), ids)
    floats = torch.tensor([1.0, -2.5, 1e-4])
    assert torch.equal(cache.stored(floats, torch.float16), floats.half())
    assert torch.equal(cache.stored(floats, torch.float32), floats)
    assert cache.stored(torch.zeros(2, dtype=torch.uint8), torch.float16).dtype == torch.uint8
    with pytest.raises(ValueError, match="ids up to 2147483648, beyond int32"):
        cache.stored(torch.tensor([2**31]), torch.float16)
    with pytest.raises(ValueError, match=r"values up to 1e\+05 do not fit torch.float16: give ARGS='--dtype float32'"):
        cache.stored(torch.tensor([1e5]), torch.float16)
    with pytest.raises(ValueError, match="values that are not finite: its weights are damaged"):
        cache.stored(torch.tensor([1.0, float("nan")]), torch.float32)
    with pytest.raises(ValueError, match=r"returns torch.bfloat16, which a cache cannot hold"):
        cache.stored(floats.bfloat16(), torch.float16)
