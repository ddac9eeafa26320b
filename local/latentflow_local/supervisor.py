"""Keeps processes running: notices at once when one ends, starts it again with patience, ends them in order.

Runs in an event loop; what happens is told to a listener (the command's table, a test).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from latentflow.errors import FailedPreconditionError
from latentflow.internal import serving
from latentflow.internal.metrics import Instruments

from latentflow_local import processes
from latentflow_local.planning import ProcessSpec

_log = structlog.get_logger()
_LONGEST_PAUSE = 10.0
# Having ended so often without ever being ready, a process is given up.
_MAX_STARTS = 6
# Having run for so long, a process counts as healthy and its next restart is immediate again.
_HEALTHY_SECONDS = 30.0
_CHECK_SECONDS = 0.1
_KILL_SECONDS = 5.0


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(kw_only=True)
class Supervised:
    """A process and what became of it."""

    spec: ProcessSpec
    state: State = State.STARTING
    restarts: int = 0
    started: float = field(default_factory=time.monotonic)
    ready_seconds: float | None = None
    process: processes.Process | None = None
    # Set when it shall end for good.
    removed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None else None


def pause(failures: int) -> float:
    """Seconds before restart number `failures`: the first at once, then doubling from a quarter of a second."""
    return 0.0 if failures <= 1 else min(_LONGEST_PAUSE, 0.25 * 2.0 ** (failures - 2))


class Supervisor:
    """Runs specs, and what is added to them, until left; an async context manager.

    Args:
        drain: Seconds that processes get to end by themselves.
        changed: Called after every change of a state.
        metrics: The `LOCAL` table's.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        *,
        environment: dict[str, str],
        drain: float,
        changed: Callable[[Supervised], None] = lambda _: None,
        metrics: Instruments,
    ) -> None:
        self._metrics = metrics
        self.supervised = {spec.name: Supervised(spec=spec) for spec in specs}
        self._environment = environment
        self._drain = drain
        self._changed = changed
        self._keeping: dict[str, asyncio.Task[None]] = {}
        self._removing: dict[str, asyncio.Task[None]] = {}
        self._news = asyncio.Condition()
        self._stopping = False

    async def __aenter__(self) -> Supervisor:
        self._keeping = {name: asyncio.create_task(self._keep(one)) for name, one in self.supervised.items()}
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        for one in self.supervised.values():
            _signal(one, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain):
                await asyncio.gather(*(_ended(one) for one in self.supervised.values()))
        for one in self.supervised.values():
            _signal(one, signal.SIGKILL)
        tasks = [*self._keeping.values(), *self._removing.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KILL_SECONDS):
                await asyncio.gather(*(_ended(one) for one in self.supervised.values()))

    def add(self, spec: ProcessSpec) -> None:
        """Starts one more process. Its name is that of none in `supervised`."""
        one = self.supervised[spec.name] = Supervised(spec=spec)
        self._keeping[spec.name] = asyncio.create_task(self._keep(one))

    def remove(self, name: str) -> None:
        """Ends a process for good, as at the end of all; it is gone from `supervised` when it has ended."""
        one = self.supervised[name]
        one.removed.set()
        self._removing[name] = asyncio.create_task(self._remove(one))

    async def ready(self, seconds: float) -> None:
        """Waits until all are ready. FailedPreconditionError when one cannot be started, or the time runs out."""

        def states() -> list[Supervised]:
            return [one for one in self.supervised.values() if not one.removed.is_set()]

        try:
            async with asyncio.timeout(seconds), self._news:
                await self._news.wait_for(
                    lambda: (
                        any(s.state is State.FAILED for s in states()) or all(s.state is State.READY for s in states())
                    )
                )
        except TimeoutError:
            late = ", ".join(s.spec.name for s in states() if s.state is not State.READY)
            raise FailedPreconditionError(
                f"Not ready after {seconds:.0f} s: {late}. Their logs above say why.", reason="NOT_READY"
            ) from None
        for one in states():
            if one.state is State.FAILED:
                raise _cannot_be_served(one)

    async def until(self, condition: Callable[[], bool], *, seconds: float) -> None:
        """Waits for something about the processes to be so. TimeoutError when it is not in time."""
        async with asyncio.timeout(seconds), self._news:
            await self._news.wait_for(condition)

    async def failed(self) -> None:
        """Returns never, or raises when a model cannot be served: none of its processes can be started."""
        async with self._news:
            lost = await self._news.wait_for(self._lost)
        raise _cannot_be_served(lost[0])

    def _lost(self) -> list[Supervised]:
        served = {one.spec.model for one in self.supervised.values() if one.state is not State.FAILED}
        return [one for one in self.supervised.values() if one.spec.model not in served]

    async def _keep(self, one: Supervised) -> None:
        failures = 0
        while True:
            one.started = time.monotonic()
            one.process = await self._start(one.spec)
            if one.removed.is_set() or self._stopping:
                _signal(one, signal.SIGTERM)
            checking = asyncio.create_task(self._check(one))
            await _ended(one)
            checking.cancel()
            await asyncio.gather(checking, return_exceptions=True)
            if self._stopping:
                await self._tell(one, State.STOPPED)
                return
            if one.removed.is_set():
                return
            code = one.process.exitcode
            failures = 1 if time.monotonic() - one.started > _HEALTHY_SECONDS else failures + 1
            if code == serving.CANNOT_SERVE or (one.ready_seconds is None and failures == _MAX_STARTS):
                await self._tell(one, State.FAILED)
                return
            one.restarts += 1
            self._metrics.of("latentflow_local_restarts_total", process=one.spec.name).inc()
            _log.warning("process ended; starting it again", name=one.spec.name, exit_code=code, after=pause(failures))
            await self._tell(one, State.RESTARTING)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause(failures)):
                    await one.removed.wait()
                    return

    async def _start(self, spec: ProcessSpec) -> processes.Process:
        starting = asyncio.ensure_future(asyncio.to_thread(processes.start, spec, environment=self._environment))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            # A thread cannot be called back: what it starts is ended, or nobody would know it.
            process = await starting
            process.kill()
            await asyncio.to_thread(process.join)
            raise

    async def _remove(self, one: Supervised) -> None:
        name, keeping = one.spec.name, self._keeping[one.spec.name]
        await self._tell(one, State.DRAINING)
        _signal(one, signal.SIGTERM)
        await asyncio.wait({keeping}, timeout=self._drain)
        _signal(one, signal.SIGKILL)
        await keeping
        del self.supervised[name], self._keeping[name], self._removing[name]
        await self._tell(one, State.STOPPED)

    async def _check(self, one: Supervised) -> None:
        """Tells when the process takes requests."""
        request = health_pb2.HealthCheckRequest(service="")
        async with grpc.aio.insecure_channel(one.spec.address, [("grpc.initial_reconnect_backoff_ms", 50)]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while True:
                with contextlib.suppress(grpc.RpcError):
                    response = await stub.Check(request, timeout=1.0)
                    if response.status == health_pb2.HealthCheckResponse.SERVING:
                        break
                await asyncio.sleep(_CHECK_SECONDS)
        one.ready_seconds = time.monotonic() - one.started
        if not one.removed.is_set():
            await self._tell(one, State.READY)

    async def _tell(self, one: Supervised, state: State) -> None:
        self._metrics.of("latentflow_local_ready", process=one.spec.name).set(state is State.READY)
        async with self._news:
            one.state = state
            self._news.notify_all()
        self._changed(one)


def _cannot_be_served(one: Supervised) -> FailedPreconditionError:
    uses = f" ({', '.join(one.spec.uses)})" if one.spec.uses else ""
    return FailedPreconditionError(
        f"{one.spec.role} {one.spec.name}{uses} cannot be served; the line that it printed above says why.",
        reason="PROCESS_FAILED",
    )


async def _ended(one: Supervised) -> None:
    """Returns when the process has ended; at once where there is none."""
    process = one.process
    if process is None or process.exitcode is not None:
        return
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    sentinel = process.sentinel
    loop.add_reader(sentinel, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(sentinel)
    await asyncio.to_thread(process.join)


def _signal(one: Supervised, signum: signal.Signals) -> None:
    process = one.process
    if process is not None and process.exitcode is None and process.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signum)
