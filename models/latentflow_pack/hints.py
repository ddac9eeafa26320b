"""The ControlNets' inputs: edge lines and a coarse colour grid, computed from a picture by the checker's functions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .checker import color_name, foreground, ground_color
from .drawing import SIDE
from .grammar import BACKGROUNDS, COLORS

CELLS = 8
KINDS = ("edges", "layout")
_CELL = SIDE // CELLS

Image = NDArray[np.uint8]
Grid = list[list[str]]


def edge_mask(image: Image) -> NDArray[np.bool_]:
    """The objects' outermost pixels, one pixel wide."""
    mask = foreground(image)
    return np.asarray(mask & ~ndimage.binary_erosion(mask, border_value=1))


def edges(image: Image) -> Image:
    """White edge lines on black."""
    return np.repeat(edge_mask(image)[..., None], 3, axis=2).astype(np.uint8) * 255


def cells(image: Image) -> Grid:
    """The colour name of every cell: that of an object which covers at least half of the cell, or the background's."""
    mask = foreground(image)
    ground = color_name(ground_color(image))
    grid = []
    for row in range(CELLS):
        names = []
        for column in range(CELLS):
            box = np.s_[row * _CELL : (row + 1) * _CELL, column * _CELL : (column + 1) * _CELL]
            covered = mask[box]
            object_there = covered.mean() >= 0.5
            names.append(color_name(np.median(image[box][covered].astype(float), axis=0)) if object_there else ground)
        grid.append(names)
    return grid


def layout(image: Image) -> Image:
    """The coarse colour grid, in the grammar's colours."""
    named = {**COLORS, **BACKGROUNDS}
    small = np.asarray([[named[name] for name in row] for row in cells(image)], dtype=np.uint8)
    return small.repeat(_CELL, axis=0).repeat(_CELL, axis=1)


def hint(kind: str, image: Image) -> Image:
    return edges(image) if kind == "edges" else layout(image)


def edge_agreement(image: Image, wanted: Image) -> float:
    """F1 of the edges of two pictures; an edge pixel is right where the other picture has one at most a pixel away."""
    seen, target = edge_mask(image), edge_mask(wanted)
    if not seen.any() or not target.any():
        return 0.0
    near = np.ones((3, 3), dtype=bool)
    precision = float((seen & ndimage.binary_dilation(target, near)).sum() / seen.sum())
    recall = float((target & ndimage.binary_dilation(seen, near)).sum() / target.sum())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def cell_agreement(image: Image, wanted: Image) -> tuple[float, float]:
    """The share of cells with the wanted colour: of all cells, and of the objects' cells alone."""
    seen, target = np.asarray(cells(image)), np.asarray(cells(wanted))
    objects = ~np.isin(target, list(BACKGROUNDS))
    right = seen == target
    return float(right.mean()), float(right[objects].mean()) if objects.any() else 1.0
