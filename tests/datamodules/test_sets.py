"""Digits, synthetic rows, and what every data module shares."""

from types import SimpleNamespace

import pytest
import torch
from sklearn.datasets import load_digits

from datamodules.base import LimitedRows
from datamodules.digits import DigitsData
from datamodules.sampler import RowKey
from datamodules.synthetic import SyntheticData


def ready(data):
    data.setup("fit")
    return data


def fake_trainer(**changes):
    """The attributes of a Trainer that data modules read."""
    values = {
        "world_size": 1,
        "global_rank": 0,
        "accumulate_grad_batches": 1,
        "limit_train_batches": 1.0,
        "overfit_batches": 0.0,
        "strategy": SimpleNamespace(root_device=torch.device("cpu")),
    }
    return SimpleNamespace(**values | changes)


def test_digits_rows_are_the_stored_ones():
    data = DigitsData(32, 16)
    assert data.num_classes == 10 and data.class_names[7] == "seven"  # readable before setup
    ready(data)
    assert (len(data.train_set), len(data.val_set)) == (1438, 359)
    digits = load_digits()
    row = data.val_set[2]  # index 4 + 2 * 5 of the whole set
    assert row["image"].shape == (1, 3, 32, 32) and row["image"].dtype == torch.uint8
    assert row["label"].tolist() == [digits.target[14]] and row["label"].dtype == torch.int64
    grey = torch.tensor([[round(v * 255 / 16) for v in line] for line in digits.images[14].tolist()])
    for channel in row["image"][0]:
        assert all(torch.equal(channel[y::4, x::4], grey.to(torch.uint8)) for y in range(4) for x in range(4))


def test_digits_batches_carry_captions_and_sizes_are_checked():
    batch = next(iter(ready(DigitsData(8, 64)).train_dataloader()))
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert batch["image"].shape == (64, 3, 8, 8)
    assert batch["caption"] == [f"the digit {names[label]}" for label in batch["label"]]
    with pytest.raises(ValueError, match="image_size=20 is no multiple of 8"):
        DigitsData(20)


def test_synthetic_row_depends_on_seed_and_index_only():
    small, large = ready(SyntheticData(8, 4, length=6)), ready(SyntheticData(8, 2, length=20, val_length=3))
    other = ready(SyntheticData(8, 4, length=6, seed=1))
    assert torch.equal(small.train_set.images, large.train_set.images[:6])
    assert torch.equal(small.val_set.images[0], large.train_set.images[6])
    assert not torch.equal(small.train_set.images[0], other.train_set.images[0])
    assert (len(large.train_set), len(large.val_set)) == (20, 3)


def test_synthetic_classes_can_be_told_apart():
    rows = ready(SyntheticData(16, 4, num_classes=4, length=40)).train_set
    means = rows.images.float().mean((2, 3))
    centres = torch.stack([means[rows.labels == c].mean(0) for c in range(4)])
    assert torch.equal(torch.cdist(means, centres).argmin(1), rows.labels)
    assert rows[5]["caption"] == ["class 1"]


def test_batch_size_is_global():
    data = ready(SyntheticData(8, 12, length=64, val_length=7))
    assert data.train_dataloader().batch_size == 12
    parts = []
    for rank in range(2):
        data.trainer = fake_trainer(world_size=2, global_rank=rank, accumulate_grad_batches=3)
        loader = data.train_dataloader()
        assert loader.batch_size == 2 and len(loader) == 64 // 12 * 3 and not loader.pin_memory
        parts.append([batch["image"] for batch in data.val_dataloader()])
    assert [len(torch.cat(part)) for part in parts] == [4, 3]
    rows = torch.cat([image for part in parts for image in part])
    assert {row.numpy().tobytes() for row in rows} == {row.numpy().tobytes() for row in data.val_set.images}
    data.trainer = fake_trainer(world_size=5)
    with pytest.raises(ValueError, match=r"batch_size=12 .* world_size=5 .* multiple of 5"):
        data.train_dataloader()


def test_limit_n_draws_rows_by_seed():
    data = ready(SyntheticData(8, 4, length=64, num_classes=4, limit_n=16))
    assert len(data.train_set) == 16 and len(data.val_set) == 16
    rows = data.train_set.rows
    assert torch.equal(rows, rows.unique())  # sorted, without repeats
    assert len(data.train_set.__getitems__([RowKey(0, i) for i in range(16)])["label"].unique()) == 4
    full = data.train_set.dataset
    assert torch.equal(data.train_set[3]["image"], full[int(rows[3])]["image"])
    assert set(LimitedRows(full, 5).rows.tolist()) < set(rows.tolist())
    assert not torch.equal(LimitedRows(full, 16, seed=1).rows, rows)
    assert len(LimitedRows(full, 1000)) == 64


def test_errors_before_any_work():
    with pytest.raises(ValueError, match="batch_size=0"):
        SyntheticData(8, 0)
    with pytest.raises(ValueError, match="limit_n=-1"):
        SyntheticData(8, 4, limit_n=-1)
    with pytest.raises(ValueError, match="num_workers=-1"):
        DigitsData(num_workers=-1)
    with pytest.raises(ValueError, match="length=0"):
        SyntheticData(length=0)
    with pytest.raises(RuntimeError, match=r"SyntheticData .* setup\(\)"):
        SyntheticData().train_dataloader()
    with pytest.raises(IndexError, match=r"row 64 is outside 0\.\.63"):
        ready(SyntheticData()).train_set[64]
