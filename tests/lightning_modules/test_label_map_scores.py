"""Panoptic quality against torchmetrics' and by hand; figures of depth by hand; sums over images."""

import pytest
import torch
from torchmetrics.detection import PanopticQuality

from lightning_modules.label_map_scores import (
    depth_figures,
    depth_sums,
    panoptic_figures,
    panoptic_sums,
    resized,
    segments,
)


def added(parts) -> dict[str, float]:
    sums: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def blocks(generator: torch.Generator) -> torch.Tensor:
    """Maps (2, 12, 12) of a few rectangles; classes 1 to 4, of which 3 and 4 are stuff."""
    maps = torch.stack([torch.full((12, 12), 3), torch.full((12, 12), 1)])
    for instance in range(2, 6):
        top, left, tall, wide = torch.randint(2, 8, (4,), generator=generator).tolist()
        maps[0, top : top + tall, left : left + wide] = int(torch.randint(1, 5, (), generator=generator))
        maps[1, top : top + tall, left : left + wide] = instance
    return maps


@pytest.mark.parametrize("seed", range(4))
def test_quality_is_torchmetrics(seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(5):
        truth = blocks(generator)
        predicted = truth.clone()
        changed = torch.rand(12, 12, generator=generator) < 0.3
        predicted[:, changed] = blocks(generator)[:, changed]
        pairs.append((predicted, truth))
    ours = panoptic_figures(added(panoptic_sums(p, t, stuff=[3, 4]) for p, t in pairs))
    metric = PanopticQuality(things={1, 2}, stuffs={3, 4}, return_sq_and_rq=True)
    for predicted, truth in pairs:
        metric.update(predicted.movedim(0, -1)[None], truth.movedim(0, -1)[None])
    pq, sq, rq = metric.compute().flatten().tolist()
    assert (ours["pq"], ours["sq"], ours["rq"]) == (pytest.approx(pq), pytest.approx(sq), pytest.approx(rq))


def test_a_perfect_prediction_has_quality_one_whatever_its_ids():
    truth = blocks(torch.Generator().manual_seed(0))
    renumbered = torch.stack([truth[0], truth[1] * 3 + 1])
    assert panoptic_figures(panoptic_sums(renumbered, truth))["pq"] == 1


def test_void_pixels_count_neither_for_nor_against():
    truth = torch.tensor([[[1, 1, 0, 0]], [[1, 1, 0, 0]]])
    inside = torch.tensor([[[1, 1, 1, 0]], [[1, 1, 1, 0]]])  # reaches into void: the union leaves that out
    assert panoptic_sums(inside, truth) == {"1/iou": 1.0, "1/tp": 1}
    elsewhere = torch.tensor([[[1, 1, 2, 2]], [[1, 1, 2, 2]]])  # a segment in void is no mistake
    assert panoptic_sums(elsewhere, truth) == {"1/iou": 1.0, "1/tp": 1}


def test_half_an_overlap_is_no_match():
    truth = torch.tensor([[[1, 1, 2, 2]], [[1, 1, 2, 2]]])
    predicted = torch.tensor([[[1, 2, 2, 2]], [[1, 2, 2, 2]]])
    assert panoptic_sums(predicted, truth) == {"2/iou": 2 / 3, "2/tp": 1, "1/fn": 1, "1/fp": 1}


def test_stuff_is_one_segment():
    maps = torch.tensor([[[1, 1, 2, 2]], [[1, 2, 1, 2]]])
    assert segments(maps, stuff=[2]).unique().numel() == 3 and segments(maps, stuff=[]).unique().numel() == 4


def test_nothing_scored_gives_no_figure():
    assert panoptic_figures({}) == {} and depth_figures({}) == {}


def test_depth_figures_are_means_over_images_of_each_one_s():
    truth = torch.tensor([[[1.0, 2.0], [0.0, 20.0]]])  # two pixels were measured in range
    predicted = torch.tensor([[[2.0, 2.0], [5.0, 5.0]]])
    first = depth_sums(predicted, truth, low=0.001, high=10.0)
    assert first == {
        "rmse": pytest.approx(0.5**0.5),
        "abs_rel": pytest.approx(0.5),
        "delta1": pytest.approx(0.5),
        "images": 1.0,
    }
    assert depth_sums(predicted, torch.zeros_like(truth), low=0.001, high=10.0) == {}
    assert depth_figures(added([first, {"rmse": 0.0, "abs_rel": 0.0, "delta1": 1.0, "images": 1.0}]))["rmse"] == (
        pytest.approx(0.5**0.5 / 2)
    )


def test_maps_are_resized_to_the_nearest_pixel():
    maps = torch.tensor([[[1, 2], [3, 4]]])
    assert resized(maps, (4, 2))[0].tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]
    assert resized(maps, (1, 1))[0].tolist() == [[4]]
    assert resized(maps, (2, 2)) is maps
