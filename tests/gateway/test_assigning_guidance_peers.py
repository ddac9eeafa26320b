"""The gateway gives a request a second replica of the denoiser where the workflow allows it and one is ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentflow import AsyncClient
from latentflow.api import Role
from latentflow.api.types import DiffusionWorkflow, Latent
from latentflow_gateway.replicas import Replica, spare
from support.packs import SHAPES
from support.reference import reference
from support.scraping import value
from support.serving import PROMPT, WORKFLOW, served
from support.stack import Request


def workflow(latent: Latent) -> DiffusionWorkflow:
    """The minimal workflow with a degree of latent parallelism."""
    document = WORKFLOW.model_dump(by_alias=True, mode="json", exclude_none=True)
    base = next(model for model in document["spec"]["models"] if model["role"] == Role.DENOISER)
    base["parallelism"] = {"latent": latent}
    return DiffusionWorkflow.model_validate(document)


async def generated(folder: Path, latent: Latent, *, denoisers: int = 2, **arguments: Any) -> tuple[Any, float]:
    """The image of a request, and how many guidance halves the denoisers have computed for each other."""
    async with (
        served(folder, workflow=workflow(latent), denoisers=denoisers) as servers,
        AsyncClient(servers.gateway.address) as client,
    ):
        request = {"seed": 7, "steps": 20, "guidance_scale": 5.0, "width": 64, "height": 64}
        result = await client.generate(PROMPT, **(request | arguments))
        halves = sum(
            value(f"127.0.0.1:{node.metrics_port}", "latentflow_requests_started_total", call="PredictNoise")
            for node in servers.nodes
        )
        return result.image, halves


@pytest.mark.parametrize("latent", [2, "Auto"])
async def test_a_request_runs_on_two_replicas_and_makes_diffusers_image(tmp_path: Path, latent: Latent) -> None:
    image, halves = await generated(tmp_path, latent)
    assert halves == 1
    _, expected = reference(SHAPES, Request(prompt=PROMPT, steps=20))
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


@pytest.mark.parametrize(
    ("latent", "arguments"),
    [(1, {}), (2, {"denoisers": 1}), (2, {"guidance_scale": 1.0})],
    ids=["degree 1", "one replica", "no guidance"],
)
async def test_a_request_without_a_second_half_or_replica_runs_on_one(
    tmp_path: Path, latent: Latent, arguments: dict[str, Any]
) -> None:
    _, halves = await generated(tmp_path, latent, **arguments)
    assert halves == 0


def replica(outstanding: int) -> Replica:
    one = Replica(identity="m", address="a:1", channel=None)  # type: ignore[arg-type]
    one.outstanding = outstanding
    return one


@pytest.mark.parametrize(
    ("latent", "outstanding", "found"),
    [(1, [0], None), (2, [], None), (2, [3, 4], 0), ("Auto", [0, 1], 0), ("Auto", [1, 2], None)],
)
def test_only_the_degree_two_takes_a_replica_that_is_busy(
    latent: Latent, outstanding: list[int], found: int | None
) -> None:
    own = replica(1)
    others = [replica(count) for count in outstanding]
    expected = None if found is None else others[found]
    assert spare([own, *others], beside=own, latent=latent) is expected
