"""What keeps a workflow from serving on a real node stands on the workflow itself, as it is and at once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import images
import pytest
from conftest import deploy
from support.apiserver import ApiServer
from support.kubectl import Body, Namespace, condition, is_ready
from test_faults import rolled_out
from test_path import threaded, wait_until_ready

# After the pod's own status shows it.
SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """What is wrong with a workflow's VAE, and what is said of it.

    Attributes:
        model: What of it is changed.
        words: Of the message.
        shown: Whether a pod's status shows it.
    """

    name: str
    model: Body
    reason: str
    words: str
    shown: Callable[[Body], bool]


def _unscheduled(pod: Body) -> bool:
    return any(c["type"] == "PodScheduled" and c["status"] == "False" for c in pod["status"].get("conditions", ()))


def _state(pod: Body) -> dict[str, Any]:
    return next(iter(pod["status"].get("containerStatuses", ())), {})


def _waits(pod: Body, *reasons: str) -> bool:
    return _state(pod).get("state", {}).get("waiting", {}).get("reason") in reasons


def _ended(pod: Body, sign: str) -> bool:
    states = [_state(pod).get(which, {}).get("terminated", {}) for which in ("state", "lastState")]
    return any(sign in json.dumps(state) for state in states)


TROUBLES = [
    Trouble(
        name="too-large",
        model={"resources": {"requests": {"cpu": "1000"}}},
        reason="Unschedulable",
        words="Insufficient cpu",
        shown=_unscheduled,
    ),
    Trouble(
        name="no-claim",
        model={"source": {"uri": "pvc://absent/shapes"}},
        reason="PersistentVolumeClaimNotFound",
        words="'absent'",
        shown=_unscheduled,
    ),
    Trouble(
        name="no-secret",
        model={"pod": {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "absent", "key": "a"}}}]}},
        reason="SecretNotFound",
        words="'absent'",
        shown=lambda pod: _waits(pod, "CreateContainerConfigError"),
    ),
    Trouble(
        name="no-weights",
        model={"source": {"uri": "nowhere"}},
        reason="CannotLoad",
        words="There is no weights folder /models/nowhere",
        shown=lambda pod: _ended(pod, "no weights folder"),
    ),
    Trouble(
        name="no-memory",
        model={"resources": {"limits": {"memory": "120Mi"}}},
        reason="OOMKilled",
        words="raise the model's resources.limits.memory",
        shown=lambda pod: _ended(pod, "OOMKilled"),
    ),
    Trouble(
        name="no-python",
        # Another model, not the same with another environment, which two workflows would share.
        model={"pod": {"env": [{"name": "PYTHONHOME", "value": "/nowhere"}]}, "dtype": "float16"},
        reason="CrashLoopBackOff",
        words="exit code 1",
        shown=lambda pod: _waits(pod, "CrashLoopBackOff"),
    ),
]


def broken(name: str, model: Body) -> Body:
    body = threaded("shapes-minimal.yaml")
    body["metadata"]["name"] = name
    for one in body["spec"]["models"]:
        if one["role"] == "VAE":
            one |= model
    return body


@pytest.mark.timeout(900)
def test_what_keeps_a_pod_from_serving_is_on_the_workflow_five_seconds_later_at_most(namespace: Namespace) -> None:
    def told(trouble: Trouble) -> str:
        namespace.apply(broken(trouble.name, trouble.model))
        models = namespace.until(
            "DiffusionWorkflow", lambda found: bool(found[trouble.name].get("status", {}).get("models"))
        )[trouble.name]["status"]["models"]
        (model,) = (entry["model"] for entry in models if entry["role"] == "VAE")

        def mine(found: dict[str, Body]) -> list[Body]:
            return [
                pod for pod in found.values() if pod["metadata"].get("labels", {}).get("latentflow.io/model") == model
            ]

        try:
            namespace.until("Pod", lambda found: any(map(trouble.shown, mine(found))), seconds=120)
        except AssertionError:
            raise AssertionError(f"{trouble.name}: {[pod['status'] for pod in mine(namespace.list('Pod'))]}") from None
        began = time.monotonic()
        said = namespace.until(
            "DiffusionWorkflow",
            lambda found: condition(found[trouble.name], "Ready").get("reason") == trouble.reason,
            seconds=SECONDS,
        )[trouble.name]
        assert trouble.words in condition(said, "Ready")["message"]
        assert "Model 'pixels'" in condition(said, "Ready")["message"]
        return f"{trouble.reason} {time.monotonic() - began:.2f} s: {condition(said, 'Ready')['message']}"

    with ThreadPoolExecutor(len(TROUBLES)) as pool:
        asked = [pool.submit(told, trouble) for trouble in TROUBLES]
    print(*(one.exception() or one.result() for one in asked), sep="\n")
    assert [one.exception() for one in asked] == [None] * len(TROUBLES)


@pytest.mark.timeout(600)
def test_an_upgrade_to_an_image_that_is_not_there_stops_no_model_and_says_so(
    release: ApiServer, namespace: Namespace
) -> None:
    namespace.apply(threaded("shapes-minimal.yaml"))
    wait_until_ready(release, namespace, "shapes-minimal")
    # Not "Never": a node that may not pull says something else.
    policy = "--set=images.node.pullPolicy=IfNotPresent"
    deploy(release, "upgrade", "--reuse-values", "--set=images.node.tag=absent", policy)

    def about_the_image(found: dict[str, Body], name: str, about: str) -> bool:
        return condition(found[name], about).get("reason") == "ImagePullBackOff"

    said = namespace.until("DiffusionWorkflow", lambda found: about_the_image(found, "shapes-minimal", "Degraded"))
    assert is_ready(said["shapes-minimal"])
    assert "latentflow-node:absent" in condition(said["shapes-minimal"], "Degraded")["message"]
    namespace.apply(broken("newer", {"dtype": "bfloat16"}))
    namespace.until("DiffusionWorkflow", lambda found: about_the_image(found, "newer", "Ready"))
    deploy(release, "upgrade", "--reuse-values", f"--set=images.node.tag={images.NEXT_TAG}", policy)
    wait_until_ready(release, namespace, "shapes-minimal", "newer")
    rolled_out(release, namespace, images.NEXT_TAG)
    namespace.until(
        "DiffusionWorkflow",
        lambda found: {condition(body, "Degraded").get("status") for body in found.values()} == {"False"},
    )
