"""The scheduler of this machine: reads what servers and gateway say, asks the policy, adds and removes replicas.

The policy is the cluster's; only its times are shorter, as a process starts faster than a pod. A model whose bounds leave no
choice is not read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import TypeVar

import structlog
from latentflow.internal.metrics import Instruments
from latentflow_scheduler import policy, scrapes
from latentflow_scheduler.policy import Bounds, Load, Settings, State
from latentflow_scheduler.scrapes import Scrape, Track

from latentflow_local.replicas import Replicas

_log = structlog.get_logger()
_READ_SECONDS = 2.0

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast models are scaled.

    Attributes:
        interval_seconds: Between two decisions.
        window_seconds: Over which rates are taken.
        settings: How a load becomes a number of replicas.
    """

    interval_seconds: float = 1.0
    window_seconds: float = 10.0
    settings: Settings = field(
        default_factory=lambda: Settings(backlog_seconds=10.0, up_seconds=10.0, down_seconds=30.0, idle_seconds=90.0)
    )


PACE = Pace()


class Scaler:
    """Scales every model that may have more replicas or fewer.

    Args:
        bounds: Of every model.
        gateway: host:port of the gateway's /metrics.
        metrics: The `SCHEDULER` table's.
        clock: Seconds, never going back.
    """

    def __init__(
        self,
        replicas: Replicas,
        *,
        bounds: Mapping[str, Bounds],
        gateway: str,
        pace: Pace,
        metrics: Instruments,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replicas = replicas
        self._bounds = {model: one for model, one in bounds.items() if one.fewest < one.most}
        self._gateway = gateway
        self._pace = pace
        self._metrics = metrics
        self._clock = clock
        self._states = {model: State() for model in self._bounds}
        self._tracks: dict[str, Track] = {}

    async def run(self) -> None:
        """Decides again and again, until cancelled; returns where there is nothing to decide."""
        while self._bounds:
            try:
                await self.step()
            except Exception:
                # A defect of ours: what runs goes on, and the next decision may work.
                _log.exception("a scaling decision failed")
            await asyncio.sleep(self._pace.interval_seconds)

    async def step(self) -> None:
        """One decision for each model."""
        now = self._clock()
        ready = {model: self._replicas.ready(model) for model in self._bounds}
        servers = [spec for specs in ready.values() for spec in specs]

        def parse(text: str) -> Scrape:
            return scrapes.replica(text, time=now)

        held, said = await asyncio.gather(
            _read(self._gateway, scrapes.held), asyncio.gather(*(_read(spec.metrics, parse) for spec in servers))
        )
        tracks = {spec.name: self._tracks.get(spec.name, ()) for spec in servers}
        for spec, scrape in zip(servers, said, strict=True):
            if scrape is not None:
                tracks[spec.name] = scrapes.longer(tracks[spec.name], scrape, window=self._pace.window_seconds)
        self._tracks = tracks
        for model, specs in ready.items():
            load = None
            if held is not None:
                names = [spec.name for spec in specs]
                load = scrapes.load(tracks, ready=names, now=now, held=held.get(model, 0.0))
            self._decide(model, load, now=now)

    def _decide(self, model: str, load: Load | None, *, now: float) -> None:
        current, settings = self._replicas.count(model), self._pace.settings
        decision, self._states[model] = policy.decide(
            load, current=current, bounds=self._bounds[model], state=self._states[model], now=now, settings=settings
        )
        # As in a cluster, where a model has a namespace too.
        labels = {"namespace": "", "model": model}
        self._metrics.of("latentflow_scheduler_replicas", **labels).set(decision.replicas)
        if load is not None:
            self._metrics.of("latentflow_scheduler_demand", **labels).set(policy.demand(load, settings))
        if decision.replicas != current:
            direction = "up" if decision.replicas > current else "down"
            self._metrics.of("latentflow_scheduler_decisions_total", direction=direction, **labels).inc()
            _log.info("scaling", model=model, before=current, after=decision.replicas, why=decision.reason)
            self._replicas.scale(model, decision.replicas)


async def _read(address: str, parse: Callable[[str], T]) -> T | None:
    """What a process's /metrics says; None where it does not answer."""

    def read() -> T | None:
        host, _, port = address.rpartition(":")
        connection = HTTPConnection(host, int(port), timeout=_READ_SECONDS)
        try:
            connection.request("GET", "/metrics")
            return parse(connection.getresponse().read().decode())
        except (OSError, HTTPException, ValueError):
            return None
        finally:
            connection.close()

    return await asyncio.to_thread(read)
