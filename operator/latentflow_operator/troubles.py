"""What keeps a model's pods from serving: pure, from a pod's own words to one reason and one sentence with what to do.

`conditions` says them of the model and its workflows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from latentflow.api.status import ConditionType

Body = dict[str, Any]
_PULL = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"}
_CONFIG = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """What keeps a pod from serving. `about` is the condition it belongs to."""

    about: ConditionType
    reason: str
    message: str


def trouble(pod: Body, *, is_own: Callable[[str], bool]) -> Trouble | None:
    """What is wrong with a model's server in a pod; None while nothing is known to be.

    Args:
        is_own: Whether a container, by name, is the model's; a pod may hold several models. What keeps the whole pod from
            running is the trouble of each.
    """
    status = pod.get("status", {})
    for condition in status.get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return _unscheduled(condition)
    own = [container for container in status.get("containerStatuses", ()) if is_own(container["name"])]
    for container in (*status.get("initContainerStatuses", ()), *own):
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


def worst(pods: Sequence[Body], is_own: Callable[[str], bool]) -> Trouble | None:
    """The trouble that speaks for a model's pods; `is_own` as of `trouble`."""
    in_order = sorted(pods, key=lambda pod: pod["metadata"]["name"])
    found = [found for pod in in_order if (found := trouble(pod, is_own=is_own))]
    # What the weights say is about all replicas; what one pod says may be about its node.
    return next((one for one in found if one.about is ConditionType.WEIGHTS_AVAILABLE), found[0] if found else None)


def not_created(deployment: Body | None) -> Trouble | None:
    """Why there are no pods; None where nothing is known to stand in their way."""
    for condition in (deployment or {}).get("status", {}).get("conditions", ()):
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            return Trouble(
                about=ConditionType.READY,
                reason=condition.get("reason") or "FailedCreate",
                message=_sentence("The API server refuses the pods", condition.get("message")),
            )
    return None


def short(text: str, most: int = 1000) -> str:
    """One line, cut where it is too long."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


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
        return Trouble(about=ConditionType.WEIGHTS_AVAILABLE, reason="CannotLoad", message=short(word))
    if ended.get("exitCode") == 0:
        return None
    return Trouble(
        about=ConditionType.READY,
        reason="CrashLoopBackOff" if reason == "CrashLoopBackOff" else "ContainerEnded",
        message=_sentence(f"Pod {pod} ended with exit code {ended.get('exitCode')}", said),
    )


def _sentence(what: str, said: str | None) -> str:
    said = short((said or "").strip())
    return f"{what}: {said}" if said else f"{what}."
