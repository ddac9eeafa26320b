"""The gateway gives a request a second replica of the denoiser where the workflow allows it and one is ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentflow import AsyncClient, Progress, results
from latentflow.api import Role
from latentflow.api.types import DiffusionWorkflow, Latent
from latentflow_gateway.loans import Loan
from latentflow_gateway.replicas import Replica, spare
from support.packs import SHAPES
from support.reference import reference
from support.scraping import value
from support.serving import PROMPT, WORKFLOW, Served, served
from support.stack import Request


def workflow(latent: Latent) -> DiffusionWorkflow:
    """The minimal workflow with a degree of latent parallelism."""
    document = WORKFLOW.model_dump(by_alias=True, mode="json", exclude_none=True)
    base = next(model for model in document["spec"]["models"] if model["role"] == Role.DENOISER)
    base["parallelism"] = {"latent": latent}
    return DiffusionWorkflow.model_validate(document)


def counted(servers: Served, name: str, **labels: str) -> float:
    """A metric, summed over the model servers."""
    return sum(value(f"127.0.0.1:{node.metrics_port}", name, **labels) for node in servers.nodes)


async def generated(folder: Path, latent: Latent, *, denoisers: int = 2, **arguments: Any) -> tuple[Any, float]:
    """The image of a request, and how many guidance halves the denoisers have computed for each other."""
    async with (
        served(folder, workflow=workflow(latent), denoisers=denoisers) as servers,
        AsyncClient(servers.gateway.address) as client,
    ):
        request = {"seed": 7, "steps": 20, "guidance_scale": 5.0, "width": 64, "height": 64}
        result = await client.generate(PROMPT, **(request | arguments))
        return result.image, counted(servers, "latentflow_requests_started_total", call="PredictNoise")


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


async def test_a_peer_is_taken_back_when_it_gets_a_request_of_its_own(tmp_path: Path) -> None:
    async with (
        served(tmp_path, workflow=workflow("Auto"), denoisers=2) as servers,
        AsyncClient(servers.gateway.address) as client,
    ):
        request: dict[str, Any] = {"guidance_scale": 5.0, "width": 64, "height": 64}
        collector, running = results.Collector(), 0.0
        async for event in client.stream(PROMPT, seed=7, steps=200, **request):
            collector.take(event)
            if running or not isinstance(event, Progress):
                continue
            if counted(servers, "latentflow_requests_started_total", call="PredictNoise") == 1:
                await client.generate(PROMPT, seed=8, steps=2, **request)
                running = counted(servers, "latentflow_in_flight")
        # The first request, without its guest.
        assert running == 1
        assert counted(servers, "latentflow_requests_started_total", call="PredictNoise") == 1
        _, expected = reference(SHAPES, Request(prompt=PROMPT, steps=200))
        image = collector.result().image
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def replica(outstanding: int, *loans: bool) -> Replica:
    """A replica with requests of its own, and with loans that are revocable or not."""
    one = Replica(identity="m", address="a:1", channel=None)  # type: ignore[arg-type]
    one.outstanding = outstanding
    for is_revocable in loans:
        Loan(one, is_revocable=is_revocable)
    return one


@pytest.mark.parametrize(
    ("latent", "others", "found"),
    [
        (1, [replica(0)], None),
        (2, [], None),
        (2, [replica(3), replica(4)], 0),
        ("Auto", [replica(0), replica(1)], 0),
        ("Auto", [replica(1), replica(2)], None),
        ("Auto", [replica(0, True), replica(0, False)], None),
    ],
)
def test_only_the_degree_two_takes_a_replica_that_is_busy(
    latent: Latent, others: list[Replica], found: int | None
) -> None:
    own = replica(1)
    expected = None if found is None else others[found]
    assert spare([own, *others], beside=own, latent=latent) is expected


def test_a_request_of_its_own_ends_only_the_loans_that_are_revocable() -> None:
    one = replica(0, True, False)
    assert one.demand == (1, 1)
    one.take_back()
    assert one.demand == (1, 0)
