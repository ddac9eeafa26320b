"""The conditions of models and workflows: pure, from the state of the cluster to the statuses that users read.

One failure of its pods (`container_failures`) is reported for a model, and one model's failure for a workflow.
`docs/status.md` is the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from latentflow.api.conditions import ConditionReason
from latentflow.api.status import ConditionType
from latentflow.api.types import Latent

from latentflow_operator import events
from latentflow_operator.binding import Binding, Conflict
from latentflow_operator.container_failures import Failure, creation_failure, reported_failure, shortened
from latentflow_operator.objects import Body, Condition, KubeObject, Model, Pod, conditions_of

# Reasons that need no action of a person.
_EXPECTED = {ConditionReason.STARTING, ConditionReason.DOWNLOADING, ConditionReason.SCALED_TO_ZERO}


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
    deployment: KubeObject | None,
    pods: Sequence[Pod],
    is_own: Callable[[str], bool],
    previous: Mapping[str, Condition],
    lacks_signals: bool,
    can_wake: bool,
    unresolved: Failure | None = None,
    downloading: str | None = None,
) -> tuple[Statement, ...]:
    """The conditions of a model.

    Args:
        wanted: Replicas that it should have.
        is_own: As in `failure_of`.
        previous: Its present conditions, by type.
        lacks_signals: Whether its scheduler does not know its load.
        can_wake: Whether a scheduler starts a replica for the first request to a model without replicas.
        unresolved: Why its source could not be resolved, so that it has no pods; None if there is no such failure.
        downloading: The progress of a server's download, in a sentence; None if there is none.
    """
    alive = replicas(pods)
    ready = sum(pod.ready for pod in alive)
    failure = unresolved or reported_failure(alive, is_own) or creation_failure(deployment)
    if ready > 0 or wanted == 0 or failure is not None:
        downloading = None
    weights = previous.get(ConditionType.WEIGHTS_AVAILABLE)
    loaded = ready > 0 or (weights is not None and weights.status == "True")
    return (
        _model_ready(wanted, ready, failure, downloading, can_wake=can_wake),
        _weights(loaded, failure, downloading),
        _scheduled(alive, failure, wanted=wanted),
        _degraded(failure, wanted=wanted, lacks_signals=lacks_signals),
        _progressing(wanted, ready, downloading),
    )


def of_workflow(
    *,
    bindings: Sequence[Binding],
    models: Mapping[str, Model | None],
    conflicts: Sequence[Conflict],
    without_effect: Sequence[str] = (),
) -> tuple[Statement, ...]:
    """The conditions of a workflow.

    Args:
        models: The DiffusionModels that serve it or are to serve it, by name; None for one that does not exist.
        without_effect: Fields of its spec that have no effect in this version.
    """
    outcomes = [_not_ready(binding, models.get(binding.model)) for binding in bindings]
    failures = [failure for failure in outcomes if failure is not None]
    # A failure that needs an action is reported before one that only takes time.
    first = min(failures, key=lambda failure: failure.reason in _EXPECTED, default=None)
    ready = sum(failure is None for failure in outcomes)
    count = f"{ready} of {len(bindings)} models accept requests."
    changing = [binding for binding in bindings if binding.next is not None]
    return (
        Statement(type=ConditionType.READY, status="True", reason=ConditionReason.ALL_MODELS_READY, message=count)
        if first is None
        else Statement(type=ConditionType.READY, status="False", reason=first.reason, message=first.message),
        Statement(
            type=ConditionType.MODELS_READY,
            status="True" if first is None else "False",
            reason=ConditionReason.ALL_MODELS_READY if first is None else ConditionReason.MODELS_NOT_READY,
            message=count,
        ),
        _of_all(ConditionType.WEIGHTS_AVAILABLE, bindings, models, ConditionReason.WEIGHTS_LOADED),
        _of_all(ConditionType.SCHEDULED, bindings, models, ConditionReason.PODS_SCHEDULED),
        _workflow_degraded(bindings, models, conflicts, without_effect),
        _workflow_progressing(changing, first),
    )


def timestamped(
    statements: Iterable[Statement], *, previous: Mapping[str, Condition], now: str, generation: int
) -> list[dict[str, Any]]:
    """Conditions as Kubernetes writes them. The time of the last transition is kept if the status is unchanged."""
    written = []
    for one in statements:
        old = previous.get(one.type)
        kept = old.last_transition_time if old is not None and old.status == one.status else None
        written.append(
            {
                "type": one.type.value,
                "status": one.status,
                "reason": str(one.reason),
                "message": one.message,
                "lastTransitionTime": kept or now,
                "observedGeneration": generation,
            }
        )
    return written


def transition(about: KubeObject, status: Body, *, now: datetime) -> Body | None:
    """The Event for a change of Ready or of its reason; None if neither changed."""
    before = about.conditions.get(ConditionType.READY)
    after = conditions_of(status)[ConditionType.READY]
    if before is not None and (before.status, before.reason) == (after.status, after.reason):
        return None
    expected = after.status == "True" or after.reason in _EXPECTED
    return events.event(
        about, reason=after.reason, note=after.message, warning=not expected, action="Reconcile", now=now
    )


def can_take_over(model: Model | None) -> bool:
    """Whether a changed model can serve from now on: it accepts requests, or it did and was scaled to zero."""
    if model is None:
        return False
    ready = model.conditions.get(ConditionType.READY)
    scaled_down = ready is not None and ready.reason in (ConditionReason.SCALED_TO_ZERO, ConditionReason.NO_REPLICAS)
    return model.is_true(ConditionType.READY) or (scaled_down and model.is_true(ConditionType.WEIGHTS_AVAILABLE))


def replicas(pods: Iterable[Pod]) -> list[Pod]:
    """The pods that count as a model's replicas: not those being deleted, and failed ones only if there are no others.

    An evicted pod stays as Failed beside its replacement until it is garbage collected.
    """
    kept = [pod for pod in pods if not pod.deleting]
    running = [pod for pod in kept if pod.phase not in ("Failed", "Succeeded")]
    return running or kept


def latent(degree: Latent, *, ready: int) -> int:
    """How many replicas share one request's steps: as many as the model allows and are ready."""
    return min(2 if degree == "Auto" else degree, max(1, ready))


def _model_ready(
    wanted: int, ready: int, failure: Failure | None, downloading: str | None, *, can_wake: bool
) -> Statement:
    if ready > 0:
        return Statement(
            type=ConditionType.READY,
            status="True",
            reason=ConditionReason.REPLICAS_READY,
            message=f"{ready} of {wanted} replicas accept requests.",
        )
    if wanted == 0 and can_wake:
        reason, message = ConditionReason.SCALED_TO_ZERO, "The model has no replicas; a request starts one."
    elif wanted == 0:
        reason = ConditionReason.NO_REPLICAS
        message = (
            "The model was scaled to no replicas, and no scheduler starts one; scale it up, as with kubectl scale."
        )
    elif failure is not None:
        return Statement(type=ConditionType.READY, status="False", reason=failure.reason, message=failure.message)
    elif downloading is not None:
        reason, message = ConditionReason.DOWNLOADING, downloading
    else:
        reason, message = ConditionReason.STARTING, "The pods are starting: they load and warm up the model."
    return Statement(type=ConditionType.READY, status="False", reason=reason, message=message)


def _weights(loaded: bool, failure: Failure | None, downloading: str | None) -> Statement:
    condition = ConditionType.WEIGHTS_AVAILABLE
    if failure is not None and failure.condition is condition:
        return Statement(type=condition, status="False", reason=failure.reason, message=failure.message)
    if loaded:
        return Statement(
            type=condition,
            status="True",
            reason=ConditionReason.WEIGHTS_LOADED,
            message="A server has loaded the weights.",
        )
    if downloading is not None:
        return Statement(type=condition, status="Unknown", reason=ConditionReason.DOWNLOADING, message=downloading)
    return Statement(
        type=condition,
        status="Unknown",
        reason=ConditionReason.STARTING,
        message="No server has loaded the weights yet.",
    )


def _scheduled(pods: Sequence[Pod], failure: Failure | None, *, wanted: int) -> Statement:
    condition = ConditionType.SCHEDULED
    if failure is not None and failure.condition is condition:
        return Statement(type=condition, status="False", reason=failure.reason, message=failure.message)
    if wanted == 0 and not pods:
        return Statement(
            type=condition,
            status="True",
            reason=ConditionReason.SCALED_TO_ZERO,
            message="There are no pods that need a node.",
        )
    if pods and all(pod.scheduled for pod in pods):
        return Statement(
            type=condition,
            status="True",
            reason=ConditionReason.PODS_SCHEDULED,
            message="Every pod has a node.",
        )
    return Statement(
        type=condition, status="Unknown", reason=ConditionReason.STARTING, message="The pods have no node yet."
    )


def _degraded(failure: Failure | None, *, wanted: int, lacks_signals: bool) -> Statement:
    condition = ConditionType.DEGRADED
    if failure is not None:
        return Statement(type=condition, status="True", reason=failure.reason, message=failure.message)
    if lacks_signals:
        return Statement(
            type=condition,
            status="True",
            reason=ConditionReason.SIGNALS_MISSING,
            message=f"The load of the model is unknown, so it keeps {wanted} replicas; check that Prometheus "
            "answers and scrapes the pods.",
        )
    return Statement(type=condition, status="False", reason=ConditionReason.AS_EXPECTED)


def _progressing(wanted: int, ready: int, downloading: str | None) -> Statement:
    condition = ConditionType.PROGRESSING
    if downloading is not None:
        return Statement(type=condition, status="True", reason=ConditionReason.DOWNLOADING, message=downloading)
    if ready < wanted:
        return Statement(
            type=condition,
            status="True",
            reason=ConditionReason.REPLICAS_STARTING,
            message=f"{ready} of {wanted} replicas accept requests.",
        )
    return Statement(type=condition, status="False", reason=ConditionReason.AS_EXPECTED)


def _not_ready(binding: Binding, model: Model | None) -> Failure | None:
    """Why a model of a workflow does not accept requests; None if it does, or if a request would wake it."""
    if model is None and binding.by_reference:
        return Failure(
            condition=ConditionType.READY,
            reason=ConditionReason.MODEL_NOT_FOUND,
            message=f"Model {binding.name!r}: DiffusionModel {binding.model} does not exist in this namespace; create "
            "it, or give the model a source.",
        )
    if model is None:
        return Failure(
            condition=ConditionType.READY,
            reason=ConditionReason.STARTING,
            message=f"Model {binding.name!r}: DiffusionModel {binding.model} is being created.",
        )
    ready = model.conditions.get(ConditionType.READY)
    if ready is None:
        return Failure(
            condition=ConditionType.READY,
            reason=ConditionReason.STARTING,
            message=f"Model {binding.name!r}: the pods are being created.",
        )
    if ready.status == "True" or ready.reason == ConditionReason.SCALED_TO_ZERO:
        return None
    return Failure(
        condition=ConditionType.READY,
        reason=ready.reason,
        message=shortened(f"Model {binding.name!r} ({binding.model}): {ready.message}"),
    )


def _of_all(
    condition: ConditionType,
    bindings: Sequence[Binding],
    models: Mapping[str, Model | None],
    reason: ConditionReason,
) -> Statement:
    """True with this reason if the condition is True of every model; otherwise that of a False or else Unknown model."""
    missing = Condition(
        status="Unknown",
        reason=ConditionReason.STARTING,
        message="the pods are being created.",
        last_transition_time=None,
    )
    found = [
        (binding, model.conditions.get(condition, missing) if (model := models.get(binding.model)) else missing)
        for binding in bindings
    ]
    for status in ("False", "Unknown"):
        for binding, one in found:
            if one.status == status:
                message = shortened(f"Model {binding.name!r}: {one.message}")
                return Statement(type=condition, status=status, reason=one.reason, message=message)
    return Statement(type=condition, status="True", reason=reason)


def _workflow_degraded(
    bindings: Sequence[Binding],
    models: Mapping[str, Model | None],
    conflicts: Sequence[Conflict],
    without_effect: Sequence[str],
) -> Statement:
    condition = ConditionType.DEGRADED
    if conflicts:
        return Statement(
            type=condition,
            status="True",
            reason=ConditionReason.SHARED_SETTINGS_CONFLICT,
            message=shortened(" ".join(conflict.message for conflict in conflicts)),
        )
    for binding in bindings:
        for name in (binding.model, binding.next):
            model = models.get(name) if name else None
            degraded = model.conditions.get(condition) if model is not None else None
            if degraded is not None and degraded.status == "True":
                message = shortened(f"Model {binding.name!r} ({name}): {degraded.message}")
                return Statement(type=condition, status="True", reason=degraded.reason, message=message)
    if without_effect:
        message = shortened(f"These fields have no effect in this version: {', '.join(without_effect)}.")
        return Statement(type=condition, status="False", reason=ConditionReason.FIELDS_WITHOUT_EFFECT, message=message)
    return Statement(type=condition, status="False", reason=ConditionReason.AS_EXPECTED)


def _workflow_progressing(changing: Sequence[Binding], first: Failure | None) -> Statement:
    condition = ConditionType.PROGRESSING
    if changing:
        names = ", ".join(repr(binding.name) for binding in changing)
        message = f"{names}: the changed model takes over when it is ready; the previous one serves until then."
        return Statement(type=condition, status="True", reason=ConditionReason.ROLLING_OUT, message=message)
    if first is not None:
        return Statement(type=condition, status="True", reason=ConditionReason.MODELS_STARTING, message=first.message)
    return Statement(type=condition, status="False", reason=ConditionReason.AS_EXPECTED)
