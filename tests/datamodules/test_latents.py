"""Cached latents: the right rows and mirror images in the right order; validation; every other cache is refused."""

import json

import numpy as np
import pytest
import torch

from datamodules.digits import DigitsData
from datamodules.images import ImageData
from datamodules.latents import CENTRE, LatentData, LatentRows, drawn_view, latent_key
from datamodules.sampler import RowKey, coin
from datamodules.shapes import ShapesData
from datamodules.shards import Shards, ShardWriter

ROWS, SHARD, SHAPE = 23, 5, (4, 2, 2)
TOKENIZER = {"class_path": "layers.tokenizers.pixels.PixelTokenizer", "init_args": {}, "sha256": "ab" * 32}


def images(**options):
    """ImageNet of 16 pixels, which nothing opens."""
    return ImageData("ILSVRC/imagenet-1k", **{"image_size": 16} | options)


def latents(rows, *, sides=2):
    """Row i holds i, and -i where it is mirrored: float16 (n, sides, *SHAPE)."""
    values = torch.arange(rows).view(-1, 1) * torch.tensor([1, -1])[:sides]
    return values.view(rows, sides, 1, 1, 1).expand(-1, -1, *SHAPE).half()


def write(root, split="train", *, rows=ROWS, sides=2, finish=True, encoded="float32", raw=None, **meta):
    given = latent_key(meta.pop("images", images()), split) | {"num_classes": 7, "class_names": None}
    given |= {"tokenizer": TOKENIZER, "flip": sides == 2, "encoded": encoded} | meta
    writer = ShardWriter(root / split, meta=given, rows=rows, shard_rows=SHARD)
    raw = latents(rows, sides=sides) if raw is None else raw
    for number in writer.numbers():
        covered = writer.rows_of(number)
        label = torch.arange(covered.start, covered.stop) % 7
        writer.write(number, {"raw": raw[covered.start : covered.stop], "label": label})
    if finish:
        writer.finish()


def opened(root, given=None, **options):
    data = LatentData(str(root), given or images(), **{"batch_size": 4, "num_workers": 0} | options)
    data.prepare_data()
    data.setup()
    return data


def row_numbers(batch):
    return batch["raw"][:, 0, 0, 0].abs().int().tolist()


def test_rows_are_those_of_the_coin(tmp_path):
    write(tmp_path)
    rows = opened(tmp_path, seed=3).train_set
    for epoch in range(3):
        keys = [RowKey(epoch, i) for i in (22, 1, 7, 13, 4, 5, 18, 7)]
        batch = rows.__getitems__(keys)
        assert set(batch) == {"raw", "label"} and batch["label"].dtype == torch.int64
        assert batch["raw"].dtype == torch.float32 and batch["raw"].shape == (8, *SHAPE)
        mirrored = [coin(3, key) for key in keys]
        assert len(set(mirrored)) == 2
        expected = [-key.index if flip else key.index for key, flip in zip(keys, mirrored, strict=True)]
        assert torch.equal(batch["raw"], torch.tensor(expected).view(-1, 1, 1, 1).expand(-1, *SHAPE).float())
        assert batch["label"].tolist() == [key.index % 7 for key in keys]


@pytest.mark.parametrize(
    ("stored", "encoded"),
    [(torch.int32, "int64"), (torch.uint16, "int64"), (torch.uint8, "uint8"), (torch.float32, "float32")],
)
def test_rows_have_the_type_that_the_tokenizer_returned(tmp_path, stored, encoded):
    raw = torch.arange(ROWS * 2 * 3).view(ROWS, 2, 3).to(stored)
    write(tmp_path, raw=raw, encoded=encoded)
    rows = LatentRows(Shards(tmp_path / "train"))
    found = rows.__getitems__([RowKey(0, 20), RowKey(0, 3)])["raw"]
    assert found.dtype == getattr(torch, encoded) and torch.equal(found, raw[[20, 3], 0].to(found.dtype))


def ids(rows, views):
    """Row i holds i, view v of it also v: uint16 (n, views, 2)."""
    first, second = torch.arange(rows).view(-1, 1).expand(-1, views), torch.arange(views).expand(rows, -1)
    return torch.stack([first, second], dim=-1).to(torch.uint16)


def write_ten(root, *, views=10, raw=None, vocab_size=ROWS, given=None):
    given = given or images()
    key = {"crop": latent_key(given, "train", ten_crop=True)["crop"], "crops": 5, "vocab_size": vocab_size}
    raw = ids(ROWS, views) if raw is None else raw
    write(root, raw=raw, encoded="int64", images=given, flip=views == 10, **key)


@pytest.mark.parametrize(("flip", "views"), [(True, 10), (False, 5)])
def test_every_crop_is_read_once_in_ten_epochs(tmp_path, flip, views):
    """Of images that are not mirrored, every one of the five once in five epochs."""
    write_ten(tmp_path)
    rows = opened(tmp_path, images(flip=flip), ten_crop=True, seed=3).train_set
    keys = [22, 1, 7, 13]
    seen = []
    for epoch in range(3 * views):
        batch = rows.__getitems__([RowKey(epoch, i) for i in keys])
        assert batch["raw"].dtype == torch.int64 and batch["raw"][:, 0].tolist() == keys
        assert batch["label"].tolist() == [i % 7 for i in keys]
        seen.append(batch["raw"][:, 1])
    orders = torch.stack(seen).view(3, views, len(keys)).permute(0, 2, 1)  # (round, row, view)
    assert torch.equal(orders.sort().values, torch.arange(views).expand_as(orders))
    assert len({tuple(order) for order in orders.flatten(0, 1).tolist()}) >= 10, "each row and round has its own"


def test_crops_are_drawn_evenly():
    counts = np.bincount([drawn_view(0, RowKey(2, row), 10) for row in range(20_000)], minlength=10)
    assert abs(counts / 2000 - 1).max() < 0.08  # four standard deviations of a fair draw


def test_a_run_on_ten_crops_goes_on_within_an_epoch_with_any_number_of_processes(tmp_path):
    write_ten(tmp_path)
    loader = opened(tmp_path, ten_crop=True).train_dataloader()
    unbroken = [batch["raw"] for _ in range(2) for batch in loader]
    first = opened(tmp_path, ten_crop=True, num_workers=2).train_dataloader()
    part = iter(first)
    started = [next(part)["raw"] for _ in range(3)]
    resumed = opened(tmp_path, ten_crop=True).train_dataloader()
    resumed.load_state_dict(first.state_dict())
    found = [*started, *(batch["raw"] for _ in range(2) for batch in resumed)]
    assert all(torch.equal(a, b) for a, b in zip(found, unbroken, strict=True))
    data = opened(tmp_path, ten_crop=True)
    ranks = [[*data._sampler(data.train_set, shuffle=True, rank=rank, world_size=2)] for rank in range(2)]
    together = [key for pair in zip(*ranks, strict=True) for key in pair]
    assert torch.equal(data.train_set.__getitems__(together)["raw"], torch.cat(unbroken[:5]))


def test_held_out_rows_of_ten_crops_are_the_centre(tmp_path):
    write_ten(tmp_path)
    data = opened(tmp_path, ten_crop=True, val_length=6)
    for epoch in range(4):
        assert (data.val_set.__getitems__([RowKey(epoch, i) for i in range(6)])["raw"][:, 1] == CENTRE).all()


def test_ten_crops_and_centres_are_not_taken_for_each_other(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=r"made with crop='adm', but 'corners and centre of 17' is asked for"):
        opened(tmp_path, ten_crop=True)
    write_ten(tmp_path / "ten")
    with pytest.raises(ValueError, match=r"made with crop='corners and centre of 17', but 'adm' is asked for"):
        opened(tmp_path / "ten")


def test_validation_beside_ten_crops_is_plain(tmp_path):
    write_ten(tmp_path)
    write(tmp_path, "val", raw=ids(6, 1), rows=6, encoded="int64", flip=False, vocab_size=ROWS)
    data = opened(tmp_path, ten_crop=True)
    assert [n for batch in data.val_dataloader() for n in batch["raw"][:, 0].tolist()] == list(range(6))


@pytest.mark.parametrize(("vocab_size", "found"), [(ROWS - 1, ROWS - 1), (ROWS - 3, ROWS - 2)])
def test_an_id_outside_of_the_vocabulary_is_an_error_that_names_it(tmp_path, vocab_size, found):
    write_ten(tmp_path, vocab_size=vocab_size)
    rows = opened(tmp_path, ten_crop=True).train_set
    assert rows.__getitems__([RowKey(0, 3)])["raw"][0, 0] == 3
    keys = [RowKey(0, i) for i in (4, found, 5)]
    with pytest.raises(
        ValueError, match=rf"train' holds the id {found} in row {found}, .* 0\.\.{vocab_size - 1}: delete"
    ):
        rows.__getitems__(keys)


def test_a_negative_id_is_an_error(tmp_path):
    raw = ids(ROWS, 10).int()
    raw[7] = -1
    write_ten(tmp_path, raw=raw)
    with pytest.raises(ValueError, match=r"holds the id -1 in row 7"):
        opened(tmp_path, ten_crop=True).train_set.__getitems__([RowKey(0, 7)])


def test_images_that_are_not_mirrored_leave_the_mirror_images_unread(tmp_path):
    write(tmp_path)
    rows = opened(tmp_path, images(flip=False)).train_set
    batch = rows.__getitems__([RowKey(epoch, 5) for epoch in range(20)])
    assert (batch["raw"] == 5).all()
    write(tmp_path / "digits", images=DigitsData(16), sides=1)
    assert (opened(tmp_path / "digits", DigitsData(16)).train_set[5]["raw"] == 5).all()


def test_a_run_goes_on_within_an_epoch(tmp_path):
    write(tmp_path)
    loader = opened(tmp_path).train_dataloader()
    batches = [batch["raw"] for _ in range(2) for batch in loader]
    assert len(batches) == 10 and sorted(map(int, torch.cat(batches[:5])[:, 0, 0, 0].abs())) != list(range(20))
    broken = opened(tmp_path).train_dataloader()
    first = iter(broken)
    for _ in range(3):
        next(first)
    resumed = opened(tmp_path).train_dataloader()
    resumed.load_state_dict(broken.state_dict())
    rest = [batch["raw"] for _ in range(2) for batch in resumed]
    assert len(rest) == 7 and all(torch.equal(a, b) for a, b in zip(rest, batches[3:], strict=True))


def test_processes_and_workers_share_the_rows(tmp_path):
    write(tmp_path)
    data = opened(tmp_path, num_workers=2)
    seen = []
    for rank in range(3):
        data.batch_size = 6
        seen += [n for b in data.ordered_loader("train", rank=rank, world_size=3) for n in row_numbers(b)]
    assert sorted(seen) == list(range(ROWS))


def test_validation_reads_its_own_folder(tmp_path, caplog):
    write(tmp_path)
    assert opened(tmp_path).val_dataloader() == [] and "has no split 'val'" in caplog.text
    write(tmp_path, "val", rows=6, sides=1)
    data = opened(tmp_path)
    assert data.split_length("train") == ROWS and data.split_length("val") == 6
    assert [n for batch in data.val_dataloader() for n in row_numbers(batch)] == list(range(6))
    assert opened(tmp_path, val_length=0).val_set is None


def test_validation_holds_out_rows_unmirrored(tmp_path):
    write(tmp_path)
    data = opened(tmp_path, val_length=6)
    val = [value for batch in data.val_dataloader() for value in batch["raw"][:, 0, 0, 0].int().tolist()]
    train = [n for batch in data.ordered_loader("train") for n in row_numbers(batch)]
    assert len(val) == 6 and sorted(val + train) == list(range(ROWS)) and val == sorted(val)
    other = opened(tmp_path, val_length=6, seed=5)
    assert np.array_equal(other.val_set.rows, data.val_set.rows), "runs of other seeds compare"
    key = RowKey(2, 4)
    row = train[4]
    value = data.train_set.__getitems__([key])["raw"][0, 0, 0, 0]
    assert value == (-row if coin(0, RowKey(2, row)) else row), "mirrored as without validation"


def test_what_is_known_of_the_images(tmp_path):
    data = LatentData(str(tmp_path), images())
    assert data.image_size == 16 and data.num_classes is None and data.score_samples is None
    write(tmp_path)
    assert data.discover_classes() == 7
    data.setup()
    assert data.num_classes == 7 and data.tokenizer_checksum == TOKENIZER["sha256"]
    assert data.tokenizer_class == TOKENIZER["class_path"]
    assert LatentData(str(tmp_path), images(num_classes=9)).discover_classes() == 9
    shapes = ShapesData(32)
    data = LatentData(str(tmp_path / "none"), shapes)
    assert data.score_samples == shapes.score_samples and data.discover_classes() == 64
    assert data.class_names == shapes.class_names and data.images is shapes


def test_how_images_are_read_is_no_part_of_the_key():
    same = images(num_workers=3, batch_size=7, flip=False, num_classes=1000, cache_dir="x", val_split=None)
    assert latent_key(same, "train") == latent_key(images(), "train")
    assert latent_key(same, "val") != latent_key(images(), "val"), "here the split of the source matters"
    assert latent_key(images(), "train")["crop"] == "adm"
    for other in (images(exif=False), images(limit_n=9), images(columns={"image": "jpg"}), images(split="test")):
        assert latent_key(other, "train") != latent_key(images(), "train")
    assert latent_key(ShapesData(32), "train") != latent_key(ShapesData(32, label_by="shape"), "train")
    ten = latent_key(images(), "train", ten_crop=True)
    assert ten == latent_key(images(), "train") | {"crop": "corners and centre of 17"}
    assert latent_key(images(), "val", ten_crop=True) == latent_key(images(), "val"), "only training is cropped"
    json.dumps(latent_key(images(columns={"image": "jpg"}), "val"))


def test_without_images_or_with_a_negative_length():
    with pytest.raises(ValueError, match=r"images is missing: name the data module whose images are cached"):
        LatentData("latents")
    with pytest.raises(ValueError, match=r"val_length=-1 must be 0"):
        LatentData("latents", images(), val_length=-1)


def test_a_missing_or_unfinished_cache_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train' do not exist: make cache EXP=\.\.\. SPLIT=train writes them"):
        opened(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train' do not exist"):
        LatentData(str(tmp_path), images()).tokenizer_checksum  # noqa: B018
    write(tmp_path, finish=False)
    with pytest.raises(FileNotFoundError, match=r"train' are unfinished: make cache EXP=\.\.\. SPLIT=train"):
        opened(tmp_path)
    write(tmp_path)
    write(tmp_path, "val", finish=False)
    with pytest.raises(FileNotFoundError, match=r"val' are unfinished: make cache EXP=\.\.\. SPLIT=val"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 32}, r"was made with size=16, but 32 is asked for: use another folder"),
        ({"exif": False}, r"was made with arguments.exif=True, but False is asked for"),
        ({"limit_n": 10}, r"was made with arguments.limit_n=None, but 10 is asked for"),
    ],
)
def test_a_cache_of_other_images_is_refused(tmp_path, options, message):
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, images(**options))


def test_a_cache_of_another_source_or_crop_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=r"made with source='ILSVRC/imagenet-1k', but 'cats' is asked for"):
        opened(tmp_path, ImageData("cats", 16))
    write(tmp_path / "crop", crop="random")
    with pytest.raises(ValueError, match=r"made with crop='random', but 'adm' is asked for"):
        opened(tmp_path / "crop")


def test_other_folders_of_shards_are_refused(tmp_path):
    writer = ShardWriter(tmp_path / "train", meta={}, rows=2, shard_rows=2)
    writer.write(0, {"image": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)})
    writer.finish()
    with pytest.raises(ValueError, match=r"holds \['image'\], but no latents: set another data.init_args.root"):
        opened(tmp_path)
    write(tmp_path / "plain", sides=1)
    with pytest.raises(ValueError, match=r"has no mirror images, but the images are mirrored .*flip=false"):
        opened(tmp_path / "plain")


def test_validation_by_another_tokenizer_is_refused(tmp_path):
    write(tmp_path)
    write(tmp_path, "val", tokenizer=TOKENIZER | {"sha256": "cd" * 32})
    with pytest.raises(ValueError, match=r"is by another tokenizer than '.*train': delete one"):
        opened(tmp_path)


def test_holding_out_everything_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=rf"val_length={ROWS} holds out all of the {ROWS} rows"):
        opened(tmp_path, val_length=ROWS)


def test_a_shard_cut_short_is_named_at_the_start(tmp_path):
    write(tmp_path)
    path = tmp_path / "train" / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"shard-00002.safetensors' has \d+ bytes instead of \d+: delete the folder"):
        opened(tmp_path)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_changed_byte_is_found_by_verify(tmp_path, split):
    write(tmp_path)
    write(tmp_path, "val")
    path = tmp_path / split / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    opened(tmp_path)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors' is damaged \(sha256\)"):
        opened(tmp_path, verify=True)
