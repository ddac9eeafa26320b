"""Draws scenes as 64×64 pictures, in the plain style and in those of the LoRAs.

All training data is drawn here, and so are the checker's reference contours.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .grammar import BACKGROUNDS, COLORS, NAMELESS_COLORS, SIZES, Scene, Thing

SIDE = 64
MIDDLE = (SIDE - 1) / 2
REACH = 17.0
RADIUS = {"small": 9.5, "large": 13.8}
STYLES = ("plain", "outline", "pastel", "neon")
NEON_NIGHT = (10.0, 8.0, 30.0)
STROKE = 2.0
# Every shape gets about the area of a circle of the same radius, so that "small" and "large" mean one thing.
_SQUARE = 0.88
_TRIANGLE = 0.68
_STAR_OUTER = 1.22
_STAR_INNER = 0.60

Pixels = NDArray[np.float32]
_OFFSET = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "center": (0, 0)}
_GRID_Y, _GRID_X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Placed:
    """An object with every number decided, in pixels."""

    color: tuple[float, float, float]
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The objects and the background of a picture, before rasterization."""

    things: tuple[Placed, ...]
    background: tuple[float, float, float]


def anchor(place: str) -> tuple[float, float]:
    """The centre of an object at this place, in pixels."""
    dx, dy = _OFFSET[place]
    return MIDDLE + REACH * dx, MIDDLE + REACH * dy


def _radius(thing: Thing, rng: random.Random) -> float:
    if thing.size is None:
        return rng.uniform(RADIUS[SIZES[0]], RADIUS[SIZES[1]])
    return RADIUS[thing.size] * rng.uniform(0.97, 1.03)


def _middles(scene: Scene, rng: random.Random) -> list[tuple[float, float]]:
    if len(scene.things) == 2 and all(thing.place is None for thing in scene.things):
        angle = rng.uniform(0, 2 * math.pi)
        dx, dy = REACH * math.cos(angle), REACH * math.sin(angle)
        return [(MIDDLE + dx, MIDDLE + dy), (MIDDLE - dx, MIDDLE - dy)]
    free = MIDDLE + rng.uniform(-REACH, REACH), MIDDLE + rng.uniform(-REACH, REACH)
    return [anchor(thing.place) if thing.place else free for thing in scene.things]


def arrange(scene: Scene, rng: random.Random) -> Layout:
    """Draws at random what the scene leaves open, and adds a little jitter to the rest."""
    colors = {**COLORS, **NAMELESS_COLORS}
    things = []
    for thing, (x, y) in zip(scene.things, _middles(scene, rng), strict=True):
        tint = [min(255.0, max(0.0, level + rng.uniform(-4, 4))) for level in colors[thing.color]]
        things.append(
            Placed(
                color=(tint[0], tint[1], tint[2]),
                shape=thing.shape,
                x=x + rng.uniform(-1, 1),
                y=y + rng.uniform(-1, 1),
                radius=_radius(thing, rng),
            )
        )
    name = scene.background or rng.choice(list(BACKGROUNDS))
    red, green, blue = BACKGROUNDS[name]
    return Layout(things=tuple(things), background=(float(red), float(green), float(blue)))


def _star_corners(radius: float) -> list[tuple[float, float]]:
    corners = []
    for k in range(10):
        reach = radius * (_STAR_OUTER if k % 2 == 0 else _STAR_INNER)
        angle = -math.pi / 2 + k * math.pi / 5
        corners.append((reach * math.cos(angle), reach * math.sin(angle)))
    return corners


def _polygon_inside(dx: Pixels, dy: Pixels, corners: list[tuple[float, float]]) -> Pixels:
    """Signed distance to a polygon, positive inside."""
    nearest = np.full_like(dx, 1e9)
    inside = np.zeros(dx.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        wx, wy = dx - ax, dy - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(wx - ex * along, wy - ey * along))
        if ay != by:
            crosses = ((ay > dy) != (by > dy)) & (dx < ex * (dy - ay) / ey + ax)
            inside ^= crosses
    return np.where(inside, nearest, -nearest).astype(np.float32)


def _nameless_inside(shape: str, dx: Pixels, dy: Pixels, radius: float) -> Pixels:
    across, along = np.abs(dx), np.abs(dy)
    if shape == "diamond":
        depth = (radius * 1.2 - across - along) / math.sqrt(2)
    elif shape == "hexagon":
        depth = radius * 0.92 - np.maximum(across * math.sqrt(3) / 2 + along / 2, along)
    elif shape == "bar":
        depth = np.minimum(radius * 1.15 - across, radius * 0.55 - along)
    elif shape == "cross":
        arm, reach = radius * 0.42, radius * 1.1
        depth = np.maximum(np.minimum(arm - across, reach - along), np.minimum(reach - across, arm - along))
    else:
        raise ValueError(f"cannot draw a {shape!r}")
    return np.asarray(depth, dtype=np.float32)


def inside(thing: Placed) -> Pixels:
    """Signed distance of every pixel to the object's contour, [64, 64], positive inside."""
    dx, dy, radius = _GRID_X - thing.x, _GRID_Y - thing.y, thing.radius
    if thing.shape == "circle":
        return np.asarray(radius - np.hypot(dx, dy), dtype=np.float32)
    if thing.shape == "square":
        return np.asarray(radius * _SQUARE - np.maximum(np.abs(dx), np.abs(dy)), dtype=np.float32)
    if thing.shape == "triangle":
        sides = [(math.cos(a), math.sin(a)) for a in (math.pi / 2, -math.pi / 6, -5 * math.pi / 6)]
        depths = np.stack([radius * _TRIANGLE - (dx * nx + dy * ny) for nx, ny in sides])
        return np.asarray(depths.min(axis=0), dtype=np.float32)
    if thing.shape == "star":
        return _polygon_inside(dx, dy, _star_corners(radius))
    return _nameless_inside(thing.shape, dx, dy, radius)


def _styled(picture: Pixels, depth: Pixels, color: NDArray[np.float32], style: str) -> Pixels:
    cover: Pixels = np.clip(depth + 0.5, 0, 1)
    if style == "outline":
        cover = cover * np.clip(STROKE + 0.5 - depth, 0, 1)
    if style == "pastel":
        color = np.asarray(0.45 * color + 0.55 * 255.0, dtype=np.float32)
    if style == "neon":
        color = np.asarray(np.clip(color * 1.15 + 20, 0, 255), dtype=np.float32)
        glow = 0.75 * np.exp(-np.maximum(-depth, 0) / 4.5)
        picture = np.asarray(picture + (color - picture) * glow[..., None], dtype=np.float32)
    return np.asarray(picture + (color - picture) * cover[..., None], dtype=np.float32)


def draw(layout: Layout, *, style: str = "plain") -> NDArray[np.uint8]:
    """The picture as height × width × RGB bytes."""
    ground = NEON_NIGHT if style == "neon" else layout.background
    picture = np.broadcast_to(np.asarray(ground, dtype=np.float32), (SIDE, SIDE, 3)).copy()
    for thing in layout.things:
        picture = _styled(picture, inside(thing), np.asarray(thing.color, dtype=np.float32), style)
    return np.asarray(np.clip(picture + 0.5, 0, 255), dtype=np.uint8)
