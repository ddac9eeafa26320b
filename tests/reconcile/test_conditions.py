"""Whose trouble a pod's is, where several models run in it."""

from __future__ import annotations

from typing import Any

import pytest
from latentflow.api.types import ModelSpec
from latentflow_operator import conditions
from latentflow_operator.manifests import is_its_container

COMPANION = {"model": "controlnet-1", "role": "ControlNet", "source": {"uri": "edges"}}
SPECS = {
    "denoiser-1": ModelSpec.model_validate(
        {"role": "Denoiser", "source": {"uri": "shapes"}, "companions": [COMPANION]}
    ),
    "controlnet-1": ModelSpec.model_validate(
        {"role": "ControlNet", "source": {"uri": "edges"}, "inside": {"model": "denoiser-1", "place": 1}}
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
