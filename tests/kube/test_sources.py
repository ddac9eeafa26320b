"""Sources of weights, with a real API server and a hub on this machine; the tests write the pod statuses."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from kube.simulated_kubelet import ready, report, serve, workflow
from latentflow.internal.metrics import NODE, Instruments
from support.apiserver import ApiServer
from support.hub import Hub
from support.kubectl import Body, Namespace, condition, new_namespace
from support.operating import Operator
from support.packs import SHAPES
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "token-of-the-operator"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub().running() as hub:
        hub.push("org/shapes", SHAPES)
        yield hub


@pytest.fixture
def namespace(api_server: ApiServer, request: pytest.FixtureRequest) -> Iterator[Namespace]:
    with new_namespace(api_server, request.node.originalname) as created:
        yield created


@pytest.fixture
def operator(
    accounts: dict[str, Path],
    controllers: None,
    hub: Hub,
    namespace: Namespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Operator]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    process = Operator(
        accounts["operator"], tmp_path / "operator", f"--namespace={namespace.name}", hubEndpoint=hub.url
    )
    process.start()
    yield process
    process.stop()


def denoiser(namespace: Namespace) -> Body:
    models = namespace.until("DiffusionModel", lambda found: len(found) == 4)
    return next(body for body in models.values() if body["spec"]["role"] == "Denoiser")


def arguments(deployment: Body) -> list[str]:
    found: list[str] = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    return found


@retry(retry=retry_if_exception_type(AssertionError), stop=stop_after_delay(30), wait=wait_fixed(0.1), reraise=True)
def wait_for_requests(hub: Hub, times: int) -> None:
    """Waits until the hub has had this many requests for a revision."""
    assert hub.requests["revision"] >= times


def status_writes(api_server: ApiServer, namespace: Namespace, model: str) -> int:
    writes = api_server.writes("latentflow-operator")
    return sum(write[1:] == (namespace.name, "diffusionmodels/status", model) for write in writes)


def test_a_branch_is_pinned_once_and_every_pod_gets_the_recorded_commit(
    operator: Operator, hub: Hub, namespace: Namespace, api_server: ApiServer
) -> None:
    commit = hub.push("org/shapes", SHAPES)
    namespace.create(workflow(source={"uri": "hf://org/shapes", "revision": "main"}))
    name = denoiser(namespace)["metadata"]["name"]
    deployment = namespace.until("Deployment", lambda found: name in found)[name]
    assert f"--revision={commit}" in arguments(deployment)
    model = namespace.until("DiffusionModel", lambda found: "source" in found[name].get("status", {}))[name]
    assert model["status"]["source"] == {"uri": "hf://org/shapes", "revision": commit}
    assert model["spec"]["source"]["revision"] == "main"
    serve(namespace, namespace.until("DiffusionModel", lambda found: len(found) == 4).keys())
    ready(namespace)

    hub.push("org/shapes", SHAPES)
    hub.down = True
    requests = hub.requests["revision"]
    assert operator.stop(signal.SIGKILL) == -signal.SIGKILL
    restarted = datetime.now(UTC)
    operator.start()
    # Passes of this workflow run after every pass that the start caused.
    namespace.create(workflow("later", source={"uri": "other"}))
    namespace.until("Deployment", lambda found: len(found) == 5)
    after = api_server.writes("latentflow-operator", "kopf", since=restarted)
    assert after
    assert [write for write in after if write[3] == name] == []
    assert hub.requests["revision"] == requests == 1
    namespace.patch("DiffusionModel", name, {"spec": {"replicas": 2}}, subresource="scale")
    scaled = namespace.until("Deployment", lambda found: found[name]["spec"].get("replicas") == 2)[name]
    assert f"--revision={commit}" in arguments(scaled)


def test_the_models_of_a_workflow_are_pinned_to_one_commit(operator: Operator, hub: Hub, namespace: Namespace) -> None:
    body = workflow()
    for model in body["spec"]["models"]:
        model["source"]["uri"] = "hf://org/shapes"
    namespace.create(body)
    deployments = namespace.until("Deployment", lambda found: len(found) == 4)
    revisions = {one for body in deployments.values() for one in arguments(body) if one.startswith("--revision=")}
    assert len(revisions) == 1
    assert hub.requests["revision"] == 1


def test_the_nets_of_a_controlnet_are_pinned_and_recorded(operator: Operator, hub: Hub, namespace: Namespace) -> None:
    net: Any = {
        "name": "layout",
        "source": {"uri": "hf://org/shapes", "subfolder": "controlnet-layout", "revision": "main"},
    }
    body = workflow()
    next(model for model in body["spec"]["models"] if model["name"] == "edges")["nets"] = [net]
    commit = hub.push("org/shapes", SHAPES)
    namespace.create(body)
    pinned = [{"name": "layout", "source": net["source"] | {"revision": commit}}]
    models = namespace.until(
        "DiffusionModel", lambda found: any("nets" in one.get("status", {}) for one in found.values())
    )
    (name,) = (name for name, one in models.items() if one["spec"]["role"] == "ControlNet")
    assert models[name]["status"]["nets"] == pinned
    assert models[name]["spec"]["nets"] == [net]
    deployment = namespace.until("Deployment", lambda found: name in found)[name]
    (option,) = (one for one in arguments(deployment) if one.startswith("--nets="))
    assert json.loads(option.removeprefix("--nets=")) == pinned


def test_a_commit_is_used_without_the_hub(operator: Operator, hub: Hub, namespace: Namespace) -> None:
    hub.down = True
    namespace.create(workflow(source={"uri": "hf://org/shapes", "revision": COMMIT}))
    name = denoiser(namespace)["metadata"]["name"]
    deployment = namespace.until("Deployment", lambda found: name in found)[name]
    assert f"--revision={COMMIT}" in arguments(deployment)


def test_the_operator_sends_its_token_to_the_hub(operator: Operator, hub: Hub, namespace: Namespace) -> None:
    hub.token = TOKEN
    namespace.create(workflow(source={"uri": "hf://org/shapes"}))
    name = denoiser(namespace)["metadata"]["name"]
    namespace.until("Deployment", lambda found: name in found)


@pytest.mark.parametrize(
    ("state", "source", "reason", "words"),
    [
        ("", {"uri": "hf://org/nothing"}, "RepositoryNotFound", "has no repository org/nothing, or does not show it"),
        ("", {"uri": "hf://org/shapes", "revision": "v9"}, "RevisionNotFound", "no branch, tag or commit 'v9'"),
        ("gated", {"uri": "hf://org/shapes"}, "RepositoryGated", "accepted its terms"),
        ("down", {"uri": "hf://org/shapes"}, "HubUnreachable", "answered with status 503; the operator retries"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_failed_resolution_is_reported_on_the_workflow_until_it_succeeds(
    operator: Operator,
    hub: Hub,
    namespace: Namespace,
    api_server: ApiServer,
    state: str,
    source: Body,
    reason: str,
    words: str,
) -> None:
    hub.gated, hub.down = state == "gated", state == "down"
    namespace.create(workflow(source=source))
    shown = namespace.until(
        "DiffusionWorkflow", lambda found: condition(found["shapes"], "WeightsAvailable").get("reason") == reason
    )["shapes"]
    assert condition(shown, "WeightsAvailable")["status"] == "False"
    for about in ("WeightsAvailable", "Ready", "Degraded"):
        assert words in condition(shown, about)["message"]
    name = denoiser(namespace)["metadata"]["name"]
    if state != "down":
        wait_for_requests(hub, 3)
        assert status_writes(api_server, namespace, name) == 1
    assert name not in namespace.list("Deployment")

    hub.gated = hub.down = False
    hub.push("org/nothing", SHAPES)
    commit = hub.push("org/shapes", SHAPES, branch="v9")
    pinned = namespace.until("DiffusionModel", lambda found: "source" in found[name].get("status", {}))[name]
    if reason == "RevisionNotFound":
        assert pinned["status"]["source"]["revision"] == commit
    assert condition(pinned, "WeightsAvailable")["reason"] == "Starting"
    namespace.until("Deployment", lambda found: name in found)


def test_download_progress_is_reported_on_the_workflow_without_a_warning(
    operator: Operator, hub: Hub, namespace: Namespace, api_server: ApiServer
) -> None:
    namespace.create(workflow(source={"uri": "hf://org/shapes"}))
    name = denoiser(namespace)["metadata"]["name"]
    pods = namespace.until("Pod", lambda found: len(found) == 4)
    serve(namespace, namespace.list("DiffusionModel").keys() - {name})
    (pod,) = (key for key, body in pods.items() if body["metadata"]["labels"]["latentflow.io/model"] == name)
    node = Instruments(NODE, model=name, role="Denoiser")
    # An address of this machine that only this test uses, with the metrics port of pods.
    address = "127.85.0.1"
    node.serve(host=address, port=8501)
    node.of("latentflow_download_total_bytes").set(6.9 * (1 << 30))
    node.of("latentflow_download_bytes").set(1.2 * (1 << 30))
    report(namespace, pod, ready=False, podIP=address, podIPs=[{"ip": address}])
    words = "A server downloads the weights: 1.2 of 6.9 GiB."
    shown = namespace.until(
        "DiffusionWorkflow", lambda found: words in condition(found["shapes"], "WeightsAvailable").get("message", "")
    )["shapes"]
    assert {condition(shown, about)["reason"] for about in ("Ready", "WeightsAvailable")} == {"Downloading"}
    model = namespace.until(
        "DiffusionModel", lambda found: condition(found[name], "Progressing").get("reason") == "Downloading"
    )[name]
    assert (condition(model, "Progressing")["reason"], condition(model, "Progressing")["message"]) == (
        "Downloading",
        words,
    )
    assert condition(model, "Degraded")["status"] == "False"

    before = status_writes(api_server, namespace, name)
    node.of("latentflow_download_bytes").set(3 * (1 << 30))
    namespace.until(
        "DiffusionModel", lambda found: "3.0 of 6.9 GiB" in condition(found[name], "Progressing")["message"]
    )
    report(namespace, pod, ready=True)
    ready(namespace)
    node.close()
    assert status_writes(api_server, namespace, name) == before + 2
    events = [
        body
        for body in namespace.list("Event").values()
        if (body["regarding"]["kind"], body["regarding"]["name"]) == ("DiffusionModel", name)
    ]
    assert {body["type"] for body in events} == {"Normal"}
    assert sorted(body["reason"] for body in events).count("Downloading") == 1


def test_an_image_s_weights_are_a_read_only_volume_that_restricted_pods_may_mount(
    operator: Operator, namespace: Namespace
) -> None:
    label = {"pod-security.kubernetes.io/enforce": "restricted"}
    namespace.call("PATCH", f"/api/v1/namespaces/{namespace.name}", {"metadata": {"labels": label}}, merge=True)
    namespace.create(workflow(source={"uri": "oci://registry.example:5000/models/shapes:1", "subfolder": "unet"}))
    name = denoiser(namespace)["metadata"]["name"]
    pods = namespace.until(
        "Pod", lambda found: name in {body["metadata"]["labels"]["latentflow.io/model"] for body in found.values()}
    )
    (pod,) = (body for body in pods.values() if body["metadata"]["labels"]["latentflow.io/model"] == name)
    (volume,) = (volume for volume in pod["spec"]["volumes"] if volume["name"] == "source")
    assert volume["image"] == {"reference": "registry.example:5000/models/shapes:1", "pullPolicy": "IfNotPresent"}
    (container,) = pod["spec"]["containers"]
    (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == "source")
    assert mount["readOnly"] is True
    assert {f"--uri=file://{mount['mountPath']}", "--subfolder=unet"} <= set(container["args"])
