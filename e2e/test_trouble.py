"""Whatever keeps a workflow's pods from serving on a real node is reported on the workflow, promptly and by its cause."""

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


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """A workflow whose VAE cannot serve, and how that is reported.

    Attributes:
        name: Name of the workflow.
        model: Fields of the VAE that are overridden.
        reason: Reason of the workflow's condition.
        words: Part of the condition's message.
        shown: Whether the status of a pod shows the failure.
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


def _waiting(pod: Body, *reasons: str) -> bool:
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
        shown=lambda pod: _waiting(pod, "CreateContainerConfigError"),
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
        # Another dtype makes it another model: the same model with another environment would be shared by two workflows.
        model={"pod": {"env": [{"name": "PYTHONHOME", "value": "/nowhere"}]}, "dtype": "float16"},
        reason="CrashLoopBackOff",
        words="exit code 1",
        shown=lambda pod: _waiting(pod, "CrashLoopBackOff"),
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
def test_a_failure_of_a_pod_is_reported_before_the_slowest_of_them_appears(namespace: Namespace) -> None:
    def reported(trouble: Trouble) -> tuple[float, float]:
        """Seconds until a pod shows the failure, and from then until the workflow reports it."""
        applied = time.monotonic()
        namespace.apply(broken(trouble.name, trouble.model))
        models = namespace.until(
            "DiffusionWorkflow", lambda found: bool(found[trouble.name].get("status", {}).get("models"))
        )[trouble.name]["status"]["models"]
        (model,) = (entry["model"] for entry in models if entry["role"] == "VAE")

        def pods_of_model(found: dict[str, Body]) -> list[Body]:
            return [
                pod for pod in found.values() if pod["metadata"].get("labels", {}).get("latentflow.io/model") == model
            ]

        try:
            namespace.until("Pod", lambda found: any(map(trouble.shown, pods_of_model(found))), seconds=120)
        except AssertionError:
            raise AssertionError(
                f"{trouble.name}: {[pod['status'] for pod in pods_of_model(namespace.list('Pod'))]}"
            ) from None
        shown = time.monotonic()
        workflow = namespace.until(
            "DiffusionWorkflow",
            lambda found: condition(found[trouble.name], "Ready").get("reason") == trouble.reason,
        )[trouble.name]
        appearing, reporting = shown - applied, time.monotonic() - shown
        message = condition(workflow, "Ready")["message"]
        assert trouble.words in message
        assert "Model 'pixels'" in message
        print(f"{trouble.reason}: shown after {appearing:.2f} s, reported {reporting:.2f} s later: {message}")
        return appearing, reporting

    with ThreadPoolExecutor(len(TROUBLES)) as pool:
        results = [pool.submit(reported, trouble) for trouble in TROUBLES]
    assert [one.exception() for one in results] == [None] * len(TROUBLES)
    appeared, reports = zip(*(one.result() for one in results), strict=True)
    # The kubelet restarts a container several times before it reports CrashLoopBackOff. How long that takes grows with the
    # load of the machine, as the operator's work does.
    assert max(reports) < max(appeared)


@pytest.mark.timeout(600)
def test_an_upgrade_to_an_absent_image_stops_no_model_and_is_reported(release: ApiServer, namespace: Namespace) -> None:
    namespace.apply(threaded("shapes-minimal.yaml"))
    wait_until_ready(release, namespace, "shapes-minimal")
    # With "Never" the node would report another reason.
    policy = "--set=images.node.pullPolicy=IfNotPresent"
    deploy(release, "upgrade", "--reuse-values", "--set=images.node.tag=absent", policy)

    def pull_failed(found: dict[str, Body], name: str, kind: str) -> bool:
        return condition(found[name], kind).get("reason") == "ImagePullBackOff"

    found = namespace.until("DiffusionWorkflow", lambda found: pull_failed(found, "shapes-minimal", "Degraded"))
    assert is_ready(found["shapes-minimal"])
    assert "latentflow-node:absent" in condition(found["shapes-minimal"], "Degraded")["message"]
    namespace.apply(broken("newer", {"dtype": "bfloat16"}))
    namespace.until("DiffusionWorkflow", lambda found: pull_failed(found, "newer", "Ready"))
    deploy(release, "upgrade", "--reuse-values", f"--set=images.node.tag={images.NEXT_TAG}", policy)
    wait_until_ready(release, namespace, "shapes-minimal", "newer")
    rolled_out(release, namespace, images.NEXT_TAG)
    namespace.until(
        "DiffusionWorkflow",
        lambda found: {condition(body, "Degraded").get("status") for body in found.values()} == {"False"},
    )
