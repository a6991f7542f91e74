"""Rows that cannot be used: pictures that a crop would blow up, and sets with too many of them."""

import io

import pytest
from PIL import Image

from datamodules.image_rows import TRIED_ROWS, ImageRows, try_rows
from datamodules.rows import RawRow
from datamodules.sampler import RowKey


class Pictures:
    """A store of one picture for each of `sizes`; None has no readable bytes."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def fetch(self, indices):
        return [RawRow(self.encoded(i), 0, None, f"row {i}") for i in indices]

    def encoded(self, i):
        if self.sizes[i] is None:
            return b"no image"
        buffer = io.BytesIO()
        Image.new("1", self.sizes[i]).save(buffer, "PNG")
        return buffer.getvalue()


@pytest.mark.parametrize("size", [(4000, 1), (1, 16000)])
def test_a_picture_that_the_crop_would_blow_up_is_refused(size):
    rows = ImageRows(Pictures([size, (300, 100)]), 256, on_bad="skip")
    with pytest.warns(
        UserWarning, match=rf"row 0 is {size[0]} x {size[1]}, which a crop of 256 enlarges to .* 89,478,485"
    ):
        assert rows[0]["image"].shape == (1, 3, 256, 256)
    assert list(rows.bad) == [0]


def test_a_long_picture_that_fits_is_read():
    assert ImageRows(Pictures([(1300, 1)]), 256)[0]["image"].shape == (1, 3, 256, 256)


@pytest.mark.filterwarnings("ignore:.*The next row takes its place")
def test_rows_of_which_many_are_bad_are_refused_when_that_shows():
    sizes = [None if i % 8 == 3 else (8, 8) for i in range(200)]  # an eighth
    rows = ImageRows(Pictures(sizes), 8, on_bad="skip", limit_bad=True)
    keys = [RowKey(0, i) for i in range(200)]
    rows.__getitems__(keys[: TRIED_ROWS // 2])
    with pytest.raises(ValueError, match=r"of \d+ rows that were read cannot be used, such as row \d+ is no readable"):
        rows.__getitems__(keys[TRIED_ROWS // 2 :])
    ImageRows(Pictures(sizes), 8, on_bad="skip").__getitems__(keys)
    few = ImageRows(Pictures([None if i % 12 == 3 else (8, 8) for i in range(200)]), 8, on_bad="skip", limit_bad=True)
    few.__getitems__(keys)


def test_rows_that_are_tried():
    rows = ImageRows(Pictures([None, (8, 8), (8, 8), None]), 8, on_bad="skip")
    try_rows(rows, range(3), share=0.5)
    with pytest.raises(ValueError, match="1 of 3 rows that were tried cannot be used, such as row 0"):
        try_rows(rows, range(3))
