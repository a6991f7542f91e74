"""Photo patches: which photos, where crops come from, what is random about them."""

import pytest
import torch

from datamodules import photo_patches
from datamodules.photo_patches import PHOTOS, PatchRows, PhotoPatchesData, load_photo, split_columns
from datamodules.sampler import RowKey, coin


def ready(*args, **options):
    data = PhotoPatchesData(*args, **options)
    data.setup("fit")
    return data


def rows(dataset, indices, *, epoch=0):
    return dataset.__getitems__([RowKey(epoch, index) for index in indices])


@pytest.fixture(scope="module")
def data():
    return ready(32, 8, length=300, val_length=60)


def places(size=8, **options):
    """Rows over two photos whose red and green hold the row and column of each pixel, blue the photo."""
    photos = []
    for number, (height, width) in enumerate([(20, 30), (9, 12)]):
        grid = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        photos.append(torch.stack([*grid, torch.full((height, width), number)]).to(torch.uint8))
    return PatchRows(photos, size, 4000, seed=0, **options)


def test_photos_are_read_as_rgb_with_their_own_pixels(data):
    assert data.num_classes == 15 == len(set(data.class_names)) and data.class_names[5] == "china"
    photo = load_photo("astronaut")
    assert photo.shape == (3, 512, 512) and photo.dtype == torch.uint8
    assert torch.equal(photo.permute(1, 2, 0), torch.from_numpy(pytest.importorskip("skimage.data").astronaut().copy()))
    grey = load_photo("coins")
    assert grey.shape == (3, 303, 384) and torch.equal(grey[0], grey[2])


def test_parts_of_a_photo_share_no_column():
    photo = torch.arange(100).expand(3, 7, 100)
    train, val = split_columns(photo, 16)
    assert train[0, 0].tolist() == list(range(80)) and val[0, 0].tolist() == list(range(80, 100))
    train, val = split_columns(photo, 32)  # 20 columns would hold no patch
    assert train[0, 0].tolist() == list(range(68)) and val[0, 0].tolist() == list(range(68, 100))


@pytest.mark.parametrize("size", [32, 128])
def test_every_photo_gives_patches_of_both_kinds(size):
    small = ready(size, 8, length=30, val_length=15)
    for dataset in (small.train_set, small.val_set):
        batch = rows(dataset, range(15))
        assert batch["image"].shape == (15, 3, size, size) and batch["image"].dtype == torch.uint8
        assert batch["label"].tolist() == list(range(15)) and batch["label"].dtype == torch.int64
        assert [photo.shape[0] for photo in dataset.photos] == [3] * 15
    widths = [(a.shape[2], b.shape[2]) for a, b in zip(small.train_set.photos, small.val_set.photos, strict=True)]
    assert [sum(pair) for pair in widths] == [load_photo(name).shape[2] for name in PHOTOS]
    assert all(left >= 2 * size and right >= size for left, right in widths)


def test_patches_are_crops_at_every_place():
    dataset = places()
    batch = rows(dataset, range(4000))
    corners = batch["image"][:, :, 0, 0].int()  # (N, 3): row, column, photo
    offsets = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"))  # (2, 8, 8)
    assert torch.equal(batch["image"][:, :2].int(), corners[:, :2, None, None] + offsets)
    assert torch.equal(corners[:, 2].long(), batch["label"]) and batch["label"].tolist() == [0, 1] * 2000
    for number, (height, width) in enumerate([(20, 30), (9, 12)]):
        tops, lefts, _ = corners[corners[:, 2] == number].T
        assert sorted(set(tops.tolist())) == list(range(height - 7))
        assert sorted(set(lefts.tolist())) == list(range(width - 7))
    assert abs(torch.corrcoef(corners[::2, :2].float().T)[0, 1]) < 0.1


def test_training_patches_are_new_in_each_epoch_and_validation_is_fixed(data):
    again, other = ready(32, 8, length=300, val_length=60), ready(32, 8, length=300, val_length=60, seed=1)
    many = range(60)
    first = rows(data.train_set, many)["image"]
    assert torch.equal(first, rows(again.train_set, many)["image"])
    assert not torch.equal(first, rows(data.train_set, many, epoch=1)["image"])
    assert not torch.equal(first, rows(other.train_set, many)["image"])
    val = rows(data.val_set, many)["image"]
    assert torch.equal(val, rows(data.val_set, many, epoch=3)["image"])
    assert not torch.equal(val, rows(other.val_set, many)["image"])


def test_flip_mirrors_the_rows_of_the_coin():
    plain, flipped = places(redraw=True), places(redraw=True, flip=True)
    keys = [RowKey(2, index) for index in range(200)]
    a, b = plain.__getitems__(keys)["image"], flipped.__getitems__(keys)["image"]
    mirrored = torch.tensor([coin(0, key) for key in keys])
    assert 60 < mirrored.sum() < 140
    assert torch.equal(torch.where(mirrored[:, None, None, None], a.flip(-1), a), b)
    assert ready(32, 8, length=8, flip=False).train_set.flip is False


def test_one_class_for_unconditional_models(data):
    single = ready(32, 8, length=300, val_length=60, label_by="none")
    assert single.num_classes == 1 and single.class_names == ["photo"]
    batch = rows(single.train_set, range(20))
    assert batch["label"].tolist() == [0] * 20 and batch["label"].dtype == torch.int64
    assert torch.equal(batch["image"], rows(data.train_set, range(20))["image"])


def test_loaders(data):
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (8, 3, 32, 32) and len(data.train_dataloader()) == 300 // 8
    assert torch.cat([batch["label"] for batch in data.val_dataloader()]).bincount().tolist() == [4] * 15


def test_errors_name_the_value_and_the_cure(monkeypatch):
    with pytest.raises(ValueError, match=r"image_size=129 leaves too little .* use at most 128"):
        PhotoPatchesData(129)
    with pytest.raises(ValueError, match="val_length=0 must be at least 1"):
        PhotoPatchesData(val_length=0)
    with pytest.raises(ValueError, match="label_by='photo' is unknown: use 'image'"):
        PhotoPatchesData(label_by="photo")
    monkeypatch.setitem(PHOTOS, "brick", ("skimage/data", "absent.png"))
    with pytest.raises(ValueError, match=r"skimage/data/absent.png, which is not installed: pip install '\.\[data\]'"):
        load_photo("brick")
    monkeypatch.setattr(photo_patches, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=r"sklearn/datasets/images/china.jpg, which is not installed"):
        load_photo("china")
