"""How long forward passes take on their device.

The model servers report it with every result. The benchmarks put the same hooks on a plain diffusers pipeline, so that
the rest of a request's wall time means the same on both sides.

On the CPU a mark is a reading of the clock. On CUDA it is an event in the stream: setting it waits for nothing, and only
reading the time waits for the device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch

Mark = Union[int, "torch.cuda.Event"]


@dataclass(frozen=True)
class ForwardTime:
    """The time between pairs of marks."""

    spans: tuple[tuple[Mark, Mark], ...] = ()

    def __add__(self, other: ForwardTime) -> ForwardTime:
        return ForwardTime(self.spans + other.spans)

    def is_over(self) -> bool:
        """Whether the device has reached the last mark, so that `nanoseconds` does not wait."""
        return all(isinstance(end, int) or end.query() for _, end in self.spans)

    def nanoseconds(self) -> int:
        """The sum over the spans. On CUDA waits until the device has reached the last mark."""
        return sum(_between(start, end) for start, end in self.spans)


class Stopwatch:
    """Measures forward passes in one thread.

    Args:
        device: Where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start: Mark = 0
        self._spans: list[tuple[Mark, Mark]] = []

    def start(self) -> None:
        self._start = self._mark()

    def stop(self) -> None:
        self._spans.append((self._start, self._mark()))

    def take(self) -> ForwardTime:
        """What was measured since the last `take`."""
        taken, self._spans = ForwardTime(tuple(self._spans)), []
        return taken

    def _mark(self) -> Mark:
        if self._device.type != "cuda":
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def measure(modules: Sequence[torch.nn.Module], *, device: torch.device) -> Stopwatch:
    """A stopwatch that runs while these modules do.

    Nested modules would count twice: none of them may contain another.
    """
    stopwatch = Stopwatch(device)

    def begin(_module: torch.nn.Module, _args: Any) -> None:
        stopwatch.start()

    def end(_module: torch.nn.Module, _args: Any, _output: Any) -> None:
        stopwatch.stop()

    for module in modules:
        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)
    return stopwatch


def _between(start: Mark, end: Mark) -> int:
    if isinstance(start, int) and isinstance(end, int):
        return end - start
    assert not isinstance(start, int)
    assert not isinstance(end, int)
    end.synchronize()
    return int(start.elapsed_time(end) * 1e6)
