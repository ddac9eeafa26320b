"""The scheduler in a cluster: reads the signals, asks the policy, writes the scale subresource and why.

Writes only when it decides on another number, or when signals stop or come back, so that a steady cluster sees no write of
it. Every decision leaves its reason in `status.scheduling`, an Event and a metric.
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
from latentflow.api.model import ModelSpec
from latentflow.api.types import API_VERSION
from latentflow.errors import UnavailableError
from latentflow.internal.metrics import Instruments
from latentflow_scheduler import policy, signals
from latentflow_scheduler.policy import Bounds, Decision, Load, State
from latentflow_scheduler.signals import ModelKey, Signals

from latentflow_operator import events, manifests
from latentflow_operator.cluster import Cluster
from latentflow_operator.manifests import Manifest
from latentflow_operator.settings import ScalingSettings
from latentflow_operator.store import Store, place_of

MANAGER = "latentflow-scheduler"
_log = structlog.get_logger()
_GONE, _CHANGED = 404, 409
# How soon a request for a model without replicas is noticed.
_WAKE_SECONDS = 1.0


class Scaler:
    """Scales every Managed model of a store.

    Args:
        seen: Told what has been written.
        cluster: Writes as `MANAGER`.
        clock: Seconds, never going back.
    """

    def __init__(
        self,
        *,
        store: Store,
        seen: Callable[[Manifest], object],
        cluster: Cluster,
        settings: ScalingSettings,
        metrics: Instruments,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._seen = seen
        self._cluster = cluster
        self._settings = settings
        self._policy = settings.policy()
        self._metrics = metrics
        self._clock = clock
        self._states: dict[ModelKey, State] = {}
        # Since when nothing is known of a model.
        self._unseen: dict[ModelKey, float] = {}

    async def run(self) -> None:
        """Decides again and again, until cancelled; at once when a gateway holds a request for a model without replicas."""
        async with aiohttp.ClientSession() as session:
            while True:
                try:
                    await self.step(await self._signals(session), await self._held(session))
                    await self._until_due(session)
                except Exception:
                    # A defect of ours: one round is lost, not the operator that reconciles beside it.
                    _log.exception("a round of scaling failed")
                    await asyncio.sleep(self._settings.interval_seconds)

    async def step(self, known: Signals | None, held: Mapping[ModelKey, float]) -> None:
        """One decision for each model.

        Args:
            known: None where the signals could not be read.
            held: Requests that gateways hold, as they say themselves.
        """
        models = {place_of(body): body for body in self._store.all("DiffusionModel")}
        self._states = {place: self._states.get(place, State()) for place in models}
        self._unseen = {place: since for place, since in self._unseen.items() if place in models}
        inside = self._hosts()
        held = signals.held_by_host(held, inside)
        known = replace(known, held=signals.held_by_host(known.held, inside)) if known else None
        for place, body in models.items():
            if "deletionTimestamp" in body["metadata"]:
                continue
            try:
                await self._decide(place, body, known, held)
            except (ApiException, urllib3.exceptions.HTTPError) as error:
                if not (isinstance(error, ApiException) and error.status in (_GONE, _CHANGED)):
                    _log.warning("could not scale; trying again", model="/".join(place), error=str(error))

    async def _until_due(self, session: aiohttp.ClientSession) -> None:
        due = self._clock() + self._settings.interval_seconds
        while (left := due - self._clock()) > 0:
            await asyncio.sleep(min(left, _WAKE_SECONDS))
            asleep = self._asleep()
            if asleep and not asleep.isdisjoint(signals.held_by_host(await self._held(session), self._hosts())):
                return

    def _asleep(self) -> set[ModelKey]:
        """Models that have no replicas until somebody asks."""
        return {
            place_of(body)
            for body in self._store.all("DiffusionModel")
            if body["spec"].get("replicas") == 0 and body["spec"]["scaling"]["mode"] == "Managed"
        }

    def _hosts(self) -> dict[ModelKey, ModelKey]:
        """In whose pods models run that have none of their own."""
        models = {place_of(body): body["spec"].get("host") for body in self._store.all("DiffusionModel")}
        return {place: (place[0], host["model"]) for place, host in models.items() if host}

    async def _held(self, session: aiohttp.ClientSession) -> dict[ModelKey, float]:
        if self._settings.gateways is None:
            return {}
        return await signals.held(session, self._settings.gateways)

    async def _signals(self, session: aiohttp.ClientSession) -> Signals | None:
        try:
            return await signals.read(session, self._settings.prometheus, window=self._settings.window_seconds)
        except UnavailableError as error:
            _log.warning("no signals; every model stays as it is", error=error.message)
            return None

    async def _decide(
        self, place: ModelKey, body: Manifest, known: Signals | None, held: Mapping[ModelKey, float]
    ) -> None:
        spec = ModelSpec.model_validate(body["spec"])
        if spec.scaling.mode != "Managed" or spec.host is not None:
            return
        current = manifests.replicas(spec)
        ready = body.get("status", {}).get("readyReplicas", 0)
        load = signals.load(known, held, place, ready=ready, current=current)
        for colocated in spec.colocated or ():
            # The pod is as busy as the busiest in it.
            other = signals.load(known, {}, (place[0], colocated.model), ready=ready, current=current)
            if load and other and policy.demand(other, self._policy) > policy.demand(load, self._policy):
                load = other
        decision, state = policy.decide(
            load,
            current=current,
            bounds=Bounds(minimum=spec.scaling.min_replicas, maximum=spec.scaling.max_replicas),
            state=self._states[place],
            now=self._clock(),
            settings=self._policy,
        )
        namespace, model = place
        self._metrics.of("latentflow_scheduler_replicas", namespace=namespace, model=model).set(decision.replicas)
        if load is not None:
            wanted = policy.demand(load, self._policy)
            self._metrics.of("latentflow_scheduler_demand", namespace=namespace, model=model).set(wanted)
        was_blind = body.get("status", {}).get("scheduling", {}).get("signals") == "Missing"
        blind = self._is_blind(place, known, load, ready=ready, was=was_blind)
        if decision.replicas != current:
            # Why comes before what: after a crash between the two the decision is made, told and carried out again.
            direction = "up" if decision.replicas > current else "down"
            await self._tell(body, decision, reason=f"Scaled{direction.capitalize()}", blind=blind)
            await asyncio.to_thread(self._cluster.scale, body, decision.replicas)
            self._metrics.of(
                "latentflow_scheduler_decisions_total", namespace=namespace, model=model, direction=direction
            ).inc()
            _log.info(
                "scaled", model=f"{namespace}/{model}", before=current, after=decision.replicas, why=decision.reason
            )
        elif blind != was_blind and (was_blind or spec.scaling.min_replicas < spec.scaling.max_replicas):
            await self._tell(body, decision, reason="SignalsMissing" if blind else "SignalsBack", blind=blind)
        # Only what has been written is remembered: a decision that failed is made again.
        self._states[place] = state

    def _is_blind(self, place: ModelKey, known: Signals | None, load: Load | None, *, ready: int, was: bool) -> bool:
        """Whether nothing is known of a model, and has not been for so long that it is worth telling.

        A Prometheus that misses one answer is not worth a write for each model, and new servers have to be scraped first.
        """
        if load is not None or (known is not None and ready == 0):
            self._unseen.pop(place, None)
            return False
        since = self._unseen.setdefault(place, self._clock())
        return was or self._clock() - since >= (1 if known is None else 2) * self._settings.window_seconds

    async def _tell(self, body: Manifest, decision: Decision, *, reason: str, blind: bool) -> None:
        namespace, name = place_of(body)
        now = datetime.now(UTC)
        scheduling = {
            "replicas": decision.replicas,
            "reason": decision.reason,
            "signals": "Missing" if blind else "Present",
            "time": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        wish = {
            "apiVersion": API_VERSION,
            "kind": body["kind"],
            "metadata": {"name": name, "namespace": namespace},
            "status": {"scheduling": scheduling},
        }
        self._seen(await asyncio.to_thread(self._cluster.apply_status, wish))
        told = events.event(
            body, reason=reason, note=decision.reason, warning=reason == "SignalsMissing", action="Scale", now=now
        )
        await asyncio.to_thread(self._cluster.create, told)
