"""The load of a server: how many requests run and are queued, and how long its forward passes take.

The engine and the workers record it, from their threads. Metrics count it, and `watch` reports it to gateways, which
cannot wait for the next scrape.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from cachetools import LRUCache
from latentflow.internal.metrics import Instruments

# Callers choose the sizes, so the number of sizes that are kept is bounded.
_KEPT_SIZES = 64
# Weight of the newest value in a mean.
_NEWEST = 0.1
_WATCH_SECONDS = 0.1


def moving_mean(mean: float, seconds: float) -> float:
    """The mean after one more measurement; a mean of 0 has none yet. Recent ones count more."""
    return seconds if mean == 0 else mean + _NEWEST * (seconds - mean)


class PassSize(NamedTuple):
    """What the duration of a forward pass depends on: rows of the batch, and size of the latents; 0: none."""

    rows: int
    height: int = 0
    width: int = 0


@dataclass(frozen=True, kw_only=True)
class LoadState:
    """The load at one moment.

    Attributes:
        running: Requests that take part in forward passes.
        queued: Requests that wait until they may run.
        is_draining: The server refuses new requests.
        nets: Names of a ControlNet's networks that are on the device.
        is_awake: The server admits requests, as far as its weights are concerned.
        epoch: Of the last Sleep or Wake that took effect; 0: none.
        pass_seconds: Mean duration of a pass, by its size.
    """

    running: int
    queued: int
    is_draining: bool
    nets: tuple[str, ...]
    is_awake: bool
    epoch: int
    pass_seconds: Mapping[PassSize, float]


class Load:
    """The load of this server. Methods may be called from any thread.

    Args:
        metrics: Counts running and queued requests and passes.
    """

    def __init__(self, metrics: Instruments) -> None:
        self._metrics = metrics
        self._lock = threading.Lock()
        self._running = 0
        self._queued = 0
        self._is_draining = False
        self._nets: tuple[str, ...] = ()
        self._is_awake = True
        self._epoch = 0
        metrics.of("latentflow_awake").set(1)
        self._pass_seconds: LRUCache[PassSize, float] = LRUCache(_KEPT_SIZES)
        self._watchers: dict[object, Callable[[], object]] = {}

    def set(self, *, running: int, queued: int) -> None:
        """Records the numbers of requests."""
        self._metrics.of("latentflow_in_flight").set(running)
        self._metrics.of("latentflow_queue_depth").set(queued)
        with self._lock:
            changed = (running, queued) != (self._running, self._queued)
            self._running, self._queued = running, queued
            if changed:
                self._notify()

    def passed(self, size: PassSize, *, requests: int, seconds: float) -> None:
        """Records one forward pass that `requests` requests shared."""
        self._metrics.of("latentflow_step_seconds").observe(seconds)
        self._metrics.of("latentflow_batch_size").observe(requests)
        with self._lock:
            self._pass_seconds[size] = moving_mean(self._pass_seconds.get(size, 0.0), seconds)
            self._notify()

    def drain(self) -> None:
        """Records that the server refuses new requests from now on."""
        with self._lock:
            self._is_draining = True
            self._notify()

    def set_nets(self, names: tuple[str, ...]) -> None:
        """Records the networks of a ControlNet that are on the device."""
        with self._lock:
            self._nets = names
            self._notify()

    def set_awake(self, is_awake: bool) -> None:
        """Records whether the server admits requests, as far as its weights are concerned."""
        self._metrics.of("latentflow_awake").set(is_awake)
        with self._lock:
            self._is_awake = is_awake
            self._notify()

    def took_effect(self, epoch: int) -> None:
        """Records that a Sleep or Wake is complete."""
        with self._lock:
            self._epoch = epoch
            self._notify()

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def is_awake(self) -> bool:
        return self._is_awake

    def state(self) -> LoadState:
        with self._lock:
            return LoadState(
                running=self._running,
                queued=self._queued,
                is_draining=self._is_draining,
                nets=self._nets,
                is_awake=self._is_awake,
                epoch=self._epoch,
                pass_seconds=dict(self._pass_seconds),
            )

    async def watch(self) -> AsyncGenerator[LoadState, None]:
        """The load now, and after each change; several changes within a tenth of a second are one."""
        loop, changed, key = asyncio.get_running_loop(), asyncio.Event(), object()
        try:
            while True:
                changed.clear()
                with self._lock:
                    self._watchers[key] = lambda: loop.call_soon_threadsafe(changed.set)
                yield self.state()
                await asyncio.sleep(_WATCH_SECONDS)
                await changed.wait()
        finally:
            with self._lock:
                self._watchers.pop(key, None)

    def _notify(self) -> None:
        # Once until the watcher looks again: waking an event loop takes time from the step loop.
        for wake in self._watchers.values():
            wake()
        self._watchers.clear()
