"""Scenes of several coloured shapes whose objects are known: label maps that need no file and no network.

A scene is a background and 1 to `max_objects` shapes of shapes_scene.py, nearer ones before farther ones and larger, so
that sizes tell distances. Panoptic maps: the class of a pixel is its object's shape or its background's colour, and
every object and the background is an instance. Depth: that of the object, or of a floor that comes nearer downwards; 0,
not measured, on the edges of objects. A scene is a function of (seed, split, index, size). Batches: see label_maps.py.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.base import BatchData, RowDataset, check_counts
from datamodules.label_maps import MAPS, Task, map_batch
from datamodules.label_ops import canonical_ids
from datamodules.sampler import RowKey
from datamodules.shapes_scene import BACKGROUNDS, COLOUR_JITTER, COLOURS, MAX_ANGLE, NAMES, NOISE, SPLITS, coverage

CLASSES = ("void", *NAMES["shape"], *NAMES["background"])
STUFF = [CLASSES.index(name) for name in NAMES["background"]]
NEAR, FAR = 1.0, 3.0  # metres of objects
RADIUS = 0.3  # of an object at NEAR, in sides of the picture
FLOOR = (9.5, 4.0)  # metres, at the top and the bottom row
EDGE = 0.05  # of a pixel: covered by more of an object than this, and less than all but this, it has no depth


class Scene(NamedTuple):
    """Picture uint8 (3, S, S), classes and instances int16 (2, S, S), depth in metres float32 (1, S, S)."""

    image: np.ndarray
    panoptic: np.ndarray
    depth: np.ndarray


class ShapesLabelMaps(BatchData):
    """`length` training and `val_length` validation scenes of up to `max_objects` objects, with maps for `task`.

    There are 13 classes, 0 void, and `max_objects` + 2 instance ids, 0 none. Raises ValueError for counts below 1.
    """

    def __init__(
        self,
        image_size: int = 32,
        batch_size: int = 32,
        *,
        task: Task = "panoptic",
        max_objects: int = 3,
        length: int = 4096,
        val_length: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        limit_n: int | None = None,
    ) -> None:
        super().__init__(image_size, batch_size, num_workers=num_workers, seed=seed, limit_n=limit_n)
        check_counts(max_objects=max_objects, length=length, val_length=val_length)
        if task not in MAPS:
            raise ValueError(f"task='{task}' is unknown: use {' or '.join(MAPS)}")
        self.task, self.max_objects, self.length, self.val_length = task, max_objects, length, val_length
        self.stuff_classes = list(STUFF)

    def make_datasets(self) -> tuple[RowDataset, RowDataset]:
        """Returns training and validation scenes."""
        return self.rows("train", self.length), self.rows("val", self.val_length)

    def rows(self, split: str, length: int) -> "SceneRows":
        """The first `length` scenes of a split; only those of "train" come without truth."""
        options = {"seed": self.seed, "split": split, "max_objects": self.max_objects}
        scenes = [draw_scene(i, self.image_size, **options) for i in range(length)]
        images = torch.from_numpy(np.stack([scene.image for scene in scenes]))
        maps = torch.from_numpy(np.stack([getattr(scene, self.task) for scene in scenes]))
        return SceneRows(images, maps, self.task, with_truth=split != "train")


class SceneRows(RowDataset):
    """Scenes held in memory: images (N, 3, S, S) and the maps of a task (N, K, S, S)."""

    def __init__(self, images: Tensor, maps: Tensor, task: Task, *, with_truth: bool) -> None:
        self.images, self.maps, self.task, self.with_truth = images, maps, task, with_truth

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: Sequence[RowKey]) -> dict[str, Any]:
        rows = torch.tensor([key.index for key in keys])
        batch = map_batch(self.images[rows], self.maps[rows], self.task)
        return batch | ({"truth": list(self.maps[rows])} if self.with_truth else {})


def draw_scene(index: int, size: int, *, seed: int = 0, split: str = "train", max_objects: int = 3) -> Scene:
    """Scene `index` of a split; any index of 0 or more exists."""
    key = np.array([seed, SPLITS[split]], dtype=np.uint64)
    draw = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 1, index]))
    background = int(draw.integers(len(BACKGROUNDS)))
    image = np.broadcast_to(BACKGROUNDS[background][:, None, None], (3, size, size)).copy()
    classes = np.full((size, size), CLASSES.index(NAMES["background"][background]), np.int16)
    instances = np.ones((size, size), np.int16)
    depth = np.broadcast_to(np.linspace(*FLOOR, size, dtype=np.float32)[:, None], (size, size)).copy()
    distances = np.sort(draw.uniform(NEAR, FAR, int(draw.integers(1, max_objects + 1))))[::-1]  # the nearest is last
    for instance, distance in enumerate(distances, start=2):
        shape, cover = _draw_object(size, float(distance), draw)
        colour = COLOURS[draw.integers(len(COLOURS))] + draw.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, 3)
        image += cover * (colour[:, None, None] - image)
        own = cover >= 0.5
        classes[own], instances[own] = CLASSES.index(NAMES["shape"][shape]), instance
        depth[own] = distance
        depth[(cover > EDGE) & (cover < 1 - EDGE)] = 0
    noisy = np.clip(np.rint(image + draw.normal(0, NOISE, (1, size, size))), 0, 255).astype(np.uint8)
    return Scene(noisy, np.stack([classes, canonical_ids(instances)]), depth[None])


def _draw_object(size: int, distance: float, draw: np.random.Generator) -> tuple[int, np.ndarray]:
    """The shape, and how much of each pixel (S, S) it covers."""
    shape = int(draw.integers(len(NAMES["shape"])))
    x, y = draw.uniform(0.15, 0.85, 2) * size
    angle = draw.uniform(-MAX_ANGLE, MAX_ANGLE)
    return shape, coverage(shape, size, centre_x=x, centre_y=y, radius=RADIUS * NEAR / distance * size, angle=angle)
