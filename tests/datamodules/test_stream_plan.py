"""The order of a stream: every row once over ranks and workers, nothing read twice, resume at any batch; no files."""

from itertools import chain, pairwise

import pytest
import torch

from tests.datamodules.streams import SHARDS, TOTAL, make_sampler, ranges

LAYOUTS = [(1, 0), (1, 3), (2, 2), (3, 1), (2, 5), (6, 2)]


@pytest.mark.parametrize("buffer", [1, 7, 1000])
@pytest.mark.parametrize(("world_size", "num_workers"), LAYOUTS)
def test_every_row_once_over_ranks_and_workers(world_size, num_workers, buffer):
    for epoch in (0, 1):
        seen, read = [], []
        for rank in range(world_size):
            sampler = make_sampler(SHARDS, rank=rank, world_size=world_size, num_workers=num_workers, buffer=buffer)
            sampler.set_epoch(epoch)
            keys = list(sampler)
            assert len(keys) == len(sampler) == 42 // world_size
            seen += [key.index for key in keys]
            read += {span for key in keys for span in key.chunk}
        assert len(set(seen)) == len(seen) == 42 and set(seen) <= set(range(TOTAL))
        rows = [(span.shard, row) for span in read for row in range(span.start, span.stop)]
        assert len(rows) == len(set(rows)) == 42  # nothing is read twice, whoever reads it


def test_each_worker_reads_on_from_where_it_stopped():
    sampler = make_sampler([40, 50, 60], batch=5, buffer=10, num_workers=3)
    keys = list(sampler)
    batches = [keys[i : i + 5] for i in range(0, len(keys), 5)]
    assert all(len({key.chunk for key in batch}) == 1 for batch in batches)
    jumps = 0
    for worker in range(3):
        chunks = list(dict.fromkeys(batch[0].chunk for batch in batches[worker::3]))
        for before, after in pairwise(chunks):
            jumps += before[-1].shard == after[0].shard and before[-1].stop != after[0].start
    assert jumps == 0


def test_order_depends_on_seed_and_epoch_and_mixes_a_chunk():
    def order(epoch=0, **options):
        sampler = make_sampler(SHARDS, **options)
        sampler.set_epoch(epoch)
        return [key.index for key in sampler]

    torch.manual_seed(5)
    assert order() == order() and {key.epoch for key in make_sampler(SHARDS)} == {0}
    assert len({tuple(order(epoch)) for epoch in range(4)} | {tuple(order(seed=5))}) == 5
    shards = [next(s for s, rows in enumerate(ranges()) if i in rows) for i in order(buffer=1, batch=1)]
    assert list(dict.fromkeys(shards)) != sorted(set(shards)) and len(dict.fromkeys(shards)) == len(SHARDS)
    assert order(buffer=1, batch=1) != order(1, buffer=1, batch=1)  # of the shards: chunks of one row are not mixed
    unmixed, mixed = order(buffer=1, batch=1), order(buffer=12, batch=1)
    assert mixed != unmixed and all(
        sorted(mixed[i : i + 12]) == sorted(unmixed[i : i + 12]) for i in range(0, TOTAL, 12)
    )


def test_chunks_are_mixed_differently():
    orders = set()
    for epoch in range(3):
        sampler = make_sampler([36], batch=12)
        sampler.set_epoch(epoch)
        rows = [key.index % 12 for key in sampler]
        orders |= {tuple(rows[i : i + 12]) for i in range(0, 36, 12)}
    assert len(orders) == 9 and all(sorted(order) == list(range(12)) for order in orders)


@pytest.mark.parametrize(("world_size", "num_workers"), [*LAYOUTS, (7, 2), (50, 1)])
def test_validation_reads_every_row_once_in_order(world_size, num_workers):
    seen = []
    for rank in range(world_size):
        sampler = make_sampler(SHARDS, shuffle=False, batch=world_size * 2, rank=rank, world_size=world_size,
                               num_workers=num_workers)  # fmt: skip
        rows = [key.index for key in sampler]
        assert len(rows) == len(sampler) in (TOTAL // world_size, TOTAL // world_size + 1)
        batches = [rows[i : i + 2] for i in range(0, len(rows), 2)]
        for worker in range(max(1, num_workers)):
            part = list(chain(*batches[worker :: max(1, num_workers)]))
            assert part == list(range(part[0], part[0] + len(part))) if part else True
        seen += rows
    assert sorted(seen) == list(range(TOTAL))


def test_accumulation_and_sampler_errors():
    sampler = make_sampler(SHARDS, batch=12, world_size=2, accumulate=3)
    assert sampler.batch_size == 2 and len(sampler) == 18
    with pytest.raises(ValueError, match=r"batch_size=10 .*choose a multiple of 4"):
        make_sampler(SHARDS, batch=10, world_size=4)
    with pytest.raises(ValueError, match="shuffle_buffer=0 must be at least 1 row"):
        make_sampler(SHARDS, buffer=0)
    assert [key.index for key in make_sampler([0, 2, 0, 3, 0], batch=1, shuffle=False)] == list(range(5))


def test_resume_at_every_batch_of_the_plan():
    whole = make_sampler(SHARDS, num_workers=2, batch=4, buffer=9)
    keys = list(whole)
    for start in range(len(keys) // 4 + 1):
        whole.start = start
        assert list(whole) == keys[4 * start :]
