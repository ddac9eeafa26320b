"""A denoiser and its colocated models in one pod, on a real API server with the restricted Pod Security Standard."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from kube.simulated_kubelet import KINDS, bound, ready, report
from kube.simulated_kubelet import workflow as separate
from latentflow.api import DiffusionWorkflow, placed
from latentflow.internal.metrics import SCHEDULER, Instruments
from latentflow_gateway import cluster as gateway
from latentflow_operator.cluster import Cluster
from latentflow_operator.scaling import Scaler
from latentflow_operator.settings import ScalingSettings
from latentflow_operator.store import Store
from latentflow_scheduler.policy import Load
from latentflow_scheduler.signals import Signals
from support.apiserver import ApiServer
from support.kubectl import Body, Namespace, condition, is_ready, new_namespace
from support.operating import Operator

RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
ADDRESS = "192.0.2.7"


@pytest.fixture(scope="module")
def operator(
    api_server: ApiServer, accounts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Operator]:
    process = Operator(accounts["operator"], tmp_path_factory.mktemp("operator"), modelRoot={"emptyDir": {}})
    with api_server.controller_manager():
        process.start()
        yield process
        process.stop()


@pytest.fixture
def namespace(api_server: ApiServer) -> Iterator[Namespace]:
    with new_namespace(api_server, "colocated", labels=RESTRICTED) as created:
        yield created


def workflow(*, edges: str = "controlnet-edges", **base: Any) -> Body:
    """A workflow whose ControlNet and VAE run in the denoiser's pods."""
    body = separate(**base)
    _, _, controlnet, pixels = body["spec"]["models"]
    controlnet["source"]["subfolder"] = edges
    controlnet["placement"] = pixels["placement"] = "Colocated"
    return body


def names_of(body: Body) -> dict[str, str]:
    """DiffusionModels by the models' names."""
    metadata = {"name": body["metadata"]["name"], "namespace": "any"}
    return placed(DiffusionWorkflow.of_object(body | {"metadata": metadata}))


def serve(namespace: Namespace, *models: str) -> None:
    """Writes that the pods of these models run and are ready."""
    for model in models:
        pods = namespace.until("Pod", functools.partial(_any_of, model=model))
        for name, pod in pods.items():
            if _of(pod, model):
                report(namespace, name, ready=True, podIP=ADDRESS, podIPs=[{"ip": ADDRESS}])


def _of(pod: Body, model: str) -> bool:
    return bool(pod["metadata"]["labels"]["latentflow.io/model"] == model)


def _any_of(pods: Mapping[str, Body], *, model: str) -> bool:
    return any(_of(pod, model) for pod in pods.values())


def test_colocated_models_are_containers_in_their_host_s_pods_and_reachable_there(
    operator: Operator, namespace: Namespace
) -> None:
    namespace.create(workflow())
    names = names_of(workflow())
    assert namespace.until("DiffusionModel", lambda found: len(found) == 4).keys() == set(names.values())
    pods = {names["text"], names["base"]}
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert namespace.until(kind, lambda found: len(found) == 2).keys() == pods
    assert namespace.until("Service", lambda found: len(found) == 4).keys() == set(names.values())
    serve(namespace, *pods)
    status = ready(namespace)["status"]
    assert {entry["name"]: (entry["replicas"], entry["readyReplicas"]) for entry in status["models"]} == dict.fromkeys(
        ("text", "base", "edges", "pixels"), (1, 1)
    )
    slices = namespace.until(
        "EndpointSlice",
        lambda found: len(_addresses(namespace, found)) == 4 and all(map(len, _addresses(namespace, found).values())),
    )
    # The Services route to the ports on which the containers listen.
    (pod,) = (pod for pod in namespace.list("Pod").values() if _of(pod, names["base"]))
    listens = {container["name"]: container["ports"][0]["containerPort"] for container in pod["spec"]["containers"]}
    assert listens.keys() == {"node", names["edges"], names["pixels"]}
    reached = _addresses(namespace, slices)
    assert reached[names["base"]] == (f"{ADDRESS}:{listens['node']}",)
    for name in ("edges", "pixels"):
        assert reached[names[name]] == (f"{ADDRESS}:{listens[names[name]]}",)
    namespace.delete("DiffusionWorkflow", "shapes")
    for kind in (*KINDS, "Pod"):
        namespace.until(kind, lambda found: not found)


def _addresses(namespace: Namespace, slices: dict[str, Body]) -> dict[str, tuple[str, ...]]:
    """As gateways read them, by model."""
    models = gateway.directory([], slices.values()).models
    return {name.removeprefix(f"{namespace.name}/"): model.replicas for name, model in models.items()}


def test_the_containers_of_a_pod_may_share_a_device_through_a_claim(operator: Operator, namespace: Namespace) -> None:
    claim = {"claims": [{"name": "gpu"}]}
    claims = [{"name": "gpu", "resourceClaimTemplateName": "one-gpu"}]
    body = workflow(pod={"resourceClaims": claims}, resources=claim)
    body["spec"]["models"][2]["resources"] = claim
    namespace.create(body)
    names = names_of(body)
    pods = namespace.until("Pod", lambda found: any(_of(pod, names["base"]) for pod in found.values()))
    (pod,) = (pod for pod in pods.values() if _of(pod, names["base"]))
    assert pod["spec"]["resourceClaims"] == claims
    claiming = {one["name"] for one in pod["spec"]["containers"] if one.get("resources", {}).get("claims")}
    assert claiming == {"node", names["edges"]}


def test_a_colocated_model_has_the_replicas_of_its_host(operator: Operator, namespace: Namespace) -> None:
    namespace.create(workflow())
    names = names_of(workflow())
    serve(namespace, names["text"], names["base"])
    ready(namespace)
    namespace.patch("DiffusionModel", names["base"], {"spec": {"replicas": 2}}, subresource="scale")
    shown = namespace.until(
        "DiffusionWorkflow",
        lambda found: all(
            entry["replicas"] == (1 if entry["name"] == "text" else 2) for entry in found["shapes"]["status"]["models"]
        ),
    )
    assert is_ready(shown["shapes"])
    namespace.until("DiffusionModel", lambda found: found[names["edges"]]["status"]["replicas"] == 2)


def test_the_failure_of_a_colocated_model_s_container_is_reported_on_that_model_only(
    operator: Operator, namespace: Namespace
) -> None:
    namespace.create(workflow())
    names = names_of(workflow())
    pods = namespace.until("Pod", lambda found: any(_of(pod, names["base"]) for pod in found.values()))
    (name,) = (name for name, pod in pods.items() if _of(pod, names["base"]))
    failed = {"exitCode": 2, "message": "latentflow-node: The folder /models/x is missing."}
    waiting = {"waiting": {"reason": "CrashLoopBackOff"}}
    statuses = [
        {"name": container, "image": "x", "imageID": "", "ready": container != names["edges"], "restartCount": 1}
        | ({"state": waiting, "lastState": {"terminated": failed}} if container == names["edges"] else {})
        for container in ("node", names["edges"], names["pixels"])
    ]
    report(namespace, name, ready=False, containerStatuses=statuses)
    shown = namespace.until(
        "DiffusionWorkflow", lambda found: condition(found["shapes"], "Degraded").get("reason") == "CannotLoad"
    )["shapes"]
    for about in ("Ready", "WeightsAvailable", "Degraded"):
        assert condition(shown, about)["reason"] == "CannotLoad"
        assert condition(shown, about)["message"].startswith("Model 'edges'")
    # Each object's status is a write of its own.
    models = namespace.until(
        "DiffusionModel", lambda found: all(condition(body, "Degraded") for body in found.values())
    )
    degraded = {name for name, body in models.items() if condition(body, "Degraded")["status"] == "True"}
    assert degraded == {names["edges"]}


def test_a_changed_colocated_model_takes_over_with_its_pod_without_interruption(
    operator: Operator, namespace: Namespace
) -> None:
    namespace.create(workflow())
    before = names_of(workflow())
    serve(namespace, before["text"], before["base"])
    ready(namespace)
    changed = workflow(edges="controlnet-layout")
    after = names_of(changed)
    namespace.apply(changed)
    namespace.until("DiffusionModel", lambda found: set(after.values()) <= found.keys())
    states: list[tuple[bool, dict[str, str]]] = []

    def switched(found: dict[str, Body]) -> bool:
        states.append((is_ready(found["shapes"]), bound(found["shapes"])))
        return states[-1][1] == after

    rolling = namespace.until(
        "DiffusionWorkflow", lambda found: condition(found["shapes"], "Progressing").get("reason") == "RollingOut"
    )
    assert not switched(rolling)
    serve(namespace, after["base"])
    namespace.until("DiffusionWorkflow", switched)
    # The bindings never mix the two pods, and the workflow is always ready.
    assert all(serves and models in (before, after) for serves, models in states)
    assert namespace.until("DiffusionModel", lambda found: len(found) == 4).keys() == set(after.values())
    assert namespace.until("Deployment", lambda found: len(found) == 2).keys() == {after["text"], after["base"]}
    assert namespace.until("Service", lambda found: len(found) == 4).keys() == set(after.values())


async def test_held_requests_of_a_colocated_model_wake_its_host_and_its_load_scales_it(
    operator: Operator, api_server: ApiServer, namespace: Namespace
) -> None:
    namespace.create(workflow(scaling={"minReplicas": 0, "maxReplicas": 2}))
    names = names_of(workflow())
    namespace.until("DiffusionModel", lambda found: len(found) == 4)
    namespace.patch("DiffusionModel", names["base"], {"spec": {"replicas": 0}}, subresource="scale")
    store = Store()
    for body in namespace.list("DiffusionModel").values():
        store.put(body)
    now = 0.0
    scaler = Scaler(
        clock=lambda: now,
        store=store,
        observe=store.put,
        cluster=Cluster(api_server.client()),
        settings=ScalingSettings(prometheus="http://127.0.0.1:9"),
        metrics=Instruments(SCHEDULER),
    )
    await scaler.step(Signals(loads={}, replicas={}, held={(namespace.name, names["edges"]): 3.0}), {})
    replicas = {name: body["spec"].get("replicas") for name, body in namespace.list("DiffusionModel").items()}
    assert replicas == dict.fromkeys(names.values(), None) | {names["base"]: 1}
    now = ScalingSettings(prometheus="http://127.0.0.1:9").up_seconds
    busy = Load(arrival_rate=3.0, service_seconds=0.33, busy=1.0, queued=0.0, held=0.0)
    idle = Load(arrival_rate=3.0, service_seconds=0.03, busy=0.1, queued=0.0, held=0.0)
    for body in namespace.list("DiffusionModel").values():
        store.put(body)
    loads = {(namespace.name, names["base"]): idle, (namespace.name, names["edges"]): busy}
    await scaler.step(Signals(loads=loads, replicas=dict.fromkeys(loads, 1), held={}), {})
    assert namespace.list("DiffusionModel")[names["base"]]["spec"]["replicas"] == 2
