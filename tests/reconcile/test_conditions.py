"""Whose trouble a pod's is, where several models run in it."""

from __future__ import annotations

from typing import Any

import pytest
from latentflow.api.model import ModelSpec
from latentflow_operator import conditions
from latentflow_operator.manifests import is_its_container

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


def reasons(name: str, pod: dict[str, Any]) -> dict[str, str]:
    statements = conditions.of_model(
        wanted=1,
        deployment=None,
        pods=[{"metadata": {"name": "pod"}, "status": pod}],
        is_own=is_its_container(name, SPECS[name]),
        before={},
        blind=False,
        wakes=True,
    )
    return {one.type.value: one.reason for one in statements}


@pytest.mark.parametrize(("killed", "whose"), [("node", "denoiser-1"), ("controlnet-1", "controlnet-1")])
def test_a_container_s_trouble_is_that_of_the_model_it_serves(killed: str, whose: str) -> None:
    statuses = [{"name": name} | (KILLED if name == killed else RUNS) for name in ("node", "controlnet-1")]
    for name in ("denoiser-1", "controlnet-1"):
        said = reasons(name, {"containerStatuses": statuses})
        assert said["Ready"] == ("OOMKilled" if name == whose else "Starting")
        assert said["Degraded"] == ("OOMKilled" if name == whose else "AsExpected")


def test_a_container_that_somebody_else_put_into_a_pod_is_its_main_model_s_trouble() -> None:
    statuses = [{"name": "node"} | RUNS, {"name": "proxy"} | KILLED]
    assert reasons("vae-1", {"containerStatuses": statuses})["Degraded"] == "OOMKilled"
    assert reasons("denoiser-1", {"containerStatuses": statuses})["Degraded"] == "OOMKilled"
    assert reasons("controlnet-1", {"containerStatuses": statuses})["Degraded"] == "AsExpected"


@pytest.mark.parametrize("name", ["denoiser-1", "controlnet-1"])
def test_what_keeps_the_whole_pod_from_running_is_the_trouble_of_every_model_in_it(name: str) -> None:
    unscheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no room"}
    assert reasons(name, {"conditions": [unscheduled]})["Scheduled"] == "Unschedulable"


def said(reason: str, *, ready: str = "False", weights: str = "True") -> dict[str, Any]:
    conditions_ = [
        {"type": "Ready", "status": ready, "reason": reason},
        {"type": "WeightsAvailable", "status": weights, "reason": "WeightsLoaded"},
    ]
    return {"status": {"conditions": conditions_}}


def test_a_changed_model_takes_over_when_it_is_ready_or_sleeps_but_not_before_it_ever_loaded() -> None:
    assert conditions.takes_over(said("ReplicasReady", ready="True"))
    assert conditions.takes_over(said("ScaledToZero"))
    assert not conditions.takes_over(said("ScaledToZero", weights="Unknown"))
    assert not conditions.takes_over(said("Starting"))
    assert not conditions.takes_over(None)


def test_a_sleeping_model_lacks_no_node() -> None:
    statements = conditions.of_model(
        wanted=0, deployment=None, pods=[], is_own=lambda container: True, before={}, blind=False, wakes=True
    )
    found = {one.type.value: (one.status, one.reason) for one in statements}
    assert found["Scheduled"] == ("True", "ScaledToZero")
    assert found["Ready"] == ("False", "ScaledToZero")


def test_a_model_that_was_scaled_to_none_and_that_nothing_wakes_is_not_ready() -> None:
    statements = conditions.of_model(
        wanted=0, deployment=None, pods=[], is_own=lambda container: True, before={}, blind=False, wakes=False
    )
    ready = next(one for one in statements if one.type.value == "Ready")
    assert (ready.status, ready.reason) == ("False", "NoReplicas")
    assert "kubectl scale" in ready.message


def test_a_pod_that_was_evicted_is_no_replica_once_another_has_taken_its_place() -> None:
    evicted = {"metadata": {"name": "a"}, "status": {"phase": "Failed", "reason": "Evicted", "message": "no memory"}}
    runs = {"metadata": {"name": "b"}, "status": {"phase": "Running"}}
    assert conditions.replicas([evicted, runs]) == [runs]
    assert conditions.replicas([evicted]) == [evicted]
    assert reasons("vae-1", evicted["status"])["Degraded"] == "Evicted"
