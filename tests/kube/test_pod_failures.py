"""The failure of a pod is reported on its workflow, on a real API server; the tests write the pod statuses."""

from __future__ import annotations

import pytest
from kube.simulated_kubelet import report, workflow
from support.kubectl import Body, Namespace, condition
from support.operating import Operator

FAILURES = [
    (
        "ImagePullBackOff",
        {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}}},
        "The image latentflow-node:test cannot be pulled",
    ),
    (
        "SecretNotFound",
        {"state": {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "hub" not found'}}},
        "The Secret 'hub' does not exist in this namespace; create it.",
    ),
    (
        "OOMKilled",
        {
            "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137}},
        },
        "raise the model's resources.limits.memory",
    ),
    (
        "CannotLoad",
        {
            "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {
                "terminated": {
                    "exitCode": 2,
                    "message": '{"event": "downloading"}\n' * 60 + "latentflow-node: The folder /models/x is missing.",
                }
            },
        },
        "The folder /models/x is missing.",
    ),
    (
        "CrashLoopBackOff",
        {
            "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"exitCode": 1, "message": "Traceback"}},
        },
        "ended with exit code 1: Traceback",
    ),
]


@pytest.mark.parametrize(("reason", "state", "words"), FAILURES, ids=[reason for reason, _, _ in FAILURES])
def test_a_container_failure_is_reported_on_the_workflow_with_its_reason(
    operator: Operator, namespace: Namespace, reason: str, state: Body, words: str
) -> None:
    namespace.create(workflow())
    pods = namespace.until("Pod", lambda found: len(found) == 4)
    name, pod = next(iter(pods.items()))
    container = {"name": "node", "image": "latentflow-node:test", "imageID": "", "ready": False, "restartCount": 1}
    report(namespace, name, ready=False, containerStatuses=[container | state])
    shown = namespace.until(
        "DiffusionWorkflow", lambda found: condition(found["shapes"], "Degraded").get("reason") == reason
    )["shapes"]
    model = pod["metadata"]["labels"]["latentflow.io/model"]
    for about in ("Ready", "Degraded"):
        assert condition(shown, about)["reason"] == reason
        assert words in condition(shown, about)["message"]
    namespace.until("DiffusionModel", lambda found: words in condition(found[model], "Ready").get("message", ""))


@pytest.mark.parametrize(
    ("message", "reason", "words"),
    [
        ("0/1 nodes are available: 1 Insufficient cpu.", "Unschedulable", "No node can run the pod: 0/1 nodes"),
        (
            '0/1 nodes are available: persistentvolumeclaim "weights" not found.',
            "PersistentVolumeClaimNotFound",
            "The PersistentVolumeClaim 'weights' does not exist",
        ),
    ],
)
def test_the_reason_why_a_pod_has_no_node_is_reported_on_the_workflow(
    operator: Operator, namespace: Namespace, message: str, reason: str, words: str
) -> None:
    namespace.create(workflow())
    name = next(iter(namespace.until("Pod", lambda found: len(found) == 4)))
    unscheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    namespace.patch("Pod", name, {"status": {"conditions": [unscheduled]}}, subresource="status")
    shown = namespace.until(
        "DiffusionWorkflow", lambda found: condition(found["shapes"], "Scheduled").get("reason") == reason
    )["shapes"]
    assert words in condition(shown, "Scheduled")["message"]
