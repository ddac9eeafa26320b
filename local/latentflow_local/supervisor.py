"""Keeps processes running: detects at once that one has ended, restarts it with backoff, and ends all of them in order.

It runs in an event loop and reports every change of state to a callback.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from multiprocessing.connection import Connection
from types import TracebackType

import structlog
from latentflow.errors import FailedPreconditionError
from latentflow.internal import serving
from latentflow.internal.metrics import Instruments
from latentflow.reasons import Reason

from latentflow_local import processes, scraping
from latentflow_local.planning import ProcessSpec

_log = structlog.get_logger()
_MAX_BACKOFF_SECONDS = 10.0
# A process that has ended this often without ever being ready is not restarted again.
_MAX_STARTS = 6
# A process that has run for this long counts as healthy, and its next restart is immediate again.
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
    """A process and its state.

    Attributes:
        failure: The message with which its last process ended, if that could not serve.
    """

    spec: ProcessSpec
    state: State = State.STARTING
    restarts: int = 0
    started: float = field(default_factory=time.monotonic)
    ready_seconds: float | None = None
    process: processes.Process | None = None
    failure: str | None = None
    # Set when the process must end and not be restarted.
    removed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None else None


def backoff(failures: int) -> float:
    """Seconds before restart number `failures`: none before the first, then doubling from a quarter of a second."""
    return 0.0 if failures <= 1 else min(_MAX_BACKOFF_SECONDS, 0.25 * 2.0 ** (failures - 2))


class Supervisor:
    """Runs processes while its context is entered; an async context manager.

    Args:
        specs: The processes that it starts when entered.
        drain: Seconds that a process gets to end by itself before it is killed.
        on_change: Called after every change of a process's state.
        metrics: The instruments of the `LOCAL` table.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        *,
        environment: dict[str, str],
        drain: float,
        on_change: Callable[[Supervised], None] = lambda _: None,
        metrics: Instruments,
    ) -> None:
        self._metrics = metrics
        self.supervised = {spec.name: Supervised(spec=spec) for spec in specs}
        self._environment = environment
        self._drain = drain
        self._on_change = on_change
        self._supervising: dict[str, asyncio.Task[None]] = {}
        self._removing: dict[str, asyncio.Task[None]] = {}
        self._state_changed = asyncio.Condition()
        self._stopping = False

    async def __aenter__(self) -> Supervisor:
        self._supervising = {name: asyncio.create_task(self._supervise(one)) for name, one in self.supervised.items()}
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        forked = [one for one in self.supervised.values() if one.spec.device == "cpu"]
        if forked and not any(one.process for one in forked):
            processes.stop_preparing()
        for one in self.supervised.values():
            _signal(one, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain):
                await asyncio.gather(*(_wait_exit(one) for one in self.supervised.values()))
        for one in self.supervised.values():
            _signal(one, signal.SIGKILL)
        tasks = [*self._supervising.values(), *self._removing.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KILL_SECONDS):
                await asyncio.gather(*(_wait_exit(one) for one in self.supervised.values()))

    def add(self, spec: ProcessSpec) -> None:
        """Starts one more process. Its name must not be in `supervised`."""
        one = self.supervised[spec.name] = Supervised(spec=spec)
        self._supervising[spec.name] = asyncio.create_task(self._supervise(one))

    def remove(self, name: str) -> None:
        """Ends a process and does not restart it. It leaves `supervised` once it has ended."""
        one = self.supervised[name]
        one.removed.set()
        self._removing[name] = asyncio.create_task(self._remove(one))

    async def wait_ready(self, seconds: float) -> None:
        """Waits until all processes are ready. FailedPreconditionError if one cannot be started, or after `seconds`."""

        def states() -> list[Supervised]:
            return [one for one in self.supervised.values() if not one.removed.is_set()]

        try:
            async with asyncio.timeout(seconds), self._state_changed:
                await self._state_changed.wait_for(
                    lambda: (
                        any(s.state is State.FAILED for s in states()) or all(s.state is State.READY for s in states())
                    )
                )
        except TimeoutError:
            late = ", ".join(s.spec.name for s in states() if s.state is not State.READY)
            raise FailedPreconditionError(
                f"Not ready after {seconds:.0f} s: {late}. Their logs above show the reason.", reason=Reason.NOT_READY
            ) from None
        for one in states():
            if one.state is State.FAILED:
                raise _cannot_be_served(one)

    async def wait_for(self, condition: Callable[[], bool], *, seconds: float) -> None:
        """Waits until a condition on the processes holds. TimeoutError after `seconds`."""
        async with asyncio.timeout(seconds), self._state_changed:
            await self._state_changed.wait_for(condition)

    async def wait_failed(self) -> None:
        """Waits until none of a model's processes can be started, and raises FailedPreconditionError."""
        async with self._state_changed:
            unserved = await self._state_changed.wait_for(self._unserved)
        raise _cannot_be_served(unserved[0])

    def _unserved(self) -> list[Supervised]:
        served = {one.spec.model for one in self.supervised.values() if one.state is not State.FAILED}
        return [one for one in self.supervised.values() if one.spec.model not in served]

    async def _supervise(self, one: Supervised) -> None:
        failures = 0
        while True:
            one.started = time.monotonic()
            failure, sent = multiprocessing.Pipe(duplex=False)
            one.process = await self._start(one.spec, failure=sent)
            if one.removed.is_set() or self._stopping:
                _signal(one, signal.SIGTERM)
            readiness = asyncio.create_task(self._watch_readiness(one))
            await _wait_exit(one)
            readiness.cancel()
            await asyncio.gather(readiness, return_exceptions=True)
            one.failure = processes.message(failure)
            if self._stopping:
                await self._set_state(one, State.STOPPED)
                return
            if one.removed.is_set():
                return
            code = one.process.exitcode
            failures = 1 if time.monotonic() - one.started > _HEALTHY_SECONDS else failures + 1
            if code == serving.CANNOT_SERVE or (one.ready_seconds is None and failures == _MAX_STARTS):
                await self._set_state(one, State.FAILED)
                return
            one.restarts += 1
            self._metrics.of("latentflow_local_restarts_total", process=one.spec.name).inc()
            _log.warning("process ended; restarting it", name=one.spec.name, exit_code=code, seconds=backoff(failures))
            await self._set_state(one, State.RESTARTING)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff(failures)):
                    await one.removed.wait()
                    return

    async def _start(self, spec: ProcessSpec, *, failure: Connection) -> processes.Process:
        starting = asyncio.ensure_future(asyncio.to_thread(self._started, spec, failure))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The thread cannot be cancelled, so this ends the process that it starts. Nothing else refers to it.
            with contextlib.suppress(EOFError):
                process = await starting
                process.kill()
                await asyncio.to_thread(process.join)
            raise

    def _started(self, spec: ProcessSpec, failure: Connection) -> processes.Process:
        """A started process. EOFError while the supervisor ends, because the fork server has ended or need not start again."""
        if self._stopping:
            raise EOFError
        return processes.start(spec, environment=self._environment, failure=failure)

    async def _remove(self, one: Supervised) -> None:
        name, supervising = one.spec.name, self._supervising[one.spec.name]
        await self._set_state(one, State.DRAINING)
        _signal(one, signal.SIGTERM)
        await asyncio.wait({supervising}, timeout=self._drain)
        _signal(one, signal.SIGKILL)
        await supervising
        del self.supervised[name], self._supervising[name], self._removing[name]
        await self._set_state(one, State.STOPPED)

    async def _watch_readiness(self, one: Supervised) -> None:
        """Waits until the process accepts requests and records that."""
        # Not by a call: a gateway with TLS may have a certificate that is not valid for its address.
        while True:
            if await scraping.read(one.spec.metrics, scraping.is_ready):
                break
            await asyncio.sleep(_CHECK_SECONDS)
        one.ready_seconds = time.monotonic() - one.started
        if not one.removed.is_set():
            await self._set_state(one, State.READY)

    async def _set_state(self, one: Supervised, state: State) -> None:
        self._metrics.of("latentflow_local_ready", process=one.spec.name).set(state is State.READY)
        async with self._state_changed:
            one.state = state
            self._state_changed.notify_all()
        self._on_change(one)


def _cannot_be_served(one: Supervised) -> FailedPreconditionError:
    uses = f" ({', '.join(one.spec.uses)})" if one.spec.uses else ""
    return FailedPreconditionError(
        f"{one.spec.role} {one.spec.name}{uses} cannot be served"
        + (f": {one.failure}" if one.failure else "; the last line of its log above shows the reason."),
        reason=Reason.PROCESS_FAILED,
    )


async def _wait_exit(one: Supervised) -> None:
    """Waits until the process has ended; returns at once if there is none."""
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
