"""The one thread in which a server's model runs, behind a bounded queue.

Torch's thread pools belong to the calling thread, and two forward passes at a time would only slow each other down. So
every role except the denoiser, which has an engine, runs its forward passes in a `Worker`. Calls that are queued at the
same time and can share a pass share one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import structlog
import torch
from latentflow.errors import LatentflowError, OverloadedError

from latentflow_nodes.engine import malloc
from latentflow_nodes.engine.compute_lock import ComputeLock
from latentflow_nodes.engine.load import Load, PassSize, moving_mean
from latentflow_nodes.engine.memory import is_out_of_memory, out_of_memory
from latentflow_nodes.engine.threads import compute_with

_log = structlog.get_logger()

Item = TypeVar("Item")
Result = TypeVar("Result")


def queue_full(*, queued: int, limit: int, seconds_each: float) -> OverloadedError:
    """The refusal of a full queue, with an estimate of when it has room."""
    return OverloadedError(
        f"This server's queue is full ({queued} of {limit} queued); retry later, or give the model more replicas.",
        retry_after=max(0.05, queued * seconds_each / 2),
    )


@dataclass(eq=False, kw_only=True)
class _Call(Generic[Item, Result]):
    """A call in the queue or in a forward pass.

    Attributes:
        group: Equal for calls that can share a pass.
        counts: It belongs to a request that has had no forward pass here yet, so it counts as a queued request.
    """

    item: Item
    group: Hashable
    size: PassSize
    counts: bool
    result: Future[Result] = field(default_factory=Future)


class Worker(Generic[Item, Result]):
    """Runs calls in its thread, in the order of their arrival, several in one pass where they can share one.

    Args:
        run: The results of items of one group, in their order; an error in place of a result fails that call alone.
        threads: Torch's threads in that thread.
        max_running: Most calls in one pass.
        max_waiting: Most calls that are queued behind the running one.
        lock: Held during a pass.
        load: Where calls and the durations of passes are recorded.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result | LatentflowError]],
        *,
        threads: int,
        max_running: int,
        max_waiting: int,
        lock: ComputeLock,
        load: Load,
    ) -> None:
        self._run = run
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._lock = lock
        self._load = load
        self._mean = 0.0
        self._changed = threading.Condition()
        self._queued: deque[_Call[Item, Result]] = deque()
        self._running: list[_Call[Item, Result]] = []
        self._threads = threads
        self.start()

    async def run(self, item: Item, *, group: Hashable, size: PassSize, resumed: bool = False) -> Result:
        """The item's result. OverloadedError when the queue is full; a cancelled caller's item is not run.

        Args:
            group: Equal for items that can share a pass.
            size: What the duration of a pass of this item alone depends on.
            resumed: The call belongs to a request that has had forward passes here, so it is not a queued request.
        """
        call: _Call[Item, Result] = _Call(item=item, group=group, size=size, counts=not resumed)
        with self._changed:
            if len(self._queued) >= self._max_waiting + (not self._running):
                raise queue_full(queued=len(self._queued), limit=self._max_waiting, seconds_each=self._mean)
            self._queued.append(call)
            self._report()
            self._changed.notify()
        try:
            return await asyncio.wrap_future(call.result)
        finally:
            with self._changed:
                if call in self._queued:
                    self._queued.remove(call)
                    self._report()

    def start(self) -> None:
        """Starts the thread again after `close`."""
        self._closed = False
        self._thread = threading.Thread(target=self._loop, args=(self._threads,), name="model", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after the running pass; queued calls are cancelled."""
        with self._changed:
            self._closed = True
            for call in self._queued:
                call.result.cancel()
            self._queued.clear()
            self._changed.notify()
        self._thread.join()

    def _loop(self, threads: int) -> None:
        compute_with(threads)
        while batch := self._next():
            started = time.perf_counter()
            self._pass(batch)
            seconds = time.perf_counter() - started
            self._mean = moving_mean(self._mean, seconds)
            size = batch[0].size
            rows = sum(call.size.rows for call in batch)
            self._load.passed(size._replace(rows=rows), requests=len(batch), seconds=seconds)
            with self._changed:
                self._running = []
                self._report()
            # A thread that waits for calls keeps nothing of the last ones, such as a network that leaves the device.
            del batch
        # A lock that is still held would stop the other servers of the machine.
        self._lock.idle()
        malloc.return_freed_memory()

    def _next(self) -> list[_Call[Item, Result]]:
        """Waits for calls and for the lock; the first of the queue and those of its group. Empty: the worker is closed."""
        while True:
            with self._changed:
                while not (self._queued or self._closed):
                    self._lock.idle()
                    self._changed.wait()
                if self._closed:
                    return []
            # Calls that arrive while another server holds the lock share the pass.
            self._lock.take()
            with self._changed:
                if batch := self._first_group():
                    return batch

    def _first_group(self) -> list[_Call[Item, Result]]:
        """The calls of the next pass; empty if all callers have left."""
        batch: list[_Call[Item, Result]] = []
        if self._queued:
            group = self._queued[0].group
            batch = [call for call in self._queued if call.group == group][: self._max_running]
        for call in batch:
            self._queued.remove(call)
        # A caller that leaves from now on gets no result, but its item runs.
        self._running = [call for call in batch if call.result.set_running_or_notify_cancel()]
        self._report()
        return self._running

    @torch.inference_mode()
    def _pass(self, batch: Sequence[_Call[Item, Result]]) -> None:
        try:
            with self._lock:
                results = self._run([call.item for call in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].result.set_exception(out_of_memory() if is_out_of_memory(error) else error)
                return
            if is_out_of_memory(error):
                self._max_running = len(batch) // 2
                _log.warning("forward pass out of memory", calls=len(batch), largest_batch=self._max_running)
            # Only the item at fault fails.
            for call in batch:
                self._pass([call])
            return
        for call, result in zip(batch, results, strict=True):
            if isinstance(result, LatentflowError):
                call.result.set_exception(result)
            else:
                call.result.set_result(result)

    def _report(self) -> None:
        self._load.set(running=len(self._running), queued=sum(call.counts for call in self._queued))
