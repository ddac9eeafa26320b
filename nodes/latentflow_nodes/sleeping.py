"""Sleep and wake of a server: a scheduler's decisions, each with an epoch, take effect one after the other.

A decision with a greater epoch replaces one that has not begun, and a Sleep that still waits for running calls; those are
refused as older ones. Otherwise it begins when the one before is complete. A decision continues when its caller has gone,
because the repetition of the call has to find its result.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog
from latentflow.errors import FailedPreconditionError, InvalidRequestError, UnimplementedError
from latentflow.internal.calls import Running
from latentflow.reasons import Reason

from latentflow_nodes.context import Context
from latentflow_nodes.engine import malloc
from latentflow_nodes.engine.device_memory import DeviceMemory, measure
from latentflow_nodes.roles.role import Role, asleep

_log = structlog.get_logger()
# How long calls may take to end at a step boundary, after the grace, and then at all.
_STOP_SECONDS = 60.0
_END_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a Sleep or Wake: the device after it, and the seconds since the call arrived."""

    memory: DeviceMemory
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Decision:
    epoch: int
    wakes: bool
    task: asyncio.Task[Result]

    @property
    def has_failed(self) -> bool:
        return self.task.done() and (self.task.cancelled() or self.task.exception() is not None)


class Sleeping:
    """Puts a server to sleep and wakes it. Runs in the event loop.

    Args:
        running: The server's calls.
        report: Reports to those who watch the server's health whether it admits calls.

    Attributes:
        asleep_bytes: Memory that the server used when it last fell asleep; 0: it never did.
    """

    def __init__(
        self, context: Context, role: Role, *, running: Running, report: Callable[[bool], Awaitable[None]]
    ) -> None:
        self._context = context
        self._role = role
        self._running = running
        self._report = report
        self._last: _Decision | None = None
        # In which the running calls of a Sleep may end.
        self._grace: asyncio.Timeout | None = None
        self.asleep_bytes = 0
        context.metrics.of("latentflow_weights_bytes").set(role.weights_bytes)

    async def sleep(self, epoch: int, *, grace: float) -> Result:
        """Moves the weights off the device. Calls are refused from now on until the server is awake again.

        Args:
            grace: Seconds that running calls may take to end. The others are stopped, at a step boundary where they can be
                resumed.

        Raises:
            FailedPreconditionError: Reason STALE_EPOCH; a decision with a greater epoch is known, or came within the grace.
            UnimplementedError: The weights are divided among ranks.
        """
        return await self._decide(epoch, wakes=False, act=lambda: self._sleep(epoch, grace))

    async def wake(self, epoch: int) -> Result:
        """Moves the weights back, and returns after the first forward pass. Raises as `Role.wake`, and as `sleep`."""
        return await self._decide(epoch, wakes=True, act=lambda: self._wake(epoch))

    async def close(self) -> None:
        """Waits for the decision in progress. The running calls have to be ended before."""
        if self._last is not None:
            await asyncio.wait([self._last.task])

    async def _decide(self, epoch: int, *, wakes: bool, act: Callable[[], Awaitable[DeviceMemory]]) -> Result:
        if not epoch:
            raise InvalidRequestError("The epoch of a Sleep or Wake must be at least 1.")
        if self._context.settings.tensor > 1:
            raise UnimplementedError("A server whose weights are divided among ranks does not sleep in this version.")
        last = self._last
        self._check_latest(epoch)
        if last is not None and epoch == last.epoch and wakes != last.wakes:
            raise FailedPreconditionError(
                f"The epoch {epoch} belongs to a {'Wake' if last.wakes else 'Sleep'}; every decision needs a greater one.",
                reason=Reason.STALE_EPOCH,
            )
        if last is None or epoch > last.epoch or last.has_failed:
            task = asyncio.create_task(self._act(epoch, last, act, arrived=time.perf_counter()))
            last = self._last = _Decision(epoch=epoch, wakes=wakes, task=task)
            if self._grace is not None and not self._grace.expired():
                self._grace.reschedule(asyncio.get_running_loop().time())
        return await asyncio.shield(last.task)

    async def _act(
        self, epoch: int, before: _Decision | None, act: Callable[[], Awaitable[DeviceMemory]], *, arrived: float
    ) -> Result:
        if before is not None:
            await asyncio.wait([before.task])
        self._check_latest(epoch)
        memory = await act()
        return Result(memory=memory, seconds=time.perf_counter() - arrived)

    async def _sleep(self, epoch: int, grace: float) -> DeviceMemory:
        started = time.perf_counter()
        was_awake = self._context.load.is_awake
        self._running.pause(asleep)
        self._context.load.set_awake(False)
        await self._report(False)
        if was_awake:
            try:
                await self._end_calls(epoch, grace)
            except BaseException:
                await self._admit()
                raise
        await self._role.sleep()
        self._context.peers.drop_adapters()
        await asyncio.to_thread(malloc.return_freed_memory)
        memory = measure(self._context.device)
        self._context.load.took_effect(epoch)
        if was_awake:
            self.asleep_bytes = memory.used
            seconds = time.perf_counter() - started
            metrics = self._context.metrics
            metrics.of("latentflow_asleep_bytes").set(memory.used)
            metrics.of("latentflow_sleeps_total").inc()
            metrics.of("latentflow_sleep_seconds_total").inc(seconds)
            _log.info("asleep", epoch=epoch, seconds=seconds, bytes=memory.used)
        return memory

    async def _end_calls(self, epoch: int, grace: float) -> None:
        """Returns when no call uses the weights. FailedPreconditionError where a greater epoch came within the grace."""
        with contextlib.suppress(TimeoutError):
            try:
                async with asyncio.timeout(grace) as self._grace:
                    await self._running.ended()
            finally:
                self._grace = None
        self._check_latest(epoch)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_SECONDS):
                await self._role.stop_calls()
        self._running.interrupt()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                await self._running.ended()

    async def _wake(self, epoch: int) -> DeviceMemory:
        started = time.perf_counter()
        if not self._context.load.is_awake:
            await self._role.wake()
            await self._admit()
            seconds = time.perf_counter() - started
            self._context.metrics.of("latentflow_loads_total", kind="wake").inc()
            self._context.metrics.of("latentflow_load_seconds_total", kind="wake").inc(seconds)
            _log.info("awake", epoch=epoch, seconds=seconds)
        self._context.load.took_effect(epoch)
        return measure(self._context.device)

    def _check_latest(self, epoch: int) -> None:
        if self._last is not None and self._last.epoch > epoch:
            raise _stale(epoch, self._last.epoch)

    async def _admit(self) -> None:
        self._running.resume()
        self._context.load.set_awake(True)
        await self._report(True)


def _stale(epoch: int, known: int) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"The decision with the epoch {epoch} is older than that with the epoch {known}, which this server has received.",
        reason=Reason.STALE_EPOCH,
    )
