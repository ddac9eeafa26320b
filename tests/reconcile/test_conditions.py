"""On which model a failure is reported, and the conditions of models without replicas."""

from __future__ import annotations

from typing import Any

import pytest
from latentflow.api.conditions import ConditionReason
from latentflow.api.types import Latent, ModelSpec, Role
from latentflow_operator import conditions
from latentflow_operator.binding import Binding
from latentflow_operator.manifests import is_own_container
from latentflow_operator.objects import Model, Pod, parse

COLOCATED = {"model": "controlnet-1", "role": "ControlNet", "source": {"uri": "edges"}}
SPECS = {
    "denoiser-1": ModelSpec.model_validate({"role": "Denoiser", "source": {"uri": "shapes"}, "colocated": [COLOCATED]}),
    "controlnet-1": ModelSpec.model_validate(
        {"role": "ControlNet", "source": {"uri": "edges"}, "host": {"model": "denoiser-1", "index": 1}}
    ),
    "vae-1": ModelSpec.model_validate({"role": "VAE", "source": {"uri": "shapes"}}),
}
KILLED = {"state": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}, "ready": False}
RUNS = {"state": {"running": {}}, "ready": True}


def pod(status: dict[str, Any], name: str = "pod") -> Pod:
    metadata = {"namespace": "ns", "name": name, "uid": name, "resourceVersion": "1"}
    parsed = parse({"kind": "Pod", "metadata": metadata, "status": status})
    assert isinstance(parsed, Pod)
    return parsed


def reasons(name: str, status: dict[str, Any]) -> dict[str, str]:
    statements = conditions.of_model(
        wanted=1,
        deployment=None,
        pods=[pod(status)],
        is_own=is_own_container(name, SPECS[name]),
        previous={},
        lacks_signals=False,
        can_wake=True,
    )
    return {one.type.value: one.reason for one in statements}


@pytest.mark.parametrize(("killed", "model"), [("node", "denoiser-1"), ("controlnet-1", "controlnet-1")])
def test_a_container_failure_is_reported_on_the_model_of_the_container(killed: str, model: str) -> None:
    statuses = [{"name": name} | (KILLED if name == killed else RUNS) for name in ("node", "controlnet-1")]
    for name in ("denoiser-1", "controlnet-1"):
        found = reasons(name, {"containerStatuses": statuses})
        assert found["Ready"] == ("OOMKilled" if name == model else "Starting")
        assert found["Degraded"] == ("OOMKilled" if name == model else "AsExpected")


def test_the_failure_of_an_injected_container_is_reported_on_the_host() -> None:
    statuses = [{"name": "node"} | RUNS, {"name": "proxy"} | KILLED]
    assert reasons("vae-1", {"containerStatuses": statuses})["Degraded"] == "OOMKilled"
    assert reasons("denoiser-1", {"containerStatuses": statuses})["Degraded"] == "OOMKilled"
    assert reasons("controlnet-1", {"containerStatuses": statuses})["Degraded"] == "AsExpected"


@pytest.mark.parametrize("name", ["denoiser-1", "controlnet-1"])
def test_a_failure_of_the_whole_pod_is_reported_on_every_model_in_it(name: str) -> None:
    unscheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no room"}
    assert reasons(name, {"conditions": [unscheduled]})["Scheduled"] == "Unschedulable"


def model(reason: str, *, ready: str = "False", weights: str = "True") -> Model:
    reported = [
        {"type": "Ready", "status": ready, "reason": reason},
        {"type": "WeightsAvailable", "status": weights, "reason": "WeightsLoaded"},
    ]
    metadata = {"namespace": "ns", "name": "vae-1", "uid": "1", "resourceVersion": "1"}
    spec = {"role": "VAE", "source": {"uri": "shapes"}}
    parsed = parse({"kind": "DiffusionModel", "metadata": metadata, "spec": spec, "status": {"conditions": reported}})
    assert isinstance(parsed, Model)
    return parsed


def test_a_changed_model_takes_over_when_ready_or_scaled_to_zero_after_loading_once() -> None:
    assert conditions.can_take_over(model("ReplicasReady", ready="True"))
    assert conditions.can_take_over(model("ScaledToZero"))
    assert not conditions.can_take_over(model("ScaledToZero", weights="Unknown"))
    assert not conditions.can_take_over(model("Starting"))
    assert not conditions.can_take_over(None)


def test_a_model_scaled_to_zero_counts_as_scheduled() -> None:
    statements = conditions.of_model(
        wanted=0,
        deployment=None,
        pods=[],
        is_own=lambda container: True,
        previous={},
        lacks_signals=False,
        can_wake=True,
    )
    found = {one.type.value: (one.status, one.reason) for one in statements}
    assert found["Scheduled"] == ("True", "ScaledToZero")
    assert found["Ready"] == ("False", "ScaledToZero")


def test_a_model_scaled_to_zero_that_no_scheduler_wakes_is_not_ready() -> None:
    statements = conditions.of_model(
        wanted=0,
        deployment=None,
        pods=[],
        is_own=lambda container: True,
        previous={},
        lacks_signals=False,
        can_wake=False,
    )
    ready = next(one for one in statements if one.type.value == "Ready")
    assert (ready.status, ready.reason) == ("False", "NoReplicas")
    assert "kubectl scale" in ready.message


def test_an_evicted_pod_is_not_a_replica_once_another_has_replaced_it() -> None:
    status = {"phase": "Failed", "reason": "Evicted", "message": "no memory"}
    evicted, runs = pod(status, "a"), pod({"phase": "Running"}, "b")
    assert conditions.replicas([evicted, runs]) == [runs]
    assert conditions.replicas([evicted]) == [evicted]
    assert reasons("vae-1", status)["Degraded"] == "Evicted"


def degraded(workflow_model: Model, *without_effect: str) -> tuple[str, str, str]:
    binding = Binding(name="pixels", role=Role.VAE, model="vae-1", next=None, by_reference=False)
    statements = conditions.of_workflow(
        bindings=[binding], models={"vae-1": workflow_model}, conflicts=[], without_effect=without_effect
    )
    found = next(one for one in statements if one.type.value == "Degraded")
    return found.status, str(found.reason), found.message


def test_fields_without_effect_are_named_on_a_workflow_and_degrade_nothing() -> None:
    healthy = model("ReplicasReady", ready="True")
    assert degraded(healthy) == ("False", "AsExpected", "")
    status, reason, message = degraded(healthy, "slo", "models[base].parallelism.latent")
    assert (status, reason) == ("False", "FieldsWithoutEffect")
    assert "slo, models[base].parallelism.latent" in message


@pytest.mark.parametrize("reason", ConditionReason)
def test_every_reason_is_one_word_with_a_meaning_and_a_remedy(reason: ConditionReason) -> None:
    assert reason.isalpha()
    assert reason[0].isupper()
    assert reason.meaning.endswith(".")
    assert reason.remedy.endswith(".")


@pytest.mark.parametrize(
    ("degree", "ready", "expected"), [(1, 3, 1), (2, 0, 1), (2, 1, 1), (2, 2, 2), ("Auto", 1, 1), ("Auto", 3, 2)]
)
def test_the_latent_degree_in_force_is_what_ready_replicas_allow(degree: Latent, ready: int, expected: int) -> None:
    assert conditions.latent(degree, ready=ready) == expected
