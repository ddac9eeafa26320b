"""The objects that the operator reads, parsed once from the API server's JSON when they enter the store.

Each type has the fields that the operator uses and no others. Parsing a status is lenient: another version may have
written it, and an object that cannot be read in full must not stop the work on all others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from latentflow.api import DiffusionWorkflow, Source, placed
from latentflow.api.types import MODEL_LABEL, ModelSpec
from pydantic import ValidationError

Body = dict[str, Any]
# Namespace and name of an object.
ObjectKey = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A condition in an object's status."""

    status: str
    reason: str
    message: str
    last_transition_time: str | None


@dataclass(frozen=True, kw_only=True)
class KubeObject:
    """An object of any kind.

    Attributes:
        manifest: The object as the API server returned it, to be compared with the desired manifest; empty for pods.
        deleting: Whether it has a deletion timestamp.
        owners: Names of its owners, of any kind.
        conditions: The conditions in its status, by type.
    """

    api_version: str
    kind: str
    namespace: str
    name: str
    uid: str
    resource_version: int
    generation: int
    deleting: bool
    labels: Mapping[str, str]
    owners: tuple[str, ...]
    conditions: Mapping[str, Condition]
    manifest: Body

    @property
    def key(self) -> ObjectKey:
        return (self.namespace, self.name)

    @property
    def model(self) -> str | None:
        """The model that the object serves, by its label."""
        return self.labels.get(MODEL_LABEL)

    @property
    def status(self) -> Body:
        """The status as it is written, to be compared with the desired one."""
        return dict(self.manifest.get("status", {}))

    def is_true(self, condition: str) -> bool:
        """Whether a condition has the status True."""
        found = self.conditions.get(condition)
        return found is not None and found.status == "True"


@dataclass(frozen=True, kw_only=True)
class Workflow(KubeObject):
    """A DiffusionWorkflow.

    Attributes:
        created: Its creation time, RFC 3339.
        definition: None if this version of the operator cannot read its spec.
        bound: The DiffusionModel that serves each of its models, by the status.
        uses: The DiffusionModels that its spec names or that serve it.
    """

    created: str
    definition: DiffusionWorkflow | None
    bound: Mapping[str, str]
    uses: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Model(KubeObject):
    """A DiffusionModel.

    Attributes:
        spec: None if this version of the operator cannot read it.
        ready_replicas: By its status.
        resolved: The sources that its servers load, by its status, named as `ServedModel.sources` names them; empty before
            they have been resolved.
        parallelism, scheduling: Parts of its status, which a workflow's status repeats; None if absent.
    """

    spec: ModelSpec | None
    ready_replicas: int
    resolved: Mapping[str, Source]
    parallelism: Body | None
    scheduling: Body | None

    @property
    def lacks_signals(self) -> bool:
        """Whether its scheduler recorded that it does not know the load."""
        return (self.scheduling or {}).get("signals") == "Missing"


@dataclass(frozen=True, kw_only=True)
class Termination:
    """How a container ended."""

    exit_code: int | None
    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Container:
    """The status of a container.

    Attributes:
        waiting_reason, waiting_message: Why it does not run; empty if it runs or has ended.
        terminated: How it ended, or how it ended last; None if it never did.
    """

    name: str
    image: str
    ready: bool
    waiting_reason: str
    waiting_message: str
    terminated: Termination | None


@dataclass(frozen=True, kw_only=True)
class Pod(KubeObject):
    """A pod of a model. `reason` and `message` are those of its status, such as of an eviction."""

    phase: str
    ip: str | None
    reason: str
    message: str
    init_containers: tuple[Container, ...]
    containers: tuple[Container, ...]

    @property
    def ready(self) -> bool:
        """Whether it accepts requests."""
        return self.is_true("Ready")

    @property
    def scheduled(self) -> bool:
        """Whether it has a node."""
        return self.is_true("PodScheduled")


def parse(body: Body) -> KubeObject:
    """An object from its JSON, as the type of its kind."""
    kind = body["kind"]
    if kind == "DiffusionWorkflow":
        return _workflow(body)
    if kind == "DiffusionModel":
        return _model(body)
    if kind == "Pod":
        return _pod(body)
    return KubeObject(**_common(body))


def key_of(body: Body) -> ObjectKey:
    """Namespace and name of a manifest."""
    return body["metadata"]["namespace"], body["metadata"]["name"]


def conditions_of(status: Body) -> dict[str, Condition]:
    """The conditions in a status, by type."""
    return {
        one["type"]: Condition(
            status=one.get("status", "Unknown"),
            reason=one.get("reason") or "",
            message=one.get("message") or "",
            last_transition_time=one.get("lastTransitionTime"),
        )
        for one in status.get("conditions") or ()
    }


def _common(body: Body) -> dict[str, Any]:
    metadata = body["metadata"]
    # There may be thousands of objects, and managedFields are the largest part of most.
    kept = {key: value for key, value in metadata.items() if key != "managedFields"}
    return {
        "api_version": body.get("apiVersion", ""),
        "kind": body["kind"],
        "namespace": metadata["namespace"],
        "name": metadata["name"],
        "uid": metadata["uid"],
        "resource_version": int(metadata["resourceVersion"]),
        "generation": metadata.get("generation", 0),
        "deleting": "deletionTimestamp" in metadata,
        "labels": metadata.get("labels") or {},
        "owners": tuple(owner["name"] for owner in metadata.get("ownerReferences") or ()),
        "conditions": conditions_of(body.get("status") or {}),
        "manifest": body | {"metadata": kept},
    }


def _workflow(body: Body) -> Workflow:
    entries = (body.get("status") or {}).get("models") or ()
    bound = {entry["name"]: entry["model"] for entry in entries}
    try:
        definition = DiffusionWorkflow.of_object(body)
    except ValidationError:
        # Its schema is another version's; the present API server would refuse it. The models that serve it stay.
        definition = None
    named = placed(definition).values() if definition is not None else ()
    return Workflow(
        **_common(body),
        created=body["metadata"].get("creationTimestamp", ""),
        definition=definition,
        bound=bound,
        uses=frozenset(bound.values()) | frozenset(named),
    )


def _model(body: Body) -> Model:
    status = body.get("status") or {}
    try:
        spec = ModelSpec.model_validate(body["spec"])
    except ValidationError:
        spec = None
    return Model(
        **_common(body),
        spec=spec,
        ready_replicas=status.get("readyReplicas", 0),
        resolved=sources_of(status),
        parallelism=status.get("parallelism"),
        scheduling=status.get("scheduling"),
    )


def sources_of(status: Body) -> dict[str, Source]:
    """The valid ones of the resolved sources in a model's status."""
    entries = [("", status.get("source")), *((net.get("name"), net.get("source")) for net in status.get("nets") or ())]
    found = {}
    for name, source in entries:
        with contextlib.suppress(ValidationError):
            found[name] = Source.model_validate(source)
    return found


def _pod(body: Body) -> Pod:
    status = body.get("status") or {}
    return Pod(
        **_common(body) | {"manifest": {}},
        phase=status.get("phase", ""),
        ip=status.get("podIP"),
        reason=status.get("reason") or "",
        message=status.get("message") or "",
        init_containers=_containers(status.get("initContainerStatuses") or ()),
        containers=_containers(status.get("containerStatuses") or ()),
    )


def _containers(statuses: Iterable[Body]) -> tuple[Container, ...]:
    return tuple(
        Container(
            name=one["name"],
            image=one.get("image", ""),
            ready=bool(one.get("ready")),
            waiting_reason=(one.get("state") or {}).get("waiting", {}).get("reason") or "",
            waiting_message=(one.get("state") or {}).get("waiting", {}).get("message") or "",
            terminated=_termination(
                (one.get("state") or {}).get("terminated") or (one.get("lastState") or {}).get("terminated")
            ),
        )
        for one in statuses
    )


def _termination(terminated: Body | None) -> Termination | None:
    if not terminated:
        return None
    return Termination(
        exit_code=terminated.get("exitCode"),
        reason=terminated.get("reason") or "",
        message=(terminated.get("message") or "").strip(),
    )
