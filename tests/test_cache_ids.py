"""`make cache` of ids: ten crops of every image in uint16, the same bytes after an interrupt, for MAR and for RAR."""

import json
import shutil
from contextlib import chdir

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.decode import decode
from datamodules.images import ImageData
from datamodules.latents import LatentData
from datamodules.shards import Shards
from datamodules.transforms import center_crop, to_uint8_chw
from experiments import cache, plan, recipes, sample
from experiments.load import load_config
from experiments.main import cli
from layers.tokenizers.maskgit_vq import MaskGITVQTokenizer
from lightning_modules.cache_check import check_cache
from tests.smoke import SMOKE, call, tiny
from tests.test_cache import alone, contents, killed

ROWS, SIZE, LARGER, CODES = 11, 20, 22, 48  # LARGER: int(1.1 * SIZE)
ARCH = {"base_channels": 8, "multipliers": [1, 2, 2], "num_res_blocks": 1, "z_channels": 4, "norm_groups": 4}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of small pictures, and two more for validation."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for i in range(ROWS + 2):
        path = folder / ("val" if i >= ROWS else "train") / ("cats" if i % 2 else "dogs") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (24 + i % 3, 27, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of a tiny tokenizer, as a file of the released kind."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "vqgan.bin"
    torch.save(MaskGITVQTokenizer(SIZE, arch=ARCH, num_codes=CODES, frozen=False).vae.state_dict(), path)
    return path


def recipe(photos, weights, root):
    """mar_l_ce, which reads ids, on ten crops of small pictures: its overrides."""
    data, vae = "--data.init_args", f"--{cache.TOKENIZER}"
    arguments = {"image_size": SIZE, "arch": ARCH, "num_codes": CODES, "weights": str(weights)}
    return [
        "--data.class_path=datamodules.latents.LatentData",
        f"{data}.root={root}",
        f"{data}.ten_crop=true",
        f"{data}.images.class_path=datamodules.images.ImageData",
        f"{data}.images.init_args={{source: {photos}, image_size: {SIZE}, num_workers: 0}}",
        f"{vae}.class_path=layers.tokenizers.maskgit_vq.MaskGITVQTokenizer",
        f"{vae}.init_args={json.dumps(arguments)}",
    ]


def line(photos, weights, root, *extra):
    sizes = ["--shard_rows", "4", "--batch_size", "3", "--device", "cpu"]
    return ["--exp", "mar_l_ce", *sizes, *recipe(photos, weights, root), *extra]


def job_of(photos, weights, root, *extra):
    options, overrides = cache.parse(line(photos, weights, root, *extra))
    return cache.make_job(options, overrides), options


@pytest.fixture(scope="module")
def written(photos, weights, tmp_path_factory):
    """The folder that an unbroken run fills: both splits."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("written")
    for split in ("train", "val"):
        call(cache.main, *line(photos, weights, root, "--split", split))
    return root


def official_views(image):
    """PIL picture -> uint8 (10, 3, SIZE, SIZE): the ten crops in the order of torchvision's TenCrop."""
    larger = center_crop(image, LARGER)
    views = []
    for picture in (larger, larger.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
        last, middle = LARGER - SIZE, (LARGER - SIZE) // 2
        for left, top in [(0, 0), (last, 0), (0, last), (last, last), (middle, middle)]:
            views.append(to_uint8_chw(picture.crop((left, top, left + SIZE, top + SIZE))))
    return torch.stack(views)


def test_ids_are_those_of_ten_crops_in_the_official_order(photos, weights, written):
    job, _ = job_of(photos, weights, written)
    shards = Shards(written / "train")
    raw, labels = (shards.gather(name, range(ROWS)) for name in ("raw", "label"))
    assert raw.dtype == torch.uint16 and raw.shape == (ROWS, 10, 25)
    paths = sorted((photos / "train").rglob("*.png"))  # cats, then dogs
    for row, path in enumerate(paths):
        with torch.no_grad():
            expected = job.tokenizer.encode_image(official_views(decode(path.read_bytes(), path.name)))
        assert torch.equal(raw[row].long(), expected), path
    assert labels.tolist() == [int(path.parent.name == "dogs") for path in paths]


def test_meta_and_validation(written):
    train, val = (json.loads((written / split / "meta.json").read_text()) for split in ("train", "val"))
    expected = {"crop": "corners and centre of 22", "crops": 5, "flip": True, "vocab_size": CODES, "size": SIZE}
    expected |= {"encoded": "int64", "dtype": "uint16", "shape": [10, 25], "n": ROWS}
    assert {name: train[name] for name in expected} == expected
    assert (val["crop"], val["flip"], val["shape"], val["n"]) == ("adm", False, [1, 25], 2) and "crops" not in val


def test_the_cache_is_read_by_its_tokenizer_and_no_other(photos, weights, written):
    data = LatentData(str(written), ImageData(str(photos), SIZE), ten_crop=True, batch_size=4, num_workers=0)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["raw"].shape == (4, 25) and batch["raw"].dtype == torch.int64 and data.num_classes == 2
    job, _ = job_of(photos, weights, written)
    check_cache(job, data)
    with torch.no_grad():
        job.tokenizer.vae.quantize.embedding.weight[0] += 1
    with pytest.raises(ValueError, match="sha256 of the weights"):
        check_cache(job, data)


@pytest.mark.parametrize("count", [3, 6])
def test_killed_it_goes_on_to_the_same_bytes(photos, weights, written, tmp_path, count):
    def write_all():
        cache.write_cache(*job_of(photos, weights, tmp_path), alone())

    assert killed(write_all, "replace", count, before=False)
    write_all()
    assert contents(tmp_path / "train") == contents(written / "train")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--data.init_args.ten_crop=false"], "was made with crop='corners and centre of 22', but 'adm' is asked for"),
        (["--data.init_args.images.init_args.flip=false"], "was made with flip=True, but False is asked for"),
        ([f"--{cache.TOKENIZER}.init_args.image_size=24"], "images of 20 pixels do not fit a tokenizer for 24"),
        ([f"--{cache.TOKENIZER}.init_args.num_codes=9"], "does not fit this model"),
    ],
)
def test_mistakes_are_one_line(photos, weights, written, tmp_path, capsys, extra, message):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    with pytest.raises(SystemExit):
        call(cache.main, *line(photos, weights, tmp_path, *extra))
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith("error: ") and message in errors[-1], errors
    assert contents(tmp_path) == contents(written)


def test_a_set_that_has_no_larger_images_is_refused(weights, tmp_path, capsys):
    digits = ["--data.init_args.images={class_path: datamodules.digits.DigitsData, init_args: {image_size: 16}}"]
    digits += [f"--{cache.TOKENIZER}.init_args.image_size=16"]
    with pytest.raises(SystemExit):
        call(cache.main, *line("unused", weights, tmp_path, *digits))
    message = "ten crops are cut from images of 17 pixels, but DigitsData gives 16: set data.init_args.ten_crop=false"
    assert message in capsys.readouterr().err


def test_what_is_stored_of_ids():
    def store(values, vocab_size, dtype=torch.int64):
        return cache.stored(torch.tensor(values, dtype=dtype), torch.float16, vocab_size)

    small, large = store([0, 65535], 65536), store([0, 65536], 65537)
    assert (small.dtype, small.tolist()) == (torch.uint16, [0, 65535])
    assert (large.dtype, large.tolist()) == (torch.int32, [0, 65536])
    assert store([0, 16], 17, torch.uint8).dtype == torch.uint8, "a tokenizer that needs less says so"
    for values, found in (([0, 17], r"0\.\.17"), ([-1, 3], r"-1\.\.3")):
        with pytest.raises(ValueError, match=rf"returns ids in {found}, but its vocabulary is 0\.\.16: its weights"):
            store(values, 17)


def sizes():
    """mar_l_ce, shrunken: all of its own tiny sizes but the tokenizer's."""
    parts = {key: value for key, value in tiny("mar_l_ce").items() if not key.startswith((cache.TOKENIZER, "data."))}
    return [f"{key}={value}" for key, value in parts.items()]


def test_mar_trains_and_draws_with_these_ids(photos, weights, written, tmp_path):
    words = [*recipe(photos, weights, written), *(f"--{size}" for size in sizes())]
    words += [
        "--data.init_args.batch_size=4",
        "--data.init_args.num_workers=0",
        "--model.init_args.num_classes=2",
        "--trainer.max_steps=3",
    ]
    with chdir(tmp_path):
        cli(["fit", "--exp", "mar_l_ce", f"--config={SMOKE}", *words])
        last = recipes.find_checkpoint("mar_l_ce", "last")
        call(sample.main, "--exp", "mar_l_ce", "--ckpt", str(last), "--num", "2", "--labels", "1,0", "--out", "out")
        images = np.load("out/samples.npz")["arr_0"]
    assert images.shape[1:] == (SIZE, SIZE, 3) and images.dtype == np.uint8


@pytest.mark.slow
def test_a_recipe_of_ten_crops_is_planned_from_its_epochs_of_images(weights):
    """An epoch is one crop of every image, not all ten."""
    overrides = [text.removeprefix("--") for text in recipe("ILSVRC/imagenet-1k", weights, "nowhere")]
    figures = plan.make_plan(load_config("mar_l_ce", [*overrides, *sizes()]), gpu="h100", gpus=8, mfu=0.4)
    assert figures["steps"] == 400 * (plan.IMAGENET_ROWS // 2048) and figures["train_flops"] > 0
    assert figures["parameters_frozen"] == sum(
        p.numel() for p in MaskGITVQTokenizer(SIZE, arch=ARCH, num_codes=CODES).parameters()
    )
