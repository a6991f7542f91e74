"""Order of rows over epochs and ranks, flips, and the loader's position without any trainer."""

from itertools import chain, islice

import pytest
import torch
from torch.utils.data import Dataset

from datamodules.sampler import ResumableLoader, RowKey, StatelessSampler, coin


class Keys(Dataset):
    """Returns the keys it is asked for, so that a test sees what a worker was told."""

    def __len__(self):
        return 22

    def __getitems__(self, keys):
        return [tuple(key) for key in keys]


def make_loader(*, num_workers=0, persistent_workers=False, epoch_batches=None, batch=4):
    return ResumableLoader(
        Keys(),
        StatelessSampler(22, global_batch_size=batch, seed=3),
        num_workers=num_workers,
        persistent_workers=persistent_workers,
        epoch_batches=epoch_batches,
    )


def training_batches(world_size, *, accumulate=1, epoch=1, length=103, batch=12):
    """Per batch index, the set of rows that all ranks together read."""
    parts = []
    for rank in range(world_size):
        sampler = StatelessSampler(
            length, global_batch_size=batch, seed=5, rank=rank, world_size=world_size, accumulate=accumulate
        )
        sampler.set_epoch(epoch)
        rows = [key.index for key in sampler]
        assert len(rows) == len(sampler)
        parts.append([rows[i : i + sampler.batch_size] for i in range(0, len(rows), sampler.batch_size)])
    return [frozenset().union(*batches) for batches in zip(*parts, strict=True)]


def test_training_order_is_a_cut_permutation_that_depends_on_seed_and_epoch_only():
    sampler = StatelessSampler(103, global_batch_size=12, seed=5)
    first = [key.index for key in sampler]
    assert len(first) == len(set(first)) == 96 and set(first) <= set(range(103))
    assert first != sorted(first)
    torch.manual_seed(99)
    assert [key.index for key in sampler] == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert [key.index for key in second] != first and {key.epoch for key in second} == {1}
    other = StatelessSampler(103, global_batch_size=12, seed=6)
    assert [key.index for key in other] != first


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (3, 1), (4, 3), (1, 2)])
def test_global_batches_do_not_depend_on_ranks_or_accumulation(world_size, accumulate):
    whole = training_batches(1)
    assert len(whole) == 8 and all(len(batch) == 12 for batch in whole)
    split = training_batches(world_size, accumulate=accumulate)
    steps = [frozenset().union(*split[i : i + accumulate]) for i in range(0, len(split), accumulate)]
    assert steps == whole


@pytest.mark.parametrize(("length", "world_size"), [(10, 2), (11, 2), (7, 3), (3, 4)])
def test_validation_covers_every_row_once_over_all_ranks(length, world_size):
    samplers = [
        StatelessSampler(length, global_batch_size=12, shuffle=False, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    rows = [[key.index for key in sampler] for sampler in samplers]
    assert sorted(chain(*rows)) == list(range(length))
    assert [len(sampler) for sampler in samplers] == [len(part) for part in rows]


def test_start_skips_batches_of_this_rank_and_keeps_the_length():
    sampler = StatelessSampler(40, global_batch_size=8, rank=1, world_size=2)
    whole = list(sampler)
    sampler.start = 3
    assert list(sampler) == whole[12:] and len(sampler) == 20


def test_sampler_errors_name_the_values():
    with pytest.raises(ValueError, match=r"batch_size=10 .*world_size=4 .*accumulate_grad_batches=2: .* multiple of 8"):
        StatelessSampler(100, global_batch_size=10, world_size=4, accumulate=2)
    with pytest.raises(ValueError, match=r"batch_size=64 .* 20 training rows"):
        StatelessSampler(20, global_batch_size=64)


def test_coin_is_fair_and_changes_with_every_part_of_the_key():
    grid = torch.tensor([[coin(0, RowKey(epoch, i)) for i in range(2000)] for epoch in range(2)])
    assert (grid.float().mean(1) - 0.5).abs().max() < 0.05  # 4.5 standard deviations
    assert 0.4 < (grid[0] != grid[1]).float().mean() < 0.6
    assert [coin(1, RowKey(0, i)) for i in range(50)] != [coin(0, RowKey(0, i)) for i in range(50)]


WORKERS = [(0, False), (2, False), (2, True)]


@pytest.mark.parametrize(("num_workers", "persistent_workers"), WORKERS)
def test_resume_at_every_batch_equals_the_unbroken_run(num_workers, persistent_workers):
    options = {"num_workers": num_workers, "persistent_workers": persistent_workers}
    reference = make_loader()
    unbroken = [batch for _ in range(3) for batch in reference]
    assert len(unbroken) == 15 and {key[0] for batch in unbroken for key in batch} == {0, 1, 2}
    for stop in (5, 8):
        loader, seen = make_loader(**options), []
        while len(seen) < stop:
            seen += islice(loader, stop - len(seen))
        resumed = make_loader(**options)
        resumed.load_state_dict(loader.state_dict())
        rest = [batch for _ in range(3) for batch in resumed]
        assert seen + rest[: 15 - stop] == unbroken


def test_the_epoch_is_read_at_the_first_batch_not_at_iter():
    loader = make_loader(num_workers=1, persistent_workers=True)
    batches = iter(loader)
    loader.sampler.set_epoch(4)
    assert {key[0] for key in next(batches)} == {4}


def test_shortened_epochs_start_afresh_and_length_stays():
    loader = make_loader(epoch_batches=2)
    assert len(loader) == 5
    first, second = list(loader), list(loader)
    assert len(first) == len(second) == 2
    full = make_loader()
    full.sampler.set_epoch(1)
    assert second == list(islice(full, 2))


def test_state_is_the_position_and_foreign_states_are_refused_inside_an_epoch():
    loader = make_loader()
    assert loader.state_dict() == {"epoch": 0, "done": 0, "batches": 5}
    list(islice(loader, 3))
    assert loader.state_dict() == {"epoch": 0, "done": 3, "batches": 5}
    with pytest.raises(ValueError, match="epoch of 5 batches but an epoch now has 2"):
        make_loader(batch=8).load_state_dict(loader.state_dict())
    other = make_loader(batch=8)
    other.load_state_dict({"epoch": 6, "done": 5, "batches": 5})
    assert {key[0] for key in next(iter(other))} == {7}


def test_loading_draws_nothing_from_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(make_loader(num_workers=1))
    assert torch.equal(torch.get_rng_state(), before)
