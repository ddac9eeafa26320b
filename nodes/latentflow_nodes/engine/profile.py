"""How long forward passes take by their rows, from which the engine decides how many requests share one.

It is learned from the passes of the requests themselves: sizes are chosen by callers, and what one size takes says little
about another. The durations are those of the device, so on CUDA they are known some passes later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from cachetools import LRUCache

from latentflow_nodes.engine.forward_time import ForwardTime
from latentflow_nodes.engine.load import PassSize

_SIZES = 64
# A duration is the least of the newest passes: whatever else the machine does makes a pass only longer, and the first
# pass of a size allocates its memory.
_NEWEST = 8
_LEAST_PASSES = 3
# Rows of which no pass is among so many of their size are unknown again, because the machine may have changed.
_MEMORY = 64


@dataclass
class _Size:
    """The passes of one size of latents: their number, and by rows the newest durations and the number of the last pass."""

    passes: int = 0
    seconds: dict[int, deque[float]] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)


class Profile:
    """Durations of passes. Used by the engine's thread alone."""

    def __init__(self) -> None:
        self._sizes: LRUCache[tuple[int, int], _Size] = LRUCache(_SIZES)
        # Passes that the device may not have reached the end of.
        self._under_way: deque[tuple[PassSize, ForwardTime, float]] = deque()

    def add(self, size: PassSize, time: ForwardTime, *, factor: float = 1.0) -> None:
        """Records a pass that was started.

        Args:
            factor: How many times as long as a usual pass of its rows it takes; what is recorded is the usual one.
        """
        if time.spans:
            self._under_way.append((size, time, factor))

    def seconds(self, height: int, width: int) -> Mapping[int, float]:
        """Seconds of a pass with latents of this size, by its rows; without the rows for which they are not known."""
        self._collect()
        found = self._sizes.get((height, width), _Size())
        return {
            rows: min(durations)
            for rows, durations in found.seconds.items()
            if len(durations) >= _LEAST_PASSES and found.passes - found.last[rows] < _MEMORY
        }

    def _collect(self) -> None:
        while self._under_way and self._under_way[0][1].is_over():
            size, time, factor = self._under_way.popleft()
            of_size = self._sizes.setdefault((size.height, size.width), _Size())
            of_size.passes += 1
            of_size.last[size.rows] = of_size.passes
            of_size.seconds.setdefault(size.rows, deque(maxlen=_NEWEST)).append(time.nanoseconds() / 1e9 / factor)
