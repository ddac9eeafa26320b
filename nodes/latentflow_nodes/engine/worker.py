"""The one thread in which a server's model runs, behind a bounded queue.

Torch's thread pools belong to the calling thread, and two forward passes at a time would only slow each other down;
so every role but the denoiser, whose engine is its own, hands its forward passes to a `Worker`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from latentflow.errors import OverloadedError
from latentflow.internal.metrics import Instruments

from latentflow_nodes.engine.compute_lock import Turn

T = TypeVar("T")


def queue_full(*, waiting: int, limit: int, seconds_each: float) -> OverloadedError:
    """The refusal of a full queue, with the time after which there should be room."""
    return OverloadedError(
        f"This server's queue is full ({waiting} of {limit} waiting); try again, or let the model have more replicas.",
        retry_after=max(0.05, waiting * seconds_each / 2),
    )


class Worker:
    """Runs callables one at a time in its thread.

    Args:
        threads: Torch's threads in that thread.
        max_waiting: Calls that may wait for the one that runs.
        turn: Whose turn it is on this machine.
    """

    def __init__(self, *, threads: int, max_waiting: int, turn: Turn, metrics: Instruments) -> None:
        self._executor = ThreadPoolExecutor(1, "model", initializer=torch.set_num_threads, initargs=(threads,))
        self._max_waiting = max_waiting
        # Calls that are here: the one that runs and those that wait for it; and the first calls of requests that wait.
        self._present = 0
        self._waiting: set[object] = set()
        self._mean = 0.0
        self._turn = turn
        self._metrics = metrics

    async def run(self, work: Callable[[], T], *, begun: bool = False) -> T:
        """The callable's result. OverloadedError when too many wait; a cancelled caller's work is not begun.

        Args:
            begun: It goes on with a request that has had forward passes, and is no longer one that waits.
        """
        if self._present > self._max_waiting:
            raise queue_full(waiting=self._present - 1, limit=self._max_waiting, seconds_each=self._mean)
        call = object()
        self._present += 1
        if not begun:
            self._waiting.add(call)
        self._report()
        future = self._executor.submit(self._timed, work, call)
        try:
            return await asyncio.wrap_future(future)
        finally:
            self._present -= 1
            self._waiting.discard(call)
            self._report()

    @torch.inference_mode()
    def _timed(self, work: Callable[[], T], call: object) -> T:
        self._waiting.discard(call)
        self._report()
        with self._turn:
            start = time.perf_counter()
            try:
                return work()
            finally:
                seconds = time.perf_counter() - start
                self._mean = seconds if self._mean == 0 else 0.9 * self._mean + 0.1 * seconds
                self._metrics.of("latentflow_step_seconds").observe(seconds)
                self._metrics.of("latentflow_batch_size").observe(1)

    def _report(self) -> None:
        self._metrics.of("latentflow_queue_depth").set(len(self._waiting))
        self._metrics.of("latentflow_in_flight").set(min(1, self._present))

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
