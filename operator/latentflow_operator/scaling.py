"""The scheduler in a cluster: reads the signals, asks the policy, writes the scale subresource and why.

Writes only when it decides on another number, or when signals stop or come back, so that a steady cluster sees no write of
it. Every decision leaves its reason in `status.scheduling`, an Event and a metric.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime

import aiohttp
import structlog
from kubernetes.client import ApiException
from latentflow.api.types import API_VERSION, ModelSpec
from latentflow.errors import UnavailableError
from latentflow.metrics import Instruments
from latentflow_scheduler import policy, signals
from latentflow_scheduler.policy import Bounds, Decision, State
from latentflow_scheduler.signals import Place, Signals

from latentflow_operator import events, manifests
from latentflow_operator.cluster import Cluster
from latentflow_operator.manifests import Manifest
from latentflow_operator.settings import ScalingSettings
from latentflow_operator.store import Store, place_of

MANAGER = "latentflow-scheduler"
_log = structlog.get_logger()
_GONE, _CHANGED = 404, 409


class Scaler:
    """Scales every Managed model of a store.

    Args:
        cluster: Writes as `MANAGER`.
        clock: Seconds, never going back.
    """

    def __init__(
        self,
        *,
        store: Store,
        cluster: Cluster,
        settings: ScalingSettings,
        metrics: Instruments,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._cluster = cluster
        self._settings = settings
        self._policy = settings.policy()
        self._metrics = metrics
        self._clock = clock
        self._states: dict[Place, State] = {}
        self._blind: set[Place] = set()

    async def run(self) -> None:
        """Decides again and again, until cancelled."""
        async with aiohttp.ClientSession() as session:
            while True:
                await self.step(await self._signals(session))
                await asyncio.sleep(self._settings.interval_seconds)

    async def step(self, known: Signals | None) -> None:
        """One decision for each model.

        Args:
            known: None where the signals could not be read.
        """
        models = {place_of(body): body for body in self._store.all("DiffusionModel")}
        self._states = {place: self._states.get(place, State()) for place in models}
        self._blind &= models.keys()
        inside = {
            place: (place[0], on["model"]) for place, body in models.items() if (on := body["spec"].get("inside"))
        }
        known = known.gathered(inside) if known else None
        for place, body in models.items():
            if "deletionTimestamp" in body["metadata"]:
                continue
            try:
                await self._decide(place, body, known)
            except ApiException as error:
                if error.status not in (_GONE, _CHANGED):
                    _log.warning("could not scale; trying again", model="/".join(place), error=str(error))

    async def _signals(self, session: aiohttp.ClientSession) -> Signals | None:
        try:
            return await signals.read(session, self._settings.prometheus, window=self._settings.window_seconds)
        except UnavailableError as error:
            _log.warning("no signals; every model stays as it is", error=error.message)
            return None

    async def _decide(self, place: Place, body: Manifest, known: Signals | None) -> None:
        spec = ModelSpec.model_validate(body["spec"])
        if spec.scaling.mode != "Managed" or spec.inside is not None:
            return
        current = manifests.replicas(spec)
        load = known.of(place, ready=body.get("status", {}).get("readyReplicas", 0)) if known else None
        decision, state = policy.decide(
            load,
            current=current,
            bounds=Bounds(fewest=spec.scaling.min_replicas, most=spec.scaling.max_replicas),
            state=self._states[place],
            now=self._clock(),
            settings=self._policy,
        )
        namespace, model = place
        self._metrics.of("latentflow_scheduler_replicas", namespace=namespace, model=model).set(decision.replicas)
        if load is not None:
            wanted = policy.demand(load, self._policy)
            self._metrics.of("latentflow_scheduler_demand", namespace=namespace, model=model).set(wanted)
        if decision.replicas != current:
            await asyncio.to_thread(self._cluster.scale, body, decision.replicas)
            direction = "up" if decision.replicas > current else "down"
            await self._tell(body, decision, reason=f"Scaled{direction.capitalize()}", warning=False)
            self._metrics.of(
                "latentflow_scheduler_decisions_total", namespace=namespace, model=model, direction=direction
            ).inc()
            _log.info(
                "scaled", model=f"{namespace}/{model}", before=current, after=decision.replicas, why=decision.reason
            )
        elif spec.scaling.min_replicas < spec.scaling.max_replicas:
            await self._watch_sight(place, body, decision, blind=known is None)
        # Only what has been written is remembered: a decision that failed is made again.
        self._states[place] = state

    async def _watch_sight(self, place: Place, body: Manifest, decision: Decision, *, blind: bool) -> None:
        """Says, once, that signals are missing, or that they have come back."""
        if blind and place not in self._blind:
            await self._tell(body, decision, reason="SignalsMissing", warning=True)
            self._blind.add(place)
        elif not blind and place in self._blind:
            await self._tell(body, decision, reason="SignalsBack", warning=False)
            self._blind.discard(place)

    async def _tell(self, body: Manifest, decision: Decision, *, reason: str, warning: bool) -> None:
        namespace, name = place_of(body)
        now = datetime.now(UTC)
        scheduling = {
            "replicas": decision.replicas,
            "reason": decision.reason,
            "time": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        wish = {
            "apiVersion": API_VERSION,
            "kind": body["kind"],
            "metadata": {"name": name, "namespace": namespace},
            "status": {"scheduling": scheduling},
        }
        await asyncio.to_thread(self._cluster.apply_status, wish)
        told = events.event(body, reason=reason, note=decision.reason, warning=warning, action="Scale", now=now)
        await asyncio.to_thread(self._cluster.create, told)
