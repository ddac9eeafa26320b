"""Brings the cluster to what workflows say: reads the store, asks the pure modules what should be, writes the difference.

Two passes, each over one object and from the present state alone: over a model (the DiffusionModel, what serves it, its
status) and over a workflow (its status, which also says what serves it). An event only says which passes to make, so an
event that comes twice, late, or after a crash changes nothing in the outcome. Handlers feed `seen` and `gone`.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import structlog
from kubernetes.client import ApiException
from latentflow.api.model import ModelSpec
from latentflow.api.status import ConditionType
from latentflow.api.types import API_VERSION, MODEL_LABEL, Source

from latentflow_operator import conditions, manifests
from latentflow_operator.binding import Binding, Conflict, bind, wished
from latentflow_operator.cluster import Cluster
from latentflow_operator.comparison import covered, sealed
from latentflow_operator.downloads import Downloads
from latentflow_operator.manifests import MANAGED, Manifest
from latentflow_operator.pinning import Pins, ask_hub, recorded
from latentflow_operator.settings import OperatorSettings
from latentflow_operator.store import Known, Store, bound_models, place_of
from latentflow_operator.troubles import Trouble, is_ready
from latentflow_operator.workqueue import WorkQueue

_log = structlog.get_logger()
_GONE, _CHANGED = 404, 409
_NAMESPACE_ENDS = "is being terminated"


class Key(NamedTuple):
    """What a pass is over: "workflow" or "model", and which."""

    what: str
    namespace: str
    name: str


class Reconciler:
    """Both passes, and which of them an object's change asks for.

    Args:
        clock: The present time; UTC.
        ask: The commit of an hf:// source; None: asks the hub.
    """

    def __init__(
        self,
        *,
        cluster: Cluster,
        settings: OperatorSettings,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        workers: int = 4,
        ask: Callable[[Source], str] | None = None,
    ) -> None:
        self.store = Store()
        self._cluster = cluster
        self._settings = settings
        self._clock = clock
        # Since when no workflow is served by a model any more.
        self._left: dict[tuple[str, str], float] = {}
        self.queue: WorkQueue[Key] = WorkQueue(self._pass, workers=workers)
        ask = ask or functools.partial(ask_hub, endpoint=settings.hub_endpoint)
        self._pins: Pins[Key] = Pins(ask, wake=self.queue.add)
        self.downloads = Downloads(store=self.store, changed=lambda place: self.queue.add(Key("model", *place)))

    def seen(self, body: Manifest) -> None:
        """An object is as `body` says."""
        before = self._uses(body)
        if self.store.put(body):
            self._ask(body, before)

    def gone(self, body: Manifest) -> None:
        """An object was deleted."""
        before = self._uses(body)
        if self.store.drop(body):
            self._ask(body, before)

    def _uses(self, body: Manifest) -> frozenset[str]:
        known = self.store.workflow(*place_of(body)) if body["kind"] == "DiffusionWorkflow" else None
        return known.uses if known else frozenset()

    def _ask(self, body: Manifest, before: frozenset[str]) -> None:
        namespace, name = place_of(body)
        if body["kind"] == "DiffusionWorkflow":
            self.queue.add(Key("workflow", namespace, name))
            for model in before | self._uses(body):
                self.queue.add(Key("model", namespace, model))
        elif body["kind"] == "DiffusionModel":
            self._ask_models(namespace, name)
            for user in self.store.users(namespace, name):
                self.queue.add(Key("workflow", namespace, user.body["metadata"]["name"]))
        elif model := body["metadata"].get("labels", {}).get(MODEL_LABEL):
            self._ask_models(namespace, model)

    def _ask_models(self, namespace: str, name: str) -> None:
        """Asks for passes over a model, over those that run in its pods, and over that in whose pods it runs."""
        self.queue.add(Key("model", namespace, name))
        spec = (self.store.get("DiffusionModel", namespace, name) or {"spec": {}})["spec"]
        for other in (*spec.get("colocated", ()), *filter(None, [spec.get("host")])):
            self.queue.add(Key("model", namespace, other["model"]))

    async def _pass(self, key: Key) -> None:
        try:
            if key.what == "workflow":
                await self._workflow(key.namespace, key.name)
            else:
                await self._model(key.namespace, key.name)
        except ApiException as error:
            # Somebody else was quicker, or everything here is about to go: the watch tells, and asks for another pass.
            if error.status in (_GONE, _CHANGED) or _NAMESPACE_ENDS in str(error.body):
                _log.info("the object has changed meanwhile", key=key, status=error.status)
                return
            raise

    async def _model(self, namespace: str, name: str) -> None:
        body = self.store.get("DiffusionModel", namespace, name)
        if body is None or _is_ours(body):
            body = await self._owned(namespace, name, body)
        if body is None or "deletionTimestamp" in body["metadata"]:
            return
        spec = ModelSpec.model_validate(body["spec"])
        source = recorded(spec.source, body.get("status", {}))
        if source is None:
            answer = self._pins.of(spec.source, Key("model", namespace, name))
            if not isinstance(answer, Source):
                if answer is not None:
                    refused = Trouble(
                        about=ConditionType.WEIGHTS_AVAILABLE, reason=answer.reason, message=answer.message
                    )
                    await self._model_status(body, spec, refused=refused)
                return
            source = answer
            # Recorded before the first pod starts, so that a crash between the two changes nothing.
            body = await self._model_status(body, spec, source=source)
        colocated = []
        for one in spec.colocated or ():
            known = self.store.get("DiffusionModel", namespace, one.model) or {}
            found = recorded(one.source, known.get("status", {}))
            if found is None:
                # Its own pass asks, records, and says why not; then this one is asked for.
                await self._model_status(body, spec, source=source)
                return
            colocated.append(one.model_copy(update={"source": found}))
        pinned = spec.model_copy(update={"source": source, "colocated": colocated or None})
        for wish in manifests.manifests(
            name=name, namespace=namespace, uid=body["metadata"]["uid"], spec=pinned, settings=self._settings
        ):
            await self._ensure(wish)
        await self._model_status(body, spec, source=source)

    async def _owned(self, namespace: str, name: str, body: Manifest | None) -> Manifest | None:
        """Makes, changes or deletes a model as its workflows say; what it is then."""
        users = self.store.users(namespace, name)
        wish = wished(user.owner for user in users if user.owner is not None).get(name)
        if not users:
            if body is None or "deletionTimestamp" in body["metadata"]:
                return None
            if (seconds := self._still_needed(body)) > 0:
                self.queue.add_later(Key("model", namespace, name), seconds)
                return body
            await asyncio.to_thread(self._cluster.delete, body)
            _log.info("retired a model that no workflow uses", namespace=namespace, model=name)
            return None
        self._left.pop((namespace, name), None)
        if wish is None and body is None:
            return None
        if body is not None and "deletionTimestamp" in body["metadata"]:
            return body
        current = ModelSpec.model_validate(body["spec"]) if body is not None else None
        if wish is None:
            # Changed away from, but it serves until its successor is ready.
            spec = current
        else:
            # Where its pods stand was decided when it was made; moving them would interrupt it.
            spec = (
                wish.spec
                if current is None
                else wish.spec.model_copy(update={"preferred_host": current.preferred_host})
            )
        if spec is None:
            return None
        owners = [_owner(user) for user in users]
        return await self._ensure(
            manifests.model_manifest(name=name, namespace=namespace, spec=spec, owners=sorted(owners))
        )

    def _still_needed(self, body: Manifest) -> float:
        """For how many seconds a model that workflows have changed away from is kept.

        Requests that gateways have begun with it still need it, at a later stage; of a workflow that is gone there are none.
        """
        namespace, name = place_of(body)
        owners = [self.store.workflow(namespace, ref["name"]) for ref in body["metadata"].get("ownerReferences", ())]
        if not _is_true(body, ConditionType.WEIGHTS_AVAILABLE) or not any(
            owner is not None and "deletionTimestamp" not in owner.body["metadata"] for owner in owners
        ):
            return 0.0
        now = asyncio.get_running_loop().time()
        since = self._left.setdefault((namespace, name), now)
        stays = self._settings.retire_seconds
        return since + (self._settings.drain_seconds if stays is None else stays) - now

    async def _ensure(self, wish: Manifest) -> Manifest:
        """Applies an object unless it is so already; what it is then."""
        wish = sealed(wish)
        live = self.store.get(wish["kind"], *place_of(wish))
        if live is not None and covered(wish, live):
            return live
        return self._written(await asyncio.to_thread(self._cluster.apply, wish))

    def _written(self, body: Manifest) -> Manifest:
        self.seen(body)
        return self.store.get(body["kind"], *place_of(body)) or body

    async def _model_status(
        self,
        body: Manifest,
        spec: ModelSpec,
        *,
        source: Source | None = None,
        refused: Trouble | None = None,
    ) -> Manifest:
        """Says what has become of a model; the model with that.

        Args:
            source: As resolved; None while it is not.
            refused: Why not.
        """
        namespace, name = place_of(body)
        host, of_pods = manifests.pods_of(name, spec), self._host(body)
        pods = list(self.store.pods(namespace, host))
        before = conditions.by_type(body)
        statements = conditions.of_model(
            wanted=manifests.replicas(of_pods),
            deployment=self.store.get("Deployment", namespace, host),
            pods=pods,
            is_own=manifests.is_its_container(name, spec),
            before=before,
            blind=self._is_blind(body, spec),
            wakes=self._settings.scaling is not None and of_pods.scaling.mode == "Managed",
            refused=refused,
            downloading=self.downloads.said((namespace, name), before),
        )
        alive = conditions.replicas(pods)
        status = {
            "observedGeneration": body["metadata"]["generation"],
            "conditions": self._stamped(statements, before, body),
            "replicas": len(alive),
            "readyReplicas": sum(map(is_ready, alive)),
            "selector": f"{MODEL_LABEL}={host}",
            # This version's servers spread neither a request nor weights.
            "parallelism": {"latent": 1, "tensor": 1},
        }
        if source is not None:
            status["source"] = source.model_dump(mode="json", by_alias=True, exclude_none=True)
        return await self._say(body, status)

    def _is_blind(self, body: Manifest, spec: ModelSpec) -> bool:
        """Whether who scales a model knows nothing of its load; what was said before somebody else scaled it is past."""
        said = body.get("status", {}).get("scheduling", {}).get("signals")
        return said == "Missing" and self._settings.scaling is not None and spec.scaling.mode == "Managed"

    def _host(self, body: Manifest) -> ModelSpec:
        """The model in whose pods a model runs."""
        namespace, name = place_of(body)
        spec = ModelSpec.model_validate(body["spec"])
        host = self.store.get("DiffusionModel", namespace, manifests.pods_of(name, spec))
        return ModelSpec.model_validate(host["spec"]) if host else spec

    async def _workflow(self, namespace: str, name: str) -> None:
        known = self.store.workflow(namespace, name)
        if known is None or known.owner is None or "deletionTimestamp" in known.body["metadata"]:
            return
        body, workflow = known.body, known.owner.workflow
        models = {model: self.store.get("DiffusionModel", namespace, model) for model in known.uses}
        bindings = bind(
            workflow,
            bound_models(body),
            is_ready=lambda model: conditions.takes_over(models.get(model)),
            has_served=lambda model: _is_true(models.get(model), ConditionType.WEIGHTS_AVAILABLE),
        )
        statements = conditions.of_workflow(
            bindings=bindings, models=models, conflicts=self._conflicts(known, bindings)
        )
        before = conditions.by_type(body)
        entries = [self._entry(binding, models.get(binding.model)) for binding in bindings]
        status: dict[str, Any] = {
            "observedGeneration": body["metadata"]["generation"],
            "conditions": self._stamped(statements, before, body),
            "models": entries,
            "modelsReady": f"{sum(entry['readyReplicas'] > 0 for entry in entries)}/{len(entries)}",
        }
        if self._settings.endpoint is not None:
            status["endpoint"] = self._settings.endpoint
        await self._say(body, status)

    def _entry(self, binding: Binding, model: Manifest | None) -> Manifest:
        status = (model or {}).get("status", {})
        entry = {
            "name": binding.name,
            "role": binding.role.value,
            "model": binding.model,
            "replicas": manifests.replicas(self._host(model)) if model else 0,
            "readyReplicas": status.get("readyReplicas", 0),
            **{key: status[key] for key in ("parallelism", "scheduling") if key in status},
        }
        return entry if binding.next is None else entry | {"next": binding.next}

    def _conflicts(self, known: Known, bindings: tuple[Binding, ...]) -> list[Conflict]:
        """Where this workflow's word on a shared model does not stand."""
        namespace = known.body["metadata"]["namespace"]
        uid = known.body["metadata"]["uid"]
        found = []
        for model in sorted({binding.next or binding.model for binding in bindings}):
            users = self.store.users(namespace, model)
            if len(users) > 1:
                wish = wished(user.owner for user in users if user.owner is not None).get(model)
                found += [conflict for conflict in (wish.conflicts if wish else ()) if conflict.uid == uid]
        return found

    def _stamped(
        self, statements: tuple[conditions.Statement, ...], before: Mapping[str, Manifest], body: Manifest
    ) -> list[Manifest]:
        now = self._clock().strftime("%Y-%m-%dT%H:%M:%SZ")
        return conditions.stamped(statements, before=before, now=now, generation=body["metadata"]["generation"])

    async def _say(self, body: Manifest, status: Manifest) -> Manifest:
        """Writes a status that differs, and an Event where Ready has changed; the object with that status."""
        old = body.get("status", {})
        if all(old.get(key) == value for key, value in status.items()):
            return body
        namespace, name = place_of(body)
        metadata = {"name": name, "namespace": namespace}
        wish = {"apiVersion": API_VERSION, "kind": body["kind"], "metadata": metadata, "status": status}
        written = self._written(await asyncio.to_thread(self._cluster.apply_status, wish))
        event = conditions.transition(body, status, now=self._clock())
        if event is not None:
            await asyncio.to_thread(self._cluster.create, event)
        return written


def _is_ours(body: Manifest) -> bool:
    labels = body["metadata"].get("labels", {})
    return all(labels.get(key) == value for key, value in MANAGED.items())


def _is_true(body: Manifest | None, about: ConditionType) -> bool:
    return conditions.by_type(body).get(about.value, {}).get("status") == "True"


def _owner(known: Known) -> manifests.Owner:
    return manifests.Owner(name=known.body["metadata"]["name"], uid=known.body["metadata"]["uid"])
