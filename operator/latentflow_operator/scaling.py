"""The scheduler in a cluster: reads the signals, applies the policy, and writes the scale subresource and the reason.

It writes only when it decides on another number of replicas, or when signals are lost or restored, so that it writes
nothing in a steady cluster. It records the reason of every decision in `status.scheduling`, an Event and a metric.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime

import aiohttp
import structlog
import urllib3
from kubernetes.client import ApiException
from latentflow.api.types import API_VERSION, ModelSpec
from latentflow.errors import UnavailableError
from latentflow.internal.metrics import Instruments
from latentflow_scheduler import policy, signals
from latentflow_scheduler.policy import Bounds, Decision, Load, State
from latentflow_scheduler.signals import ModelKey, Signals

from latentflow_operator import events, manifests
from latentflow_operator.cluster import Cluster
from latentflow_operator.manifests import Manifest
from latentflow_operator.objects import Model
from latentflow_operator.settings import ScalingSettings
from latentflow_operator.store import Store

MANAGER = "latentflow-scheduler"
_log = structlog.get_logger()
_NOT_FOUND, _CONFLICT = 404, 409
# How often gateways are read for held requests while a model has no replicas.
_WAKE_SECONDS = 1.0


class Scaler:
    """Scales every Managed model of a store.

    Args:
        observe: Called with the object that the server returned for a write.
        cluster: Writes as `MANAGER`.
        clock: Seconds of a monotonic clock.
    """

    def __init__(
        self,
        *,
        store: Store,
        observe: Callable[[Manifest], object],
        cluster: Cluster,
        settings: ScalingSettings,
        metrics: Instruments,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._observe = observe
        self._cluster = cluster
        self._settings = settings
        self._policy = settings.policy()
        self._metrics = metrics
        self._clock = clock
        self._states: dict[ModelKey, State] = {}
        # Since when the load of a model has been unknown.
        self._unknown_since: dict[ModelKey, float] = {}

    async def run(self) -> None:
        """Makes decisions until cancelled, and at once when a gateway holds a request for a model without replicas."""
        async with aiohttp.ClientSession() as session:
            while True:
                try:
                    await self.step(await self._signals(session), await self._held(session))
                    await self._wait(session)
                except Exception:
                    # A programming error. One round is lost, but the reconciliation in this process continues.
                    _log.exception("a round of scaling failed")
                    await asyncio.sleep(self._settings.interval_seconds)

    async def step(self, known: Signals | None, held: Mapping[ModelKey, float]) -> None:
        """Makes one decision for each model.

        Args:
            known: None if the signals could not be read.
            held: Held requests as the gateways report them.
        """
        models = {model.key: model for model in self._store.models()}
        self._states = {key: self._states.get(key, State()) for key in models}
        self._unknown_since = {key: since for key, since in self._unknown_since.items() if key in models}
        hosts = self._hosts()
        held = signals.held_by_host(held, hosts)
        known = replace(known, held=signals.held_by_host(known.held, hosts)) if known else None
        for model in models.values():
            if model.deleting or model.spec is None:
                continue
            try:
                await self._decide(model, model.spec, known, held)
            except (ApiException, urllib3.exceptions.HTTPError) as error:
                if not (isinstance(error, ApiException) and error.status in (_NOT_FOUND, _CONFLICT)):
                    _log.warning("could not scale a model; retrying", model="/".join(model.key), error=str(error))

    async def _wait(self, session: aiohttp.ClientSession) -> None:
        """Waits for the next round, which a held request for a model without replicas starts early."""
        due = self._clock() + self._settings.interval_seconds
        while (left := due - self._clock()) > 0:
            await asyncio.sleep(min(left, _WAKE_SECONDS))
            scaled_to_zero = self._scaled_to_zero()
            if scaled_to_zero and not scaled_to_zero.isdisjoint(
                signals.held_by_host(await self._held(session), self._hosts())
            ):
                return

    def _scaled_to_zero(self) -> set[ModelKey]:
        """Managed models that have no replicas until the next request."""
        return {
            model.key
            for model in self._store.models()
            if model.spec is not None and model.spec.replicas == 0 and model.spec.scaling.mode == "Managed"
        }

    def _hosts(self) -> dict[ModelKey, ModelKey]:
        """The hosts of colocated models."""
        return {
            model.key: (model.namespace, model.spec.host.model)
            for model in self._store.models()
            if model.spec is not None and model.spec.host is not None
        }

    async def _held(self, session: aiohttp.ClientSession) -> dict[ModelKey, float]:
        if self._settings.gateways is None:
            return {}
        return await signals.held(session, self._settings.gateways)

    async def _signals(self, session: aiohttp.ClientSession) -> Signals | None:
        try:
            return await signals.read(session, self._settings.prometheus, window=self._settings.window_seconds)
        except UnavailableError as error:
            _log.warning("no signals; every model keeps its replicas", error=error.message)
            return None

    async def _decide(
        self, model: Model, spec: ModelSpec, known: Signals | None, held: Mapping[ModelKey, float]
    ) -> None:
        if spec.scaling.mode != "Managed" or spec.host is not None:
            return
        current, ready = manifests.replicas(spec), model.ready_replicas
        load = signals.load(known, held, model.key, ready=ready, current=current)
        for colocated in spec.colocated or ():
            # The load of a pod is that of its busiest model.
            other = signals.load(known, {}, (model.namespace, colocated.model), ready=ready, current=current)
            if load and other and policy.demand(other, self._policy) > policy.demand(load, self._policy):
                load = other
        decision, state = policy.decide(
            load,
            current=current,
            bounds=Bounds(minimum=spec.scaling.min_replicas, maximum=spec.scaling.max_replicas),
            state=self._states[model.key],
            now=self._clock(),
            settings=self._policy,
        )
        labels = {"namespace": model.namespace, "model": model.name}
        self._metrics.of("latentflow_scheduler_replicas", **labels).set(decision.replicas)
        if load is not None:
            self._metrics.of("latentflow_scheduler_demand", **labels).set(policy.demand(load, self._policy))
        lacks_signals = self._lacks_signals(model, known, load)
        if decision.replicas != current:
            # The reason is written first: after a crash between the two writes, the decision is made and recorded
            # again.
            direction = "up" if decision.replicas > current else "down"
            await self._record(model, decision, reason=f"Scaled{direction.capitalize()}", lacks_signals=lacks_signals)
            await asyncio.to_thread(self._cluster.scale, model, decision.replicas)
            self._metrics.of("latentflow_scheduler_decisions_total", direction=direction, **labels).inc()
            _log.info(
                "scaled",
                model="/".join(model.key),
                before=current,
                after=decision.replicas,
                reason=decision.reason,
            )
        elif lacks_signals != model.lacks_signals and (
            model.lacks_signals or spec.scaling.min_replicas < spec.scaling.max_replicas
        ):
            reason = "SignalsMissing" if lacks_signals else "SignalsRestored"
            await self._record(model, decision, reason=reason, lacks_signals=lacks_signals)
        # The state is kept only after the writes, so that a decision whose write failed is made again.
        self._states[model.key] = state

    def _lacks_signals(self, model: Model, known: Signals | None, load: Load | None) -> bool:
        """Whether the load has been unknown for long enough to be reported.

        One failed query is not worth a write for each model, and new servers have to be scraped first.
        """
        if load is not None or (known is not None and model.ready_replicas == 0):
            self._unknown_since.pop(model.key, None)
            return False
        since = self._unknown_since.setdefault(model.key, self._clock())
        windows = 1 if known is None else 2
        return model.lacks_signals or self._clock() - since >= windows * self._settings.window_seconds

    async def _record(self, model: Model, decision: Decision, *, reason: str, lacks_signals: bool) -> None:
        """Writes a decision to the model's status, and an Event."""
        now = datetime.now(UTC)
        scheduling = {
            "replicas": decision.replicas,
            "reason": decision.reason,
            "signals": "Missing" if lacks_signals else "Present",
            "time": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        manifest: Manifest = {
            "apiVersion": API_VERSION,
            "kind": model.kind,
            "metadata": {"name": model.name, "namespace": model.namespace},
            "status": {"scheduling": scheduling},
        }
        self._observe(await asyncio.to_thread(self._cluster.apply_status, manifest))
        event = events.event(
            model, reason=reason, note=decision.reason, warning=reason == "SignalsMissing", action="Scale", now=now
        )
        await asyncio.to_thread(self._cluster.create, event)
