"""The crop cache: the pixels of the direct path, kept; interrupts, full disks and other contents."""

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import crop_cache
from datamodules.crop_cache import crop_key, open_crop_cache, write_crop_cache
from datamodules.image_rows import ImageRows
from datamodules.rows import RawRow
from datamodules.sampler import RowKey

SIZE = 8
KEY = crop_key("pets", "train", SIZE)


class Photos:
    """A store of 75 JPEG pictures of differing sizes; `broken` has no readable bytes."""

    class_names = None

    def __init__(self, *, captions=False, broken=None):
        self.captions, self.broken, self.fetched = captions, broken, []

    def __len__(self):
        return 75

    def fetch(self, indices):
        self.fetched += indices
        return [self.row(i) for i in indices]

    def row(self, i):
        pixels = np.random.default_rng(i).integers(0, 256, (9 + i % 13, 9 + i % 7, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        data = b"no image" if i == self.broken else buffer.getvalue()
        return RawRow(data, i % 5, f"picture {i}" if self.captions else None, f"row {i}")


def write(folder, *, captions=False, broken=None, on_bad="skip", key=KEY, **options):
    """Shards of 33 rows; returns the rows that were read and the lines said."""
    store, said = Photos(captions=captions, broken=broken), []
    options = {"shard_bytes": 33 * 3 * SIZE * SIZE, "say": said.append} | options
    write_crop_cache(ImageRows(store, SIZE, num_classes=5, on_bad=on_bad), folder, key, **options)
    return store.fetched, said


@pytest.mark.parametrize(("num_workers", "captions"), [(0, True), (2, False)])
def test_the_cache_is_the_direct_path_byte_for_byte(tmp_path, num_workers, captions):
    fetched, said = write(tmp_path, num_workers=num_workers, captions=captions, info={"num_classes": 5})
    assert num_workers or sorted(fetched) == sorted([0, *range(75)])  # row 0 once more, for its size
    assert len(said) == 1 and said[0].startswith("crop cache: 75 of 75 images, ")
    direct = ImageRows(Photos(captions=captions), SIZE, flip=True, seed=2)
    cached = open_crop_cache(tmp_path, KEY, flip=True, seed=2)
    assert len(cached) == 75 and cached.shards.meta["num_classes"] == 5
    keys = [RowKey(3, i) for i in (74, 0, 32, 33, 66, 41, 7)]
    one, other = direct.__getitems__(keys), cached.__getitems__(keys)
    assert torch.equal(one["image"], other["image"]) and torch.equal(one["label"], other["label"])
    assert one.get("caption") == other.get("caption") and ("caption" in one) == captions
    assert torch.equal(cached.shards.gather("index", range(75)), torch.arange(75))
    cached.shards.verify()


def test_an_interrupted_run_goes_on(tmp_path):
    with pytest.raises(ValueError, match="row 40 is no readable image"):
        write(tmp_path, broken=40, on_bad="error")
    with pytest.raises(ValueError, match="is unfinished"):
        open_crop_cache(tmp_path, KEY)
    fetched, said = write(tmp_path)
    assert fetched == [0, *range(33, 75)] and said[0] == "crop cache: 33 of 75 images are there, going on"
    labels = open_crop_cache(tmp_path, KEY).shards.gather("label", range(75))
    assert torch.equal(labels, torch.arange(75) % 5)
    assert write(tmp_path)[0] == [0]  # finished: nothing is read again


def test_what_it_was_made_from_must_agree(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=r"was made with size=8, but 16 is asked for"):
        open_crop_cache(tmp_path, crop_key("pets", "train", 16))
    with pytest.raises(ValueError, match=r"was made with columns.image=None, but 'jpg' is asked for"):
        open_crop_cache(tmp_path, crop_key("pets", "train", SIZE, columns={"image": "jpg"}))
    with pytest.raises(ValueError, match=r"was made with exif=True, but False is asked for"):
        open_crop_cache(tmp_path, crop_key("pets", "train", SIZE, exif=False))
    with pytest.raises(ValueError, match=r"was made with source='pets', but 'cars' is asked for"):
        write(tmp_path, key=crop_key("cars", "train", SIZE))


@pytest.mark.parametrize("option", ["flip", "draw_caption"])
def test_random_rows_are_refused(tmp_path, option):
    with pytest.raises(ValueError, match=f"{option}=True would be cached as one draw"):
        write_crop_cache(ImageRows(Photos(), SIZE, **{option: True}), tmp_path, KEY)


def test_a_full_disk_is_found_before_anything_is_read(tmp_path, monkeypatch):
    needed = 75 * (3 * SIZE * SIZE + 16)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(crop_cache.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(ValueError, match=r"needs 0\.00 GB in '.*', where 0\.00 GB are free: choose another folder"):
        write(tmp_path)
    monkeypatch.setattr(crop_cache.shutil, "disk_usage", lambda _: usage._replace(free=needed))
    write(tmp_path)
    monkeypatch.setattr(crop_cache.shutil, "disk_usage", lambda _: usage._replace(free=0))
    write(tmp_path)  # nothing left to write


def test_writing_draws_nothing_from_the_global_generator(tmp_path):
    before = torch.get_rng_state()
    write(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
