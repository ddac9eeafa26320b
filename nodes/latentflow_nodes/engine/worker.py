"""The one thread in which a server's model runs, behind a bounded queue.

Torch's thread pools belong to the calling thread, and two forward passes at a time would only slow each other down. So
every role except the denoiser, which has an engine, runs its forward passes in a `Worker`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from latentflow.errors import OverloadedError

from latentflow_nodes.engine.compute_lock import ComputeLock
from latentflow_nodes.engine.load import Load, PassSize

T = TypeVar("T")


def queue_full(*, queued: int, limit: int, seconds_each: float) -> OverloadedError:
    """The refusal of a full queue, with an estimate of when it has room."""
    return OverloadedError(
        f"This server's queue is full ({queued} of {limit} queued); retry later, or give the model more replicas.",
        retry_after=max(0.05, queued * seconds_each / 2),
    )


class Worker:
    """Runs callables one at a time in its thread.

    Args:
        threads: Torch's threads in that thread.
        max_waiting: Most calls that are queued behind the running one.
        lock: Held while a callable runs.
        load: Where calls and their durations are recorded.
    """

    def __init__(self, *, threads: int, max_waiting: int, lock: ComputeLock, load: Load) -> None:
        self._executor = ThreadPoolExecutor(1, "model", initializer=torch.set_num_threads, initargs=(threads,))
        self._max_waiting = max_waiting
        # All calls: the running one and those behind it.
        self._present = 0
        # Of these the ones that the metrics count as queued requests.
        self._queued: set[object] = set()
        self._mean = 0.0
        self._lock = lock
        self._load = load

    async def run(self, work: Callable[[], T], *, size: PassSize, resumed: bool = False) -> T:
        """The callable's result. OverloadedError when the queue is full; a cancelled caller's work is not started.

        Args:
            size: What the duration of the call depends on.
            resumed: The call belongs to a request that has had forward passes here, so it is not a queued request.
        """
        if self._present > self._max_waiting:
            raise queue_full(queued=self._present - 1, limit=self._max_waiting, seconds_each=self._mean)
        call = object()
        self._present += 1
        if not resumed:
            self._queued.add(call)
        self._report()
        future = self._executor.submit(self._timed, work, call, size)
        try:
            return await asyncio.wrap_future(future)
        finally:
            self._present -= 1
            self._queued.discard(call)
            self._report()

    @torch.inference_mode()
    def _timed(self, work: Callable[[], T], call: object, size: PassSize) -> T:
        self._queued.discard(call)
        self._report()
        try:
            with self._lock:
                start = time.perf_counter()
                try:
                    return work()
                finally:
                    seconds = time.perf_counter() - start
                    self._mean = seconds if self._mean == 0 else 0.9 * self._mean + 0.1 * seconds
                    self._load.passed(size, requests=1, seconds=seconds)
        finally:
            if self._present == 1:
                self._lock.idle()

    def _report(self) -> None:
        self._load.set(running=min(1, self._present), queued=len(self._queued))

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
