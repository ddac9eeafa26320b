"""The operator on a real API server with Kubernetes' own controllers; the tests write the pod statuses."""

from __future__ import annotations

import signal
from collections import Counter
from datetime import UTC, datetime

import pytest
from kube.simulated_kubelet import KINDS, bound, ready, report, serve, workflow
from latentflow.api import API_VERSION
from support.apiserver import ApiServer
from support.kubectl import Body, Namespace, condition, is_ready
from support.operating import Operator


def test_a_workflow_has_one_set_of_objects_per_model_and_is_ready_when_they_are(
    operator: Operator, namespace: Namespace
) -> None:
    namespace.create(workflow())
    models = namespace.until("DiffusionModel", lambda found: len(found) == 4)
    for kind in KINDS:
        assert namespace.until(kind, lambda found: found.keys() == models.keys())
    serve(namespace)
    status = ready(namespace)["status"]
    assert status["modelsReady"] == "4/4"
    assert {entry["name"]: entry["readyReplicas"] for entry in status["models"]} == dict.fromkeys(
        ("text", "base", "edges", "pixels"), 1
    )
    assert status["observedGeneration"] == 1


def test_a_controlnet_s_pods_prefer_the_nodes_of_its_denoiser_s_pods(operator: Operator, namespace: Namespace) -> None:
    namespace.create(workflow())
    models = namespace.until("DiffusionModel", lambda found: len(found) == 4)
    by_role = {model["spec"]["role"]: model for model in models.values()}
    denoiser = by_role["Denoiser"]["metadata"]["name"]
    assert by_role["ControlNet"]["spec"]["preferredHost"] == denoiser
    assert "preferredHost" not in by_role["VAE"]["spec"]
    name = by_role["ControlNet"]["metadata"]["name"]
    deployment = namespace.until("Deployment", lambda found: name in found)[name]
    (term,) = deployment["spec"]["template"]["spec"]["affinity"]["podAffinity"][
        "preferredDuringSchedulingIgnoredDuringExecution"
    ]
    assert term["podAffinityTerm"]["labelSelector"]["matchLabels"] == {"latentflow.io/model": denoiser}


def test_a_second_workflow_adds_only_new_models_and_its_deletion_removes_only_those(
    operator: Operator, namespace: Namespace
) -> None:
    namespace.create(workflow("one"))
    first = namespace.until("DiffusionModel", lambda found: len(found) == 4)
    namespace.create(workflow("two", source={"uri": "other"}))
    both = namespace.until(
        "DiffusionModel",
        lambda found: (
            len(found) == 5 and sorted(len(m["metadata"]["ownerReferences"]) for m in found.values()) == [1, 1, 2, 2, 2]
        ),
    )
    namespace.delete("DiffusionWorkflow", "one")
    left = namespace.until(
        "DiffusionModel",
        lambda found: len(found) == 4 and all(len(m["metadata"]["ownerReferences"]) == 1 for m in found.values()),
    )
    assert left.keys() == (both.keys() - first.keys()) | {
        name for name, model in first.items() if model["spec"]["role"] != "Denoiser"
    }
    namespace.delete("DiffusionWorkflow", "two")
    for kind in (*KINDS, "Pod"):
        namespace.until(kind, lambda found: not found)


def test_a_changed_model_takes_over_when_ready_and_the_previous_one_is_deleted(
    operator: Operator, namespace: Namespace
) -> None:
    namespace.create(workflow())
    serve(namespace, namespace.until("DiffusionModel", lambda found: len(found) == 4).keys())
    before = bound(ready(namespace))
    namespace.apply(workflow(source={"uri": "other"}))
    models = namespace.until("DiffusionModel", lambda found: len(found) == 5)
    (new,) = models.keys() - set(before.values())
    waiting = namespace.until(
        "DiffusionWorkflow", lambda found: condition(found["shapes"], "Progressing").get("reason") == "RollingOut"
    )["shapes"]
    assert is_ready(waiting)
    assert bound(waiting) == before
    assert next(e for e in waiting["status"]["models"] if e["name"] == "base")["next"] == new
    serve(namespace, {new})
    after = namespace.until("DiffusionWorkflow", lambda found: bound(found["shapes"])["base"] == new)["shapes"]
    assert is_ready(after)
    gone = namespace.until("DiffusionModel", lambda found: before["base"] not in found)
    assert len(gone) == 4


def test_a_changed_model_whose_predecessor_never_served_takes_over_at_once(
    operator: Operator, namespace: Namespace
) -> None:
    namespace.create(workflow(source={"uri": "mistyped"}))
    before = namespace.until("DiffusionModel", lambda found: len(found) == 4)
    namespace.until("DiffusionWorkflow", lambda found: "status" in found["shapes"])
    namespace.apply(workflow())
    after = namespace.until("DiffusionModel", lambda found: len(found) == 4 and found.keys() != before.keys())
    assert len(after.keys() - before.keys()) == 1


def test_a_changed_model_with_a_replacing_rollout_takes_over_before_it_is_ready(
    operator: Operator, namespace: Namespace
) -> None:
    namespace.create(workflow(rollout="Replace"))
    serve(namespace, namespace.until("DiffusionModel", lambda found: len(found) == 4).keys())
    before = bound(ready(namespace))
    namespace.apply(workflow(rollout="Replace", source={"uri": "other"}))
    # Nothing becomes ready, as on a cluster where the previous model still has the only device.
    namespace.until("DiffusionModel", lambda found: before["base"] not in found and len(found) == 4)
    namespace.until("Pod", lambda found: not any(name.startswith(before["base"]) for name in found))


def test_changes_and_deletions_of_a_model_s_objects_by_others_are_reverted(
    operator: Operator, namespace: Namespace
) -> None:
    namespace.create(workflow())
    name = next(iter(namespace.until("Deployment", lambda found: len(found) == 4)))
    change = {"spec": {"template": {"spec": {"terminationGracePeriodSeconds": 1}}}}
    namespace.patch("Deployment", name, change)
    namespace.until(
        "Deployment", lambda found: found[name]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 31
    )
    namespace.delete("Service", name)
    namespace.until("Service", lambda found: name in found)


def test_replicas_written_through_scale_reach_the_deployment(operator: Operator, namespace: Namespace) -> None:
    namespace.create(workflow())
    models = namespace.until("DiffusionModel", lambda found: len(found) == 4)
    name = next(iter(models))
    namespace.patch("DiffusionModel", name, {"spec": {"replicas": 3}}, subresource="scale")
    namespace.until("Deployment", lambda found: found.get(name, {}).get("spec", {}).get("replicas") == 3)
    model = namespace.until("DiffusionModel", lambda found: found[name].get("status", {}).get("replicas") == 3)[name]
    for entry in model["metadata"]["managedFields"]:
        if entry["manager"] == "latentflow-operator":
            assert "f:replicas" not in entry["fieldsV1"].get("f:spec", {})


def test_each_field_has_its_single_writer(operator: Operator, namespace: Namespace) -> None:
    namespace.create(workflow())
    serve(namespace, namespace.until("DiffusionModel", lambda found: len(found) == 4).keys())
    ready(namespace)

    def writers(body: Body) -> set[tuple[str, str]]:
        return {
            (entry["manager"], top.removeprefix("f:"))
            for entry in body["metadata"]["managedFields"]
            for top in entry["fieldsV1"]
            if top != "f:metadata"
        }

    (of_workflow,) = namespace.list("DiffusionWorkflow").values()
    assert ("latentflow-operator", "spec") not in writers(of_workflow)
    assert ("latentflow-operator", "status") in writers(of_workflow)
    for model in namespace.list("DiffusionModel").values():
        assert writers(model) == {("latentflow-operator", "spec"), ("latentflow-operator", "status")}
        assert "finalizers" not in model["metadata"]
    for kind in ("Deployment", "Service", "PodDisruptionBudget"):
        for body in namespace.list(kind).values():
            assert ("latentflow-operator", "spec") in writers(body)


def test_the_operator_writes_nothing_after_a_restart(
    operator: Operator, namespace: Namespace, elsewhere: Namespace, api_server: ApiServer
) -> None:
    namespace.create(workflow())
    serve(namespace, namespace.until("DiffusionModel", lambda found: len(found) == 4).keys())
    ready(namespace)
    assert operator.stop(signal.SIGKILL) == -signal.SIGKILL
    restarted = datetime.now(UTC)
    operator.start()
    # Passes of this workflow run after every pass that the start caused.
    elsewhere.create(workflow())
    serve(elsewhere, elsewhere.until("DiffusionModel", lambda found: len(found) == 4).keys())
    ready(elsewhere)
    after = api_server.writes("latentflow-operator", "kopf", since=restarted)
    assert after
    assert [write for write in after if write[1] != elsewhere.name] == []


def test_a_pod_that_flaps_causes_one_status_write_per_object_and_change(
    operator: Operator, namespace: Namespace, api_server: ApiServer
) -> None:
    namespace.create(workflow())
    serve(namespace, namespace.until("DiffusionModel", lambda found: len(found) == 4).keys())
    ready(namespace)
    name, pod = next(iter(namespace.list("Pod").items()))
    flapped = datetime.now(UTC)
    report(namespace, name, ready=False)
    namespace.until("DiffusionWorkflow", lambda found: not is_ready(found["shapes"]))
    report(namespace, name, ready=True)
    ready(namespace)
    # A later write to the same objects, so that the audit log contains all earlier ones.
    namespace.create(workflow("later"))
    namespace.until(
        "DiffusionModel", lambda found: all(len(m["metadata"]["ownerReferences"]) == 2 for m in found.values())
    )
    model = pod["metadata"]["labels"]["latentflow.io/model"]
    made = Counter(write[1:] for write in api_server.writes("latentflow-operator", "kopf", since=flapped))
    # One for each direction.
    assert made[namespace.name, "diffusionmodels/status", model] == 2
    assert made[namespace.name, "diffusionworkflows/status", "shapes"] == 2
    others = {write for write in made if write[0] == namespace.name and write[2] not in (model, "shapes", "later")}
    assert not {write for write in others if write[1] in ("deployments", "services", "poddisruptionbudgets")}


def test_with_the_operator_down_a_deletion_still_completes(operator: Operator, namespace: Namespace) -> None:
    namespace.create(workflow())
    serve(namespace, namespace.until("DiffusionModel", lambda found: len(found) == 4).keys())
    operator.stop()
    try:
        namespace.delete("DiffusionWorkflow", "shapes")
        for kind in (*KINDS, "Pod"):
            namespace.until(kind, lambda found: not found)
    finally:
        operator.start()


@pytest.mark.parametrize("up", [True, False], ids=["operator up", "operator down"])
def test_a_namespace_with_all_its_objects_can_be_deleted(operator: Operator, namespace: Namespace, up: bool) -> None:
    namespace.create(workflow())
    namespace.until("PodDisruptionBudget", lambda found: len(found) == 4)
    if not up:
        operator.stop()
    try:
        namespace.call("DELETE", f"/api/v1/namespaces/{namespace.name}")
        for kind in ("DiffusionWorkflow", *KINDS, "Pod"):
            namespace.until(kind, lambda found: not found)
        namespace.until("Namespace", lambda found: namespace.name not in found)
    finally:
        if not up:
            operator.start()


@pytest.mark.parametrize("up", [True, False], ids=["operator up", "operator down"])
def test_a_model_that_is_deleted_while_in_use_is_created_again(
    operator: Operator, namespace: Namespace, up: bool
) -> None:
    namespace.create(workflow())
    before = namespace.until("DiffusionModel", lambda found: len(found) == 4)
    name, body = next(iter(before.items()))
    if not up:
        operator.stop()
    try:
        namespace.delete("DiffusionModel", name)
        if not up:
            for kind in (*KINDS, "Pod"):
                namespace.until(kind, lambda found: not any(name in one for one in found))
    finally:
        if not up:
            operator.start()
    namespace.until(
        "DiffusionModel", lambda found: name in found and found[name]["metadata"]["uid"] != body["metadata"]["uid"]
    )
    namespace.until(
        "Deployment",
        lambda found: name in found and found[name]["metadata"]["ownerReferences"][0]["uid"] != body["metadata"]["uid"],
    )


def test_a_model_by_reference_is_served_once_it_exists_and_outlives_its_workflows(
    operator: Operator, namespace: Namespace
) -> None:
    namespace.create(workflow(source=None, modelRef="theirs"))
    missing = namespace.until(
        "DiffusionWorkflow", lambda found: condition(found["shapes"], "Ready").get("reason") == "ModelNotFound"
    )["shapes"]
    assert "'base': DiffusionModel theirs does not exist" in condition(missing, "Ready")["message"]
    namespace.create(
        {
            "apiVersion": API_VERSION,
            "kind": "DiffusionModel",
            "metadata": {"name": "theirs"},
            "spec": {"role": "Denoiser", "source": {"uri": "shapes"}},
        }
    )
    serve(namespace, namespace.until("DiffusionModel", lambda found: len(found) == 4).keys())
    assert bound(ready(namespace))["base"] == "theirs"
    namespace.delete("DiffusionWorkflow", "shapes")
    left = namespace.until("DiffusionModel", lambda found: len(found) == 1)
    assert left.keys() == {"theirs"}
    assert "theirs" in namespace.until("Deployment", lambda found: len(found) == 1)


def test_a_change_of_readiness_is_recorded_as_one_event(operator: Operator, namespace: Namespace) -> None:
    namespace.create(workflow())
    serve(namespace, namespace.until("DiffusionModel", lambda found: len(found) == 4).keys())
    ready(namespace)

    def reasons(found: dict[str, Body]) -> list[str]:
        about = [event for event in found.values() if event.get("regarding", {}).get("kind") == "DiffusionWorkflow"]
        return [event["reason"] for event in sorted(about, key=lambda event: event["eventTime"])]

    found = namespace.until("Event", lambda found: "AllModelsReady" in reasons(found))
    assert reasons(found) == ["Starting", "AllModelsReady"]
