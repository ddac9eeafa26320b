"""Recognizes the objects of a picture without any network: segmentation, nearest named colour, shape by contour.

It decides every score of the pack, so it has to be right on the training code's own pictures and reject blobs.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.color import rgb2lab

from .drawing import RADIUS, SIDE, Placed, anchor, inside
from .grammar import BACKGROUNDS, COLORS, PLACES, SHAPES, Scene, Thing

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]

_RAYS = 48
_LEAST_AREA = 24
_WORST_CONTOUR = 0.13
_CONTRAST = 0.5
_FARTHEST_FROM_PLACE = 8.5


@dataclass(frozen=True, kw_only=True)
class Recognized:
    """One object that the checker recognized."""

    color: str
    shape: str
    place: str
    size: str
    x: float
    y: float
    area: float


@dataclass(frozen=True, kw_only=True)
class Reading:
    background: str
    things: tuple[Recognized, ...]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Which properties of a scene a picture shows correctly, over all of its objects."""

    color_shape: bool
    place: bool
    size: bool
    background: bool

    @property
    def things(self) -> bool:
        return self.color_shape and self.place


def _lab(color: tuple[float, ...]) -> NDArray[np.float64]:
    return np.asarray(rgb2lab(np.asarray(color, dtype=np.float64).reshape(1, 1, 3) / 255.0)[0, 0])


@functools.cache
def _palette() -> tuple[list[str], NDArray[np.float64]]:
    named = {**COLORS, **BACKGROUNDS}
    return list(named), np.stack([_lab(color) for color in named.values()])


def color_name(color: NDArray[np.float64]) -> str:
    names, table = _palette()
    return names[int(np.argmin(np.linalg.norm(table - _lab(tuple(color)), axis=1)))]


def ground_color(image: Image) -> NDArray[np.float64]:
    """The background's colour: the median of the picture's border."""
    border = np.concatenate(
        [image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3), image[:, :2].reshape(-1, 3), image[:, -2:].reshape(-1, 3)]
    )
    return np.asarray(np.median(border, axis=0), dtype=np.float64)


def foreground(image: Image) -> Mask:
    """Pixels nearer to an object's colour than to the background's."""
    distance = np.abs(image.astype(np.float64) - ground_color(image)).max(axis=2)
    strongest = np.percentile(distance, 97)
    return np.asarray(distance > max(_CONTRAST * strongest, 24.0))


def _signature(mask: Mask, *, x: float, y: float) -> NDArray[np.float64]:
    """Distance from the centre of mass to the contour along each ray, divided by its mean."""
    soft = np.pad(mask.astype(np.float64), 2)
    steps = np.arange(0, SIDE * 0.6, 0.25)
    angles = np.arange(_RAYS) * 2 * math.pi / _RAYS
    rows = y + 2 + np.outer(np.sin(angles), steps)
    columns = x + 2 + np.outer(np.cos(angles), steps)
    lit = ndimage.map_coordinates(soft, [rows, columns], order=1, mode="constant") > 0.5
    reach = np.where(lit.any(axis=1), lit.shape[1] - np.argmax(lit[:, ::-1], axis=1), 0).astype(np.float64)
    return np.asarray(reach / max(float(reach.mean()), 1e-6))


@functools.cache
def _contours() -> tuple[list[str], NDArray[np.float64], dict[str, float]]:
    names, table, areas = [], [], {}
    for shape in SHAPES:
        for radius in (*RADIUS.values(), sum(RADIUS.values()) / 2):
            for shift in (0.0, 0.25, 0.5):
                middle = SIDE / 2 + shift
                thing = Placed(color=(0, 0, 0), shape=shape, x=middle, y=middle, radius=radius)
                mask = inside(thing) > 0
                y, x = ndimage.center_of_mass(mask)
                names.append(shape)
                table.append(_signature(mask, x=x, y=y))
                areas[shape] = float(mask.sum()) / radius**2
    return names, np.stack(table), areas


def shape_name(mask: Mask) -> str:
    """The shape whose contour is nearest, or "unknown" where no contour is within the limit."""
    y, x = ndimage.center_of_mass(mask)
    names, table, _ = _contours()
    distance = np.sqrt(np.mean((table - _signature(mask, x=x, y=y)) ** 2, axis=1))
    best = int(np.argmin(distance))
    return names[best] if distance[best] < _WORST_CONTOUR else "unknown"


def place_name(x: float, y: float) -> str:
    name = min(PLACES, key=lambda place: math.dist(anchor(place), (x, y)))
    return name if math.dist(anchor(name), (x, y)) <= _FARTHEST_FROM_PLACE else "nowhere"


def _size_name(area: float, shape: str) -> str:
    _, _, areas = _contours()
    if shape not in areas:
        return "unknown"
    return "small" if math.sqrt(area / areas[shape]) < sum(RADIUS.values()) / 2 else "large"


def _recognize(image: Image, mask: Mask) -> Recognized:
    filled = np.asarray(ndimage.binary_fill_holes(mask), dtype=bool)
    core = ndimage.binary_erosion(mask)
    y, x = ndimage.center_of_mass(filled)
    shape = shape_name(filled)
    color = np.median(image[core if core.any() else mask].astype(np.float64), axis=0)
    area = float(filled.sum())
    return Recognized(
        color=color_name(color),
        shape=shape,
        place=place_name(x, y),
        size=_size_name(area, shape),
        x=float(x),
        y=float(y),
        area=area,
    )


def read(image: Image) -> Reading:
    labels, count = ndimage.label(foreground(image), structure=np.ones((3, 3)))
    masks = [np.asarray(labels == k + 1) for k in range(count)]
    things = tuple(_recognize(image, mask) for mask in masks if mask.sum() >= _LEAST_AREA)
    return Reading(background=color_name(ground_color(image)), things=things)


def _compare(thing: Thing, seen: Recognized) -> Verdict:
    return Verdict(
        color_shape=(seen.color, seen.shape) == thing.pair,
        place=thing.place is None or seen.place == thing.place,
        size=thing.size is None or seen.size == thing.size,
        background=True,
    )


def judge(image: Image, scene: Scene) -> Verdict:
    """Compares a picture with a scene; with a wrong number of objects every property of objects is wrong."""
    reading = read(image)
    ground = scene.background is None or reading.background == scene.background
    if len(reading.things) != len(scene.things):
        return Verdict(color_shape=False, place=False, size=False, background=ground)
    orders = [reading.things, reading.things[::-1]]
    tries = [[_compare(t, s) for t, s in zip(scene.things, order, strict=True)] for order in orders]
    best = max(tries, key=lambda fits: sum(2 * fit.color_shape + 2 * fit.place + fit.size for fit in fits))
    return Verdict(
        color_shape=all(fit.color_shape for fit in best),
        place=all(fit.place for fit in best),
        size=all(fit.size for fit in best),
        background=ground,
    )
