"""Reconciles the cluster with its workflows: reads the store, computes the desired objects, and writes the differences.

There are two passes, each over one object and from the present state alone: over a model (its DiffusionModel, the
objects that serve it, its status) and over a workflow (its status, which also names the models that serve it). An event
only selects the passes to run, so that an event that arrives twice, late, or after a crash does not change the outcome.
The handlers call `observe` and `forget`.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple

import structlog
from kubernetes.client import ApiException
from latentflow.api.fields import without_effect
from latentflow.api.status import ConditionType
from latentflow.api.types import API_VERSION, MODEL_LABEL, ModelSpec, Source

from latentflow_operator import conditions, manifests
from latentflow_operator.binding import Binding, Conflict, Owner, bind, desired_models
from latentflow_operator.cluster import Cluster
from latentflow_operator.comparison import covers, with_digest
from latentflow_operator.container_failures import Failure
from latentflow_operator.downloads import Downloads
from latentflow_operator.manifests import MANAGED, Manifest, OwnerReference
from latentflow_operator.objects import Body, KubeObject, Model, ObjectKey, Workflow, key_of
from latentflow_operator.pinning import Pins, Refusal, all_recorded, recorded, resolve_commit
from latentflow_operator.settings import OperatorSettings
from latentflow_operator.store import Store
from latentflow_operator.workqueue import WorkQueue

_log = structlog.get_logger()
_NOT_FOUND, _CONFLICT = 404, 409
_NAMESPACE_TERMINATES = "is being terminated"


class Key(NamedTuple):
    """The object of a pass: "workflow" or "model", its namespace and its name."""

    what: str
    namespace: str
    name: str


class Reconciler:
    """Runs both passes, and selects the passes that a change of an object requires.

    Args:
        clock: The present time in UTC.
        resolve: Resolves the revision of an hf:// source to a commit; None: asks the hub.
    """

    def __init__(
        self,
        *,
        cluster: Cluster,
        settings: OperatorSettings,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        workers: int = 4,
        resolve: Callable[[Source], str] | None = None,
    ) -> None:
        self.store = Store()
        self._cluster = cluster
        self._settings = settings
        self._clock = clock
        # Since when a model has served no workflow.
        self._unused_since: dict[ObjectKey, float] = {}
        self.queue: WorkQueue[Key] = WorkQueue(self._pass, workers=workers)
        resolve = resolve or functools.partial(resolve_commit, endpoint=settings.hub_endpoint)
        self._pins: Pins[Key] = Pins(resolve, notify=self.queue.add)
        self.downloads = Downloads(store=self.store, on_change=lambda key: self.queue.add(Key("model", *key)))

    def observe(self, body: Body) -> None:
        """Takes in the state of an object, and enqueues the passes that it requires."""
        before = self.store.workflow(*key_of(body))
        if (new := self.store.put(body)) is not None:
            self._enqueue(new, before)

    def forget(self, body: Body) -> None:
        """Takes in the deletion of an object, and enqueues the passes that it requires."""
        if (old := self.store.drop(body)) is not None:
            self._enqueue(old)

    def _enqueue(self, changed: KubeObject, before: Workflow | None = None) -> None:
        """Enqueues the passes that a change of an object requires; `before` is the earlier state of a workflow."""
        if isinstance(changed, Workflow):
            self.queue.add(Key("workflow", *changed.key))
            for model in changed.uses | (before.uses if before is not None else frozenset()):
                self.queue.add(Key("model", changed.namespace, model))
        elif isinstance(changed, Model):
            self._enqueue_models(*changed.key)
            for user in self.store.users(*changed.key):
                self.queue.add(Key("workflow", *user.key))
        elif changed.model is not None:
            self._enqueue_models(changed.namespace, changed.model)

    def _enqueue_models(self, namespace: str, name: str) -> None:
        """Enqueues passes over a model, over the models colocated with it, and over its host."""
        self.queue.add(Key("model", namespace, name))
        model = self.store.model(namespace, name)
        if model is None or model.spec is None:
            return
        for colocated in model.spec.colocated or ():
            self.queue.add(Key("model", namespace, colocated.model))
        if model.spec.host is not None:
            self.queue.add(Key("model", namespace, model.spec.host.model))

    async def _pass(self, key: Key) -> None:
        try:
            if key.what == "workflow":
                await self._reconcile_workflow(key.namespace, key.name)
            else:
                await self._reconcile_model(key.namespace, key.name)
        except ApiException as error:
            # Another writer was faster, or the namespace is being deleted. The watch reports either and enqueues
            # another pass.
            if error.status in (_NOT_FOUND, _CONFLICT) or _NAMESPACE_TERMINATES in str(error.body):
                _log.info("the object changed during the pass", key=key, status=error.status)
                return
            raise

    async def _reconcile_model(self, namespace: str, name: str) -> None:
        model = self.store.model(namespace, name)
        if model is None or _is_managed(model):
            model = await self._reconcile_ownership(namespace, name, model)
        if model is None or model.deleting:
            return
        if model.spec is None:
            _log.error("this version cannot read the spec of a DiffusionModel", namespace=namespace, model=name)
            return
        spec = model.spec
        pinned = all_recorded(spec, model.resolved)
        if pinned is None:
            pinned = await self._resolve(model, spec)
            if pinned is None:
                return
            # The commits are recorded before the first pod starts, so that a crash between the two changes nothing.
            model = await self._write_model_status(model, spec, pinned=pinned)
        colocated = []
        for one in spec.colocated or ():
            known = self.store.model(namespace, one.model)
            found = all_recorded(one, known.resolved if known is not None else {})
            if found is None:
                # The pass over that model resolves its sources, reports a failure, and enqueues this pass again.
                await self._write_model_status(model, spec, pinned=pinned)
                return
            colocated.append(found)
        served = pinned.model_copy(update={"colocated": colocated or None})
        for manifest in manifests.manifests(
            name=name, namespace=namespace, uid=model.uid, spec=served, settings=self._settings
        ):
            await self._ensure(manifest)
        await self._write_model_status(model, spec, pinned=pinned)

    async def _resolve(self, model: Model, spec: ModelSpec) -> ModelSpec | None:
        """The spec with commits as the revisions of its hub sources; None where one is not known yet, or refused."""
        found: dict[str, Source] = {}
        for name, source in spec.sources().items():
            answer = recorded(source, model.resolved.get(name)) or self._pins.of(source, Key("model", *model.key))
            if isinstance(answer, Refusal):
                unresolved = Failure(
                    condition=ConditionType.WEIGHTS_AVAILABLE, reason=answer.reason, message=answer.message
                )
                await self._write_model_status(model, spec, unresolved=unresolved)
            if not isinstance(answer, Source):
                return None
            found[name] = answer
        return spec.with_sources(found)

    async def _reconcile_ownership(self, namespace: str, name: str, model: Model | None) -> Model | None:
        """Creates, changes or deletes a model as its workflows require. Returns the resulting model, if any."""
        users = self.store.users(namespace, name)
        desired = desired_models(_owners(users)).get(name)
        if not users:
            if model is None or model.deleting:
                return None
            if (seconds := self._retention(model)) > 0:
                self.queue.add_later(Key("model", namespace, name), seconds)
                return model
            await asyncio.to_thread(self._cluster.delete, model)
            _log.info("deleted a model that no workflow uses", namespace=namespace, model=name)
            return None
        self._unused_since.pop((namespace, name), None)
        if desired is None and model is None:
            return None
        if model is not None and model.deleting:
            return model
        current = model.spec if model is not None else None
        if desired is None:
            # No workflow names it any more, but it serves until its successor is ready.
            spec = current
        else:
            # The preferred host was chosen when the model was created. A change would move its pods and interrupt them.
            kept = {} if current is None else {"preferred_host": current.preferred_host}
            spec = desired.spec.model_copy(update=kept)
        if spec is None:
            return model
        owners = sorted(OwnerReference(name=user.name, uid=user.uid) for user in users)
        await self._ensure(manifests.model_manifest(name=name, namespace=namespace, spec=spec, owners=owners))
        return self.store.model(namespace, name)

    def _retention(self, model: Model) -> float:
        """For how many more seconds an unused model is kept.

        Running requests that began with it need it in a later stage. There are none if its workflows have been deleted.
        With the rollout Replace its successor needs its devices, so it is not kept.
        """
        if model.spec is not None and model.spec.rollout == "Replace":
            return 0.0
        owners = [self.store.workflow(model.namespace, name) for name in model.owners]
        if not model.is_true(ConditionType.WEIGHTS_AVAILABLE) or not any(
            owner is not None and not owner.deleting for owner in owners
        ):
            return 0.0
        now = asyncio.get_running_loop().time()
        since = self._unused_since.setdefault(model.key, now)
        seconds = self._settings.retire_seconds
        return since + (self._settings.drain_seconds if seconds is None else seconds) - now

    async def _ensure(self, manifest: Manifest) -> None:
        """Applies a manifest unless the object already has this state."""
        manifest = with_digest(manifest)
        live = self.store.get(manifest["kind"], *key_of(manifest))
        if live is None or not covers(live.manifest, manifest):
            self.observe(await asyncio.to_thread(self._cluster.apply, manifest))

    async def _write_model_status(
        self,
        model: Model,
        spec: ModelSpec,
        *,
        pinned: ModelSpec | None = None,
        unresolved: Failure | None = None,
    ) -> Model:
        """Writes the status of a model. Returns the model with it.

        Args:
            pinned: The spec with its resolved sources; None if they are not resolved.
            unresolved: Why they could not be resolved.
        """
        host, of_pods = manifests.pods_of(model.name, spec), self._host_spec(model, spec)
        pods = list(self.store.pods(model.namespace, host))
        statements = conditions.of_model(
            wanted=manifests.replicas(of_pods),
            deployment=self.store.get("Deployment", model.namespace, host),
            pods=pods,
            is_own=manifests.is_own_container(model.name, spec),
            previous=model.conditions,
            # A record of missing signals from before the model was scaled by others does not count.
            lacks_signals=model.lacks_signals and self._settings.scaling is not None and spec.scaling.mode == "Managed",
            can_wake=self._settings.scaling is not None and of_pods.scaling.mode == "Managed",
            unresolved=unresolved,
            downloading=self.downloads.progress(model.key, model.conditions),
        )
        alive = conditions.replicas(pods)
        ready = sum(pod.ready for pod in alive)
        status = {
            "observedGeneration": model.generation,
            "conditions": self._timestamped(statements, model),
            "replicas": len(alive),
            "readyReplicas": ready,
            "selector": f"{MODEL_LABEL}={host}",
            "parallelism": {
                "latent": conditions.latent(spec.parallelism.latent, ready=ready),
                "tensor": spec.parallelism.tensor_degree,
            },
        }
        if pinned is not None:
            resolved = pinned.model_dump(mode="json", by_alias=True, exclude_none=True, include={"source", "nets"})
            status |= resolved
        await self._write_status(model, status)
        return self.store.model(*model.key) or model

    def _host_spec(self, model: Model, spec: ModelSpec) -> ModelSpec:
        """The spec of the model in whose pods a model runs: of its host, or its own."""
        host = self.store.model(model.namespace, manifests.pods_of(model.name, spec))
        return host.spec if host is not None and host.spec is not None else spec

    async def _reconcile_workflow(self, namespace: str, name: str) -> None:
        workflow = self.store.workflow(namespace, name)
        if workflow is None or workflow.definition is None or workflow.deleting:
            return
        models = {model: self.store.model(namespace, model) for model in workflow.uses}
        bindings = bind(
            workflow.definition,
            workflow.bound,
            is_ready=lambda model: conditions.can_take_over(models.get(model)),
            has_served=lambda model: _has_served(models.get(model)),
        )
        statements = conditions.of_workflow(
            bindings=bindings,
            models=models,
            conflicts=self._conflicts(workflow, bindings),
            without_effect=tuple(without_effect(workflow.definition.spec)),
        )
        entries = [self._entry(binding, models.get(binding.model)) for binding in bindings]
        status: dict[str, Any] = {
            "observedGeneration": workflow.generation,
            "conditions": self._timestamped(statements, workflow),
            "models": entries,
            "modelsReady": f"{sum(entry['readyReplicas'] > 0 for entry in entries)}/{len(entries)}",
        }
        if self._settings.endpoint is not None:
            status["endpoint"] = self._settings.endpoint
        await self._write_status(workflow, status)

    def _entry(self, binding: Binding, model: Model | None) -> Body:
        spec = model.spec if model is not None else None
        entry: Body = {
            "name": binding.name,
            "role": binding.role.value,
            "model": binding.model,
            "replicas": manifests.replicas(self._host_spec(model, spec))
            if model is not None and spec is not None
            else 0,
            "readyReplicas": model.ready_replicas if model is not None else 0,
        }
        if model is not None and model.parallelism is not None:
            entry["parallelism"] = model.parallelism
        if model is not None and model.scheduling is not None:
            entry["scheduling"] = model.scheduling
        return entry if binding.next is None else entry | {"next": binding.next}

    def _conflicts(self, workflow: Workflow, bindings: tuple[Binding, ...]) -> list[Conflict]:
        """The workflow's settings of shared models that are not used."""
        found: list[Conflict] = []
        for name in sorted({binding.next or binding.model for binding in bindings}):
            users = self.store.users(workflow.namespace, name)
            if len(users) > 1:
                desired = desired_models(_owners(users)).get(name)
                found += [one for one in (desired.conflicts if desired else ()) if one.uid == workflow.uid]
        return found

    def _timestamped(self, statements: tuple[conditions.Statement, ...], about: KubeObject) -> list[Body]:
        now = self._clock().strftime("%Y-%m-%dT%H:%M:%SZ")
        return conditions.timestamped(statements, previous=about.conditions, now=now, generation=about.generation)

    async def _write_status(self, about: KubeObject, status: Body) -> None:
        """Writes a status that differs from the present one, and an Event if Ready has changed."""
        present = about.status
        if all(present.get(key) == value for key, value in status.items()):
            return
        manifest: Manifest = {
            "apiVersion": API_VERSION,
            "kind": about.kind,
            "metadata": {"name": about.name, "namespace": about.namespace},
            "status": status,
        }
        self.observe(await asyncio.to_thread(self._cluster.apply_status, manifest))
        event = conditions.transition(about, status, now=self._clock())
        if event is not None:
            await asyncio.to_thread(self._cluster.create, event)


def _owners(users: Iterable[Workflow]) -> list[Owner]:
    """Users as owners, without those whose spec cannot be read."""
    return [
        Owner(workflow=user.definition, uid=user.uid, created=user.created)
        for user in users
        if user.definition is not None
    ]


def _is_managed(model: Model) -> bool:
    return all(model.labels.get(key) == value for key, value in MANAGED.items())


def _has_served(model: Model | None) -> bool:
    return model is not None and model.is_true(ConditionType.WEIGHTS_AVAILABLE)
