"""Scaling on one machine: reads the processes' metrics, applies the policy, and starts and ends replicas.

The policy is the cluster's. Only its times are shorter, because a process starts faster than a pod. Models whose bounds
allow one number of replicas only are not read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import structlog
from latentflow.internal.metrics import Instruments
from latentflow_scheduler import policy, scrapes
from latentflow_scheduler.policy import Bounds, Load, Settings, State
from latentflow_scheduler.scrapes import History, Scrape

from latentflow_local.replicas import Replicas
from latentflow_local.scraping import read

_log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """How often decisions are made, and from what.

    Attributes:
        interval_seconds: Time between two decisions.
        window_seconds: Time over which rates are computed.
        policy: Parameters of the policy.
    """

    interval_seconds: float = 1.0
    window_seconds: float = 10.0
    policy: Settings = field(
        default_factory=lambda: Settings(backlog_seconds=10.0, up_seconds=10.0, down_seconds=30.0, idle_seconds=90.0)
    )


DEFAULT_SCALING = ScalingConfig()


class Scaler:
    """Scales every model whose bounds allow more than one number of replicas.

    Args:
        bounds: Of every model.
        gateway: host:port of the gateway's `/metrics`.
        metrics: The instruments of the `SCHEDULER` table.
        clock: Seconds of a monotonic clock.
    """

    def __init__(
        self,
        replicas: Replicas,
        *,
        bounds: Mapping[str, Bounds],
        gateway: str,
        config: ScalingConfig,
        metrics: Instruments,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replicas = replicas
        self._bounds = {model: one for model, one in bounds.items() if one.minimum < one.maximum}
        self._gateway = gateway
        self._config = config
        self._metrics = metrics
        self._clock = clock
        self._states = {model: State() for model in self._bounds}
        self._histories: dict[str, History] = {}

    async def run(self) -> None:
        """Makes decisions until cancelled; returns at once if no model can be scaled."""
        while self._bounds:
            try:
                await self.step()
            except Exception:
                # A programming error. The processes keep running, and the next decision may succeed.
                _log.exception("a scaling decision failed")
            await asyncio.sleep(self._config.interval_seconds)

    async def step(self) -> None:
        """Makes one decision for each model."""
        now = self._clock()
        ready = {model: self._replicas.ready(model) for model in self._bounds}
        servers = [spec for specs in ready.values() for spec in specs]

        def parse(text: str) -> Scrape:
            return scrapes.parse_replica(text, time=now)

        held, answers = await asyncio.gather(
            read(self._gateway, scrapes.parse_held), asyncio.gather(*(read(spec.metrics, parse) for spec in servers))
        )
        histories = {spec.name: self._histories.get(spec.name, ()) for spec in servers}
        for spec, scrape in zip(servers, answers, strict=True):
            if scrape is not None:
                histories[spec.name] = scrapes.extended(
                    histories[spec.name], scrape, window=self._config.window_seconds
                )
        self._histories = histories
        for model, specs in ready.items():
            load = None
            if held is not None:
                names = [spec.name for spec in specs]
                load = scrapes.load(histories, ready=names, now=now, held=held.get(model, 0.0))
            self._decide(model, load, now=now)

    def _decide(self, model: str, load: Load | None, *, now: float) -> None:
        current, settings = self._replicas.count(model), self._config.policy
        decision, self._states[model] = policy.decide(
            load, current=current, bounds=self._bounds[model], state=self._states[model], now=now, settings=settings
        )
        # The label exists for the metric's use in a cluster, where a model has a namespace.
        labels = {"namespace": "", "model": model}
        self._metrics.of("latentflow_scheduler_replicas", **labels).set(decision.replicas)
        if load is not None:
            self._metrics.of("latentflow_scheduler_demand", **labels).set(policy.demand(load, settings))
        if decision.replicas != current:
            direction = "up" if decision.replicas > current else "down"
            self._metrics.of("latentflow_scheduler_decisions_total", direction=direction, **labels).inc()
            _log.info("scaling", model=model, before=current, after=decision.replicas, reason=decision.reason)
            self._replicas.scale(model, decision.replicas)
