"""What to say of a model and of a workflow: pure, from what the cluster shows to the statuses that users read.

The worst pod (`troubles`) speaks for its model, the first model in trouble for its workflow. `docs/status.md` is the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from latentflow.api.status import ConditionType

from latentflow_operator import events
from latentflow_operator.binding import Binding, Conflict
from latentflow_operator.troubles import Trouble, is_ready, not_created, short, worst

Body = dict[str, Any]
DOWNLOADING = "Downloading"
_EXPECTED = {"Starting", DOWNLOADING, "ScaledToZero"}


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A condition without its times."""

    type: ConditionType
    status: str
    reason: str
    message: str = ""


def of_model(
    *,
    wanted: int,
    deployment: Body | None,
    pods: Sequence[Body],
    is_own: Callable[[str], bool],
    before: Mapping[str, Body],
    blind: bool,
    wakes: bool,
    refused: Trouble | None = None,
    downloading: str | None = None,
) -> tuple[Statement, ...]:
    """The conditions of a model.

    Args:
        wanted: Replicas there should be.
        is_own: As of `trouble`.
        before: Its conditions until now, by type.
        blind: Whether its scheduler knows nothing of its load.
        wakes: Whether there is a scheduler that gives it a replica when somebody asks.
        refused: Why it has no pods yet; None where nothing stands in their way.
        downloading: How far a server's download is, in a sentence; None where none fetches.
    """
    alive = replicas(pods)
    ready = sum(is_ready(pod) for pod in alive)
    problem = refused or worst(alive, is_own) or not_created(deployment)
    if ready > 0 or wanted == 0 or problem is not None:
        downloading = None
    loaded = ready > 0 or before.get(ConditionType.WEIGHTS_AVAILABLE, {}).get("status") == "True"
    return (
        _model_ready(wanted, ready, problem, downloading, wakes=wakes),
        _weights(loaded, problem, downloading),
        _scheduled(alive, problem, wanted=wanted),
        _degraded(problem, wanted=wanted, blind=blind),
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


def takes_over(body: Body | None) -> bool:
    """Whether a model can serve from now on: it takes requests, or did and has no replicas by somebody's wish."""
    said = by_type(body)
    ready, weights = said.get(ConditionType.READY, {}), said.get(ConditionType.WEIGHTS_AVAILABLE, {})
    sleeps = ready.get("reason") in ("ScaledToZero", "NoReplicas") and weights.get("status") == "True"
    return ready.get("status") == "True" or sleeps


def replicas(pods: Iterable[Body]) -> list[Body]:
    """Pods that are a model's replicas: neither on their way out, nor ended for good while there are others.

    An evicted pod stays as Failed beside the one that replaces it, until somebody collects it.
    """
    staying = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
    running = [pod for pod in staying if pod.get("status", {}).get("phase") not in ("Failed", "Succeeded")]
    return running or staying


def by_type(body: Body | None) -> dict[str, Body]:
    """An object's conditions by type."""
    return {c["type"]: c for c in (body or {}).get("status", {}).get("conditions", ())}


def _model_ready(
    wanted: int, ready: int, problem: Trouble | None, downloading: str | None, *, wakes: bool
) -> Statement:
    about = ConditionType.READY
    if ready > 0:
        return Statement(
            type=about, status="True", reason="ReplicasReady", message=f"{ready} of {wanted} replicas take requests."
        )
    if wanted == 0 and wakes:
        return Statement(
            type=about, status="False", reason="ScaledToZero", message="It has no replicas; a request wakes it."
        )
    if wanted == 0:
        return Statement(
            type=about,
            status="False",
            reason="NoReplicas",
            message="It was scaled to no replicas, and nothing here wakes it; scale it up, as with kubectl scale.",
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


def _scheduled(pods: Sequence[Body], problem: Trouble | None, *, wanted: int) -> Statement:
    about = ConditionType.SCHEDULED
    if problem is not None and problem.about is about:
        return Statement(type=about, status="False", reason=problem.reason, message=problem.message)
    if wanted == 0 and not pods:
        return Statement(type=about, status="True", reason="ScaledToZero", message="There are no pods to have a node.")
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


def _degraded(problem: Trouble | None, *, wanted: int, blind: bool) -> Statement:
    about = ConditionType.DEGRADED
    if problem is not None:
        return Statement(type=about, status="True", reason=problem.reason, message=problem.message)
    if blind:
        return Statement(
            type=about,
            status="True",
            reason="SignalsMissing",
            message=f"Nothing is known of its load, so it stays at {wanted} replicas; see that Prometheus answers and scrapes its pods.",
        )
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
        message=short(f"Model {binding.name!r} ({binding.model}): {condition['message']}"),
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
                    message=short(f"Model {binding.name!r}: {said['message']}"),
                )
    return Statement(type=about, status="True", reason=good)


def _workflow_degraded(
    bindings: Sequence[Binding], models: Mapping[str, Body | None], conflicts: Sequence[Conflict]
) -> Statement:
    about = ConditionType.DEGRADED
    if conflicts:
        message = short(" ".join(conflict.message for conflict in conflicts))
        return Statement(type=about, status="True", reason="SharedSettingsConflict", message=message)
    for binding in bindings:
        for name in (binding.model, binding.next):
            condition = by_type(models.get(name) if name else None).get(ConditionType.DEGRADED)
            if condition and condition["status"] == "True":
                message = short(f"Model {binding.name!r} ({name}): {condition['message']}")
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
