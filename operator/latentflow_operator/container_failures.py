"""Why the pods of a model do not serve: pure, from their status to one reason and one sentence with the remedy.

`conditions` reports it on the model and on its workflows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from latentflow.api.conditions import ConditionReason
from latentflow.api.status import ConditionType

from latentflow_operator.objects import Condition, Container, KubeObject, Pod

_PULL = {
    ConditionReason.IMAGE_PULL_BACK_OFF,
    ConditionReason.INVALID_IMAGE_NAME,
    ConditionReason.ERR_IMAGE_NEVER_PULL,
    ConditionReason.IMAGE_INSPECT_ERROR,
}
_CREATE = {
    ConditionReason.CREATE_CONTAINER_CONFIG_ERROR,
    ConditionReason.CREATE_CONTAINER_ERROR,
    ConditionReason.RUN_CONTAINER_ERROR,
}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a model does not serve.

    Attributes:
        condition: The condition that it makes False, besides Ready.
        reason: A `ConditionReason`, or the word that Kubernetes reported if there is no member for it.
    """

    condition: ConditionType
    reason: str
    message: str


def failure_of(pod: Pod, *, is_own: Callable[[str], bool]) -> Failure | None:
    """The failure of a model's server in a pod; None if none is known.

    Args:
        is_own: Whether a container, by name, is the model's. A pod may run several models, and the failure of the whole
            pod is a failure of each.
    """
    scheduled = pod.conditions.get("PodScheduled")
    if scheduled is not None and scheduled.status == "False":
        return _unscheduled(scheduled)
    own = [container for container in pod.containers if is_own(container.name)]
    for container in (*pod.init_containers, *own):
        found = _container_failure(container, pod.name)
        if found is not None:
            return found
    if pod.phase == "Failed":
        return Failure(
            condition=ConditionType.READY,
            reason=pod.reason or ConditionReason.POD_FAILED,
            message=_sentence(f"Pod {pod.name} has failed", pod.message),
        )
    return None


def reported_failure(pods: Sequence[Pod], is_own: Callable[[str], bool]) -> Failure | None:
    """The failure that is reported for all pods of a model; `is_own` as in `failure_of`."""
    in_order = sorted(pods, key=lambda pod: pod.name)
    found = [failure for pod in in_order if (failure := failure_of(pod, is_own=is_own))]
    # A failure of the weights concerns every replica. Any other may concern one pod's node only.
    weights = (one for one in found if one.condition is ConditionType.WEIGHTS_AVAILABLE)
    return next(weights, found[0] if found else None)


def creation_failure(deployment: KubeObject | None) -> Failure | None:
    """Why the pods of a Deployment cannot be created; None if no reason is known."""
    condition = deployment.conditions.get("ReplicaFailure") if deployment is not None else None
    if condition is None or condition.status != "True":
        return None
    return Failure(
        condition=ConditionType.READY,
        reason=condition.reason or ConditionReason.FAILED_CREATE,
        message=_sentence("The API server refused to create the pods", condition.message),
    )


def shortened(text: str, limit: int = 1000) -> str:
    """A text in one line, truncated to `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _unscheduled(condition: Condition) -> Failure:
    missing = re.search(r'persistentvolumeclaim "([^"]+)" not found', condition.message)
    if missing:
        return Failure(
            condition=ConditionType.SCHEDULED,
            reason=ConditionReason.PERSISTENT_VOLUME_CLAIM_NOT_FOUND,
            message=f"The PersistentVolumeClaim {missing[1]!r} does not exist in this namespace; create it.",
        )
    return Failure(
        condition=ConditionType.SCHEDULED,
        reason=condition.reason or ConditionReason.UNSCHEDULABLE,
        message=_sentence("No node can run the pod", condition.message),
    )


def _container_failure(container: Container, pod: str) -> Failure | None:
    reason, message = container.waiting_reason, container.waiting_message
    if reason == "ErrImagePull":
        # The kubelet alternates between the two words.
        reason = ConditionReason.IMAGE_PULL_BACK_OFF
    if reason in _PULL:
        return Failure(
            condition=ConditionType.READY,
            reason=reason,
            message=_sentence(f"The image {container.image} cannot be pulled", message),
        )
    if reason in _CREATE:
        return _creation_error(reason, message, pod)
    ended = container.terminated
    if ended is None or container.ready:
        return None
    if ended.reason == ConditionReason.OOM_KILLED:
        return Failure(
            condition=ConditionType.READY,
            reason=ConditionReason.OOM_KILLED,
            message=f"Pod {pod} was killed because it exceeded its memory limit; raise the model's "
            "resources.limits.memory.",
        )
    if ended.exit_code == 2 and ended.message:
        # The server's own message states what failed, where, and the remedy. Its log comes before it.
        own_message = ended.message[max(0, ended.message.rfind("latentflow-node: ")) :]
        return Failure(
            condition=ConditionType.WEIGHTS_AVAILABLE,
            reason=ConditionReason.CANNOT_LOAD,
            message=shortened(own_message),
        )
    if ended.exit_code == 0:
        return None
    crash_loop = reason == ConditionReason.CRASH_LOOP_BACK_OFF
    return Failure(
        condition=ConditionType.READY,
        reason=ConditionReason.CRASH_LOOP_BACK_OFF if crash_loop else ConditionReason.CONTAINER_ENDED,
        message=_sentence(f"Pod {pod} ended with exit code {ended.exit_code}", ended.message),
    )


def _creation_error(reason: str, message: str, pod: str) -> Failure:
    missing = re.search(r'(secret|configmap) "([^"]+)" not found', message)
    if missing is None:
        return Failure(
            condition=ConditionType.READY, reason=reason, message=_sentence(f"Pod {pod} cannot start", message)
        )
    kind, found = (
        ("Secret", ConditionReason.SECRET_NOT_FOUND)
        if missing[1] == "secret"
        else ("ConfigMap", ConditionReason.CONFIG_MAP_NOT_FOUND)
    )
    return Failure(
        condition=ConditionType.READY,
        reason=found,
        message=f"The {kind} {missing[2]!r} does not exist in this namespace; create it.",
    )


def _sentence(statement: str, details: str) -> str:
    details = shortened(details)
    return f"{statement}: {details}" if details else f"{statement}."
