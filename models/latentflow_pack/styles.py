"""One statistic per style that measures how strongly a picture shows it: hollowness, saturation, glow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .checker import foreground, ground_color

Image = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """A measure of a picture, and the side of `threshold` on which the style is."""

    name: str
    measure: Callable[[Image], float]
    threshold: float
    above: bool
    meaning: str

    def shown(self, image: Image) -> bool:
        return (self.measure(image) > self.threshold) == self.above


def _hollowness(image: Image) -> float:
    """Share of the area inside the objects' contours that is background."""
    mask = foreground(image)
    filled = ndimage.binary_fill_holes(mask)
    return 1 - float(mask.sum()) / max(float(filled.sum()), 1.0)


def _saturation(image: Image) -> float:
    """The objects' median colour saturation (HSV)."""
    mask = ndimage.binary_erosion(foreground(image))
    pixels = image[mask if mask.any() else foreground(image)].astype(float)
    if not len(pixels):
        return 1.0
    strongest = pixels.max(axis=1)
    return float(np.median((strongest - pixels.min(axis=1)) / np.maximum(strongest, 1)))


def _glow(image: Image) -> float:
    """Brightness (0-255) of the ring 2 to 4 pixels around the objects, less that of the background."""
    mask = foreground(image)
    ring = ndimage.binary_dilation(mask, iterations=4) & ~ndimage.binary_dilation(mask, iterations=1)
    brightness = image.max(axis=2).astype(float)
    return float(np.mean(brightness[ring])) - float(ground_color(image).max()) if ring.any() else 0.0


STATISTICS = {
    "outline": Statistic(
        name="hollowness",
        measure=_hollowness,
        threshold=0.08,
        above=True,
        meaning="share of the area inside the objects' contours that is background",
    ),
    "pastel": Statistic(
        name="saturation",
        measure=_saturation,
        threshold=0.55,
        above=False,
        meaning="median HSV saturation of the objects' pixels",
    ),
    "neon": Statistic(
        name="glow",
        measure=_glow,
        threshold=20.0,
        above=True,
        meaning="brightness (0-255) of the ring 2 to 4 pixels around the objects, less the background's",
    ),
}
