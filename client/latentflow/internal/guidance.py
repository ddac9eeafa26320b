"""Classifier-free guidance: how many halves a step has, decided in one place for gateway and servers.

A step of a guided request has a negative and a positive half. A guidance-distilled network takes the scale as an input
instead and computes one row. Pure: works on whatever has arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """The guidance of one request.

    Attributes:
        scale: Guidance scale, at least 0.
        is_embedded: The network takes the scale as an input.
    """

    scale: float
    is_embedded: bool

    @property
    def has_halves(self) -> bool:
        """Whether a step needs the negative conditioning. A scale of 1 or less guides nothing, as in diffusers."""
        return self.scale > 1 and not self.is_embedded

    @property
    def rows(self) -> int:
        """Rows of a forward pass for one image: 2 with both halves, else 1."""
        return 2 if self.has_halves else 1

    def combine(self, noise: Any) -> Any:
        """The guided prediction, [1, ...], of the network's, [rows, ...], negative half first."""
        if not self.has_halves:
            return noise
        negative, positive = noise.chunk(2)
        return negative + self.scale * (positive - negative)
