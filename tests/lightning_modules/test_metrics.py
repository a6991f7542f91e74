"""The metric: exact sums for any batch size and any number of processes, padding left out, order without effect."""

import math

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from lightning_modules.extractors import Extractor, make_extractor
from lightning_modules.metrics import GenerationMetric
from lightning_modules.reference import Reference
from lightning_modules.scores import density_coverage, frechet_distance, inception_score, precision_recall


class WithLogits(Extractor):
    """Features by random projection, logits by another: stands for Inception, whose name it does not bear."""

    name, dim, resize, has_logits, sha256 = "toy", 6, "none", True, "0" * 64

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(3 * 8 * 8, 6, generator=generator) / 50)
        self.second = nn.Parameter(torch.randn(3 * 8 * 8, 5, generator=generator) / 500)

    def extract(self, images):
        x = images.float().flatten(1) - 127.5
        return x @ self.first, x @ self.second


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def reference(count: int = 80) -> Reference:
    rows = WithLogits()(pictures(count, seed=9))[0]
    wide = rows.double()
    return Reference(wide.mean(0), wide.T.cov(), features=rows)


def measured(images, batches, *, keep=0, against=None):
    metric = GenerationMetric(WithLogits(), num_images=len(images), keep_features=keep)
    for index in batches:
        metric.update(images[index], index)
    return metric.compute(against)


def test_every_figure_is_that_of_all_features_at_once():
    images, real = pictures(60), reference()
    figures = measured(images, torch.arange(60).split(7), keep=60, against=real)
    features, logits = WithLogits()(images)
    wide = features.double()
    assert figures["n"] == 60
    assert figures["fd_toy"] == pytest.approx(
        frechet_distance(wide.mean(0), wide.T.cov(), real.mu, real.sigma), rel=1e-9
    )
    assert (figures["is_toy"], figures["is_toy_std"]) == pytest.approx(inception_score(logits), rel=1e-6)
    assert (figures["precision"], figures["recall"]) == precision_recall(features, real.features)
    assert (figures["density"], figures["coverage"]) == density_coverage(features, real.features)
    assert not any(key in ("fid", "is", "kid") for key in figures), "those names are Inception's"


@pytest.mark.parametrize("size", [1, 7, 60])
def test_batch_size_and_order_do_not_matter(size):
    images, real = pictures(60), reference()
    plain = measured(images, [torch.arange(60)], keep=60, against=real)
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(1)).split(size)
    assert measured(images, shuffled, keep=60, against=real) == pytest.approx(plain, rel=1e-6)


def test_images_that_were_seen_are_left_out():
    images = pictures(30)
    padded = [torch.arange(20), torch.tensor([*range(18, 30), 0, 1]), torch.tensor([0, 0])]
    assert measured(images, padded, against=reference()) == pytest.approx(
        measured(images, [torch.arange(30)], against=reference()), rel=1e-9
    )


def test_reset_forgets_all():
    images = pictures(30)
    metric = GenerationMetric(WithLogits(), num_images=30, keep_features=30)
    metric.update(pictures(30, seed=5), torch.arange(30))
    metric.reset()
    metric.update(images, torch.arange(30))
    assert metric.compute(reference()) == pytest.approx(
        measured(images, [torch.arange(30)], keep=30, against=reference())
    )


@pytest.mark.parametrize(("keep", "step"), [(25, 4), (40, 3), (99, 2), (100, 1), (500, 1)])
def test_kept_features_are_spread_over_the_images_and_no_more_than_asked_for(keep, step):
    metric = GenerationMetric(WithLogits(), num_images=100, keep_features=keep)
    metric.update(pictures(100), torch.arange(100))
    assert metric.kept_index[0].tolist() == list(range(0, 100, step))
    assert len(metric.kept_index[0]) <= keep


def test_too_few_images_have_no_neighbour_figures():
    figures = measured(pictures(5), [torch.arange(5)], keep=5, against=reference())
    assert set(figures) == {"n", "fd_toy"}
    with pytest.raises(ValueError, match="features are kept is -1"):
        GenerationMetric(WithLogits(), num_images=5, keep_features=-1)


def test_a_metric_that_was_cast_is_refused():
    """As happens to a submodule under bf16-true: the sums would put the covariance off by more than itself."""
    metric = GenerationMetric(WithLogits(), num_images=30).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"cast to torch.bfloat16"):
        metric.update(pictures(4), torch.arange(4))


def test_too_few_images_for_an_inception_score_give_none():
    assert not any(key.startswith("is") for key in measured(pictures(9), [torch.arange(9)]))


def _process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    images = pictures(60)
    for name, batches in {"uneven": list(torch.arange(60).split(7))[rank::world], "one": None}.items():
        if batches is None:  # the last process has drawn nothing at all
            batches = [torch.arange(60)] if rank == 0 else []
        torch.save(measured(images, batches, keep=60, against=reference()), f"{folder}/{name}{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    mp.spawn(_process, (2, str(tmp_path)), nprocs=2)
    plain = measured(pictures(60), [torch.arange(60)], keep=60, against=reference())
    assert len(plain) == 10 and not any(math.isnan(value) for value in plain.values())
    for name in ("uneven", "one"):
        for rank in (0, 1):
            figures = torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True)
            assert figures == pytest.approx(plain, rel=1e-6), name


@pytest.mark.parametrize("name", ["randconv", pytest.param("effnet_lite0", marks=pytest.mark.slow)])
def test_distances_rank_damage(name):
    """Other pictures of the set are nearest, then blurred ones, then more blurred ones, far off those of noise."""
    from datamodules.shapes_scene import render

    extractor = make_extractor(name)
    real, other = (
        torch.stack([torch.from_numpy(render(i, 32, split=split)[0]) for i in range(80)]) for split in ("train", "val")
    )
    rows = extractor(real)[0].double()
    known = Reference(rows.mean(0), rows.T.cov())
    blurred = [
        nn.functional.avg_pool2d(other.float(), width, stride=1, padding=width // 2, count_include_pad=False)
        for width in (1, 3, 5)
    ]
    values = []
    for images in [*blurred, torch.randint(0, 256, other.shape, generator=torch.Generator().manual_seed(0))]:
        metric = GenerationMetric(extractor, num_images=len(other))
        metric.update(images.float().round().to(torch.uint8), torch.arange(len(other)))
        values.append(metric.compute(known)[extractor.key])
    assert values == sorted(values) and values[3] > 1.5 * values[0], values
