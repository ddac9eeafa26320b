"""What to say of a model and of a workflow: pure, from what the cluster shows to the statuses that users read.

A pod's own words (why it is not scheduled, its image not pulled, its container ended) become one reason and one sentence;
the worst pod speaks for its model, the first model in trouble for its workflow. `docs/status.md` is the contract.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from latentflow.api.status import ConditionType

from latentflow_operator import events
from latentflow_operator.binding import Binding, Conflict

Body = dict[str, Any]
_PULL = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"}
DOWNLOADING = "Downloading"
_EXPECTED = {"Starting", DOWNLOADING, "ScaledToZero"}
_CONFIG = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A condition without its times."""

    type: ConditionType
    status: str
    reason: str
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """What keeps a pod from serving. `about` is the condition it belongs to."""

    about: ConditionType
    reason: str
    message: str


def trouble(pod: Body) -> Trouble | None:
    """What is wrong with a pod; None while nothing is known to be."""
    status = pod.get("status", {})
    for condition in status.get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return _unscheduled(condition)
    for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        found = _container(container, pod["metadata"]["name"])
        if found is not None:
            return found
    if status.get("phase") == "Failed":
        return Trouble(
            about=ConditionType.READY,
            reason=status.get("reason") or "PodFailed",
            message=_sentence(f"Pod {pod['metadata']['name']} has failed", status.get("message")),
        )
    return None


def is_ready(pod: Body) -> bool:
    """Whether a pod takes requests."""
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod.get("status", {}).get("conditions", ()))


def of_model(
    *,
    wanted: int,
    deployment: Body | None,
    pods: Sequence[Body],
    before: Mapping[str, Body],
    refused: Trouble | None = None,
    downloading: str | None = None,
) -> tuple[Statement, ...]:
    """The conditions of a model.

    Args:
        wanted: Replicas there should be.
        before: Its conditions until now, by type.
        refused: Why it has no pods yet; None where nothing stands in their way.
        downloading: How far a server's download is, in a sentence; None where none fetches.
    """
    alive = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
    ready = sum(is_ready(pod) for pod in alive)
    problem = refused or _worst(alive) or _not_created(deployment)
    if ready > 0 or wanted == 0 or problem is not None:
        downloading = None
    loaded = ready > 0 or before.get(ConditionType.WEIGHTS_AVAILABLE, {}).get("status") == "True"
    return (
        _model_ready(wanted, ready, problem, downloading),
        _weights(loaded, problem, downloading),
        _scheduled(alive, problem),
        _degraded(problem),
        _progressing(wanted, ready, downloading),
    )


def of_workflow(
    *,
    bindings: Sequence[Binding],
    models: Mapping[str, Body | None],
    conflicts: Sequence[Conflict],
) -> tuple[Statement, ...]:
    """The conditions of a workflow.

    Args:
        models: The DiffusionModels that are bound or to be bound, by name; None for one that does not exist.
    """
    waiting = [_blame(binding, models.get(binding.model)) for binding in bindings]
    blames = [blame for blame in waiting if blame is not None]
    # What somebody has to act on speaks before what only takes its time.
    first = min(blames, key=lambda blame: blame.reason in _EXPECTED, default=None)
    ready = sum(blame is None for blame in waiting)
    count = f"{ready} of {len(bindings)} models take requests."
    changing = [binding for binding in bindings if binding.next is not None]
    return (
        Statement(type=ConditionType.READY, status="True", reason="AllModelsReady", message=count)
        if first is None
        else Statement(type=ConditionType.READY, status="False", reason=first.reason, message=first.message),
        Statement(
            type=ConditionType.MODELS_READY,
            status=_word(first is None),
            reason="AllModelsReady" if first is None else "ModelsNotReady",
            message=count,
        ),
        _every(ConditionType.WEIGHTS_AVAILABLE, bindings, models, "WeightsLoaded"),
        _every(ConditionType.SCHEDULED, bindings, models, "PodsScheduled"),
        _workflow_degraded(bindings, models, conflicts),
        _workflow_progressing(changing, first),
    )


def stamped(
    statements: Iterable[Statement], *, before: Mapping[str, Body], now: str, generation: int
) -> list[dict[str, Any]]:
    """Conditions as Kubernetes writes them; the time of the last transition is kept where the status is."""
    written = []
    for one in statements:
        old = before.get(one.type.value, {})
        kept = old.get("lastTransitionTime") if old.get("status") == one.status else None
        written.append(
            {
                "type": one.type.value,
                "status": one.status,
                "reason": one.reason,
                "message": one.message,
                "lastTransitionTime": kept or now,
                "observedGeneration": generation,
            }
        )
    return written


def transition(body: Body, status: Body, *, now: datetime) -> Body | None:
    """The Event that tells a change of Ready, or of the reason it is not so; None where that is as before."""
    before = by_type(body).get(ConditionType.READY.value, {})
    after = by_type({"status": status})[ConditionType.READY.value]
    if (before.get("status"), before.get("reason")) == (after["status"], after["reason"]):
        return None
    good = after["status"] == "True" or after["reason"] in _EXPECTED
    return events.event(
        body, reason=after["reason"], note=after["message"], warning=not good, action="Reconcile", now=now
    )


def by_type(body: Body | None) -> dict[str, Body]:
    """An object's conditions by type."""
    return {c["type"]: c for c in (body or {}).get("status", {}).get("conditions", ())}


def _unscheduled(condition: Body) -> Trouble:
    message = condition.get("message", "")
    missing = re.search(r'persistentvolumeclaim "([^"]+)" not found', message)
    if missing:
        return Trouble(
            about=ConditionType.SCHEDULED,
            reason="PersistentVolumeClaimNotFound",
            message=f"The PersistentVolumeClaim {missing[1]!r} does not exist in this namespace; create it.",
        )
    return Trouble(
        about=ConditionType.SCHEDULED,
        reason=condition.get("reason") or "Unschedulable",
        message=_sentence("No node takes the pod", message),
    )


def _container(container: Body, pod: str) -> Trouble | None:
    waiting = container.get("state", {}).get("waiting", {})
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    if reason in _PULL:
        return Trouble(
            about=ConditionType.READY,
            reason="ImagePullBackOff" if reason == "ErrImagePull" else reason,
            message=_sentence(f"The image {container.get('image', '')} cannot be pulled", message),
        )
    if reason in _CONFIG:
        missing = re.search(r'(secret|configmap) "([^"]+)" not found', message)
        if missing:
            kind = "Secret" if missing[1] == "secret" else "ConfigMap"
            return Trouble(
                about=ConditionType.READY,
                reason=f"{kind}NotFound",
                message=f"The {kind} {missing[2]!r} does not exist in this namespace; create it.",
            )
        return Trouble(about=ConditionType.READY, reason=reason, message=_sentence(f"Pod {pod} cannot start", message))
    ended = container.get("state", {}).get("terminated") or container.get("lastState", {}).get("terminated")
    if not ended or container.get("ready"):
        return None
    if ended.get("reason") == "OOMKilled":
        return Trouble(
            about=ConditionType.READY,
            reason="OOMKilled",
            message=f"Pod {pod} was killed for using more memory than its limit; raise the model's "
            "resources.limits.memory.",
        )
    said = (ended.get("message") or "").strip()
    if ended.get("exitCode") == 2 and said:
        # The server's own word, which says what, where and what to do; its log stands before it.
        word = said[max(0, said.rfind("latentflow-node: ")) :]
        return Trouble(about=ConditionType.WEIGHTS_AVAILABLE, reason="CannotLoad", message=_short(word))
    if ended.get("exitCode") == 0:
        return None
    return Trouble(
        about=ConditionType.READY,
        reason="CrashLoopBackOff" if reason == "CrashLoopBackOff" else "ContainerEnded",
        message=_sentence(f"Pod {pod} ended with exit code {ended.get('exitCode')}", said),
    )


def _worst(pods: Sequence[Body]) -> Trouble | None:
    found = [found for pod in sorted(pods, key=lambda pod: pod["metadata"]["name"]) if (found := trouble(pod))]
    # What the weights say is about all replicas; what one pod says may be about its node.
    return next((one for one in found if one.about is ConditionType.WEIGHTS_AVAILABLE), found[0] if found else None)


def _not_created(deployment: Body | None) -> Trouble | None:
    for condition in (deployment or {}).get("status", {}).get("conditions", ()):
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            return Trouble(
                about=ConditionType.READY,
                reason=condition.get("reason") or "FailedCreate",
                message=_sentence("The API server refuses the pods", condition.get("message")),
            )
    return None


def _model_ready(wanted: int, ready: int, problem: Trouble | None, downloading: str | None) -> Statement:
    about = ConditionType.READY
    if ready > 0:
        return Statement(
            type=about, status="True", reason="ReplicasReady", message=f"{ready} of {wanted} replicas take requests."
        )
    if wanted == 0:
        return Statement(
            type=about, status="False", reason="ScaledToZero", message="It has no replicas; a request wakes it."
        )
    if problem is not None:
        return Statement(type=about, status="False", reason=problem.reason, message=problem.message)
    if downloading is not None:
        return Statement(type=about, status="False", reason=DOWNLOADING, message=downloading)
    return Statement(
        type=about, status="False", reason="Starting", message="Its pods are starting: they load and warm up the model."
    )


def _weights(loaded: bool, problem: Trouble | None, downloading: str | None) -> Statement:
    about = ConditionType.WEIGHTS_AVAILABLE
    if problem is not None and problem.about is about:
        return Statement(type=about, status="False", reason=problem.reason, message=problem.message)
    if loaded:
        return Statement(type=about, status="True", reason="WeightsLoaded", message="A server has loaded them.")
    if downloading is not None:
        return Statement(type=about, status="Unknown", reason=DOWNLOADING, message=downloading)
    return Statement(type=about, status="Unknown", reason="Starting", message="No server has loaded them yet.")


def _scheduled(pods: Sequence[Body], problem: Trouble | None) -> Statement:
    about = ConditionType.SCHEDULED
    if problem is not None and problem.about is about:
        return Statement(type=about, status="False", reason=problem.reason, message=problem.message)
    placed = [
        pod
        for pod in pods
        if any(
            c["type"] == "PodScheduled" and c["status"] == "True" for c in pod.get("status", {}).get("conditions", ())
        )
    ]
    if placed and len(placed) == len(pods):
        return Statement(type=about, status="True", reason="PodsScheduled", message="Every pod has a node.")
    return Statement(type=about, status="Unknown", reason="Starting", message="Its pods have no node yet.")


def _degraded(problem: Trouble | None) -> Statement:
    about = ConditionType.DEGRADED
    if problem is not None:
        return Statement(type=about, status="True", reason=problem.reason, message=problem.message)
    return Statement(type=about, status="False", reason="AsExpected")


def _progressing(wanted: int, ready: int, downloading: str | None) -> Statement:
    about = ConditionType.PROGRESSING
    if downloading is not None:
        return Statement(type=about, status="True", reason=DOWNLOADING, message=downloading)
    if ready < wanted:
        return Statement(
            type=about, status="True", reason="ReplicasStarting", message=f"{ready} of {wanted} replicas take requests."
        )
    return Statement(type=about, status="False", reason="AsExpected")


def _blame(binding: Binding, model: Body | None) -> Trouble | None:
    """Why a model of a workflow takes no requests; None where it does."""
    if model is None:
        what = "does not exist in this namespace; create it, or give the model a source"
        return Trouble(
            about=ConditionType.READY,
            reason="ModelNotFound" if binding.by_reference else "Starting",
            message=f"Model {binding.name!r}: DiffusionModel {binding.model} {what if binding.by_reference else 'is being made'}.",
        )
    condition = by_type(model).get(ConditionType.READY)
    if condition is None:
        return Trouble(
            about=ConditionType.READY, reason="Starting", message=f"Model {binding.name!r}: its pods are being made."
        )
    if condition["status"] == "True" or condition["reason"] == "ScaledToZero":
        return None
    return Trouble(
        about=ConditionType.READY,
        reason=condition["reason"],
        message=_short(f"Model {binding.name!r} ({binding.model}): {condition['message']}"),
    )


def _every(
    about: ConditionType, bindings: Sequence[Binding], models: Mapping[str, Body | None], good: str
) -> Statement:
    """True where the condition is true of every model; else the first that says otherwise, False before Unknown."""
    found = [(binding, by_type(models.get(binding.model)).get(about.value)) for binding in bindings]
    for status in ("False", "Unknown"):
        for binding, condition in found:
            if (condition or {"status": "Unknown"})["status"] == status:
                said = condition or {"reason": "Starting", "message": "its pods are being made."}
                return Statement(
                    type=about,
                    status=status,
                    reason=said["reason"],
                    message=_short(f"Model {binding.name!r}: {said['message']}"),
                )
    return Statement(type=about, status="True", reason=good)


def _workflow_degraded(
    bindings: Sequence[Binding], models: Mapping[str, Body | None], conflicts: Sequence[Conflict]
) -> Statement:
    about = ConditionType.DEGRADED
    if conflicts:
        message = _short(" ".join(conflict.message for conflict in conflicts))
        return Statement(type=about, status="True", reason="SharedSettingsConflict", message=message)
    for binding in bindings:
        for name in (binding.model, binding.next):
            condition = by_type(models.get(name) if name else None).get(ConditionType.DEGRADED)
            if condition and condition["status"] == "True":
                message = _short(f"Model {binding.name!r} ({name}): {condition['message']}")
                return Statement(type=about, status="True", reason=condition["reason"], message=message)
    return Statement(type=about, status="False", reason="AsExpected")


def _workflow_progressing(changing: Sequence[Binding], first: Trouble | None) -> Statement:
    about = ConditionType.PROGRESSING
    if changing:
        names = ", ".join(repr(binding.name) for binding in changing)
        message = f"{names}: the changed model takes over when it is ready; what served until now serves on."
        return Statement(type=about, status="True", reason="RollingOut", message=message)
    if first is not None:
        return Statement(type=about, status="True", reason="ModelsStarting", message=first.message)
    return Statement(type=about, status="False", reason="AsExpected")


def _word(value: bool) -> str:
    return "True" if value else "False"


def _sentence(what: str, said: str | None) -> str:
    said = _short((said or "").strip())
    return f"{what}: {said}" if said else f"{what}."


def _short(text: str, most: int = 1000) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
