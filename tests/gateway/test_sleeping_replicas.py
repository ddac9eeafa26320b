"""Gateways send no requests to replicas that sleep, and requests move when their replica falls asleep."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc.aio
import pytest
from latentflow import AsyncClient, ImageReady, Progress
from latentflow.api import identity
from latentflow.v1 import control_pb2, control_pb2_grpc
from latentflow_nodes.server import Node
from support.scraping import value
from support.serving import PROMPT, WORKFLOW, Served, served
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

SECONDS = 60.0
BASE = next(identity(model) for model in WORKFLOW.spec.models if model.role == "Denoiser")


def denoisers(servers: Served) -> list[Node]:
    return [node for node in servers.nodes if node.context.settings.role == "Denoiser"]


def ended(node: Node, code: str) -> float:
    """The Denoise calls of a server that ended with a code."""
    metrics = f"127.0.0.1:{node.metrics_port}"
    return value(metrics, "latentflow_requests_total", call="Denoise", code=code)


async def sleep(node: Node, *, epoch: int = 1) -> None:
    request = control_pb2.SleepRequest(epoch=epoch)
    request.grace.FromSeconds(0)
    async with grpc.aio.insecure_channel(node.address) as channel:
        await control_pb2_grpc.ControlStub(channel).Sleep(request, timeout=SECONDS)


async def wake(node: Node, *, epoch: int = 2) -> None:
    async with grpc.aio.insecure_channel(node.address) as channel:
        await control_pb2_grpc.ControlStub(channel).Wake(control_pb2.WakeRequest(epoch=epoch), timeout=SECONDS)


@retry(retry=retry_if_exception_type(AssertionError), stop=stop_after_delay(20), wait=wait_fixed(0.05))
async def until(servers: Served, metric: str, expected: float, *, model: str = BASE) -> None:
    """Returns when a metric of the gateway has a value."""
    metrics = f"127.0.0.1:{servers.gateway.metrics_port}"
    assert await asyncio.to_thread(value, metrics, metric, model=model) == expected


async def test_a_replica_that_sleeps_gets_no_requests_until_it_is_awake(tmp_path: Path) -> None:
    async with served(tmp_path, denoisers=2) as servers, AsyncClient(servers.gateway.address) as client:
        one, other = denoisers(servers)
        await sleep(one)
        await until(servers, "latentflow_gateway_replicas_ready", 1)
        await asyncio.gather(*(client.generate(PROMPT, steps=2, timeout=SECONDS) for _ in range(4)))
        assert (ended(one, "OK"), ended(other, "OK")) == (0, 4)
        await sleep(other)
        await wake(one)
        await until(servers, "latentflow_gateway_replicas_ready", 1)
        await client.generate(PROMPT, steps=2, timeout=SECONDS)
        assert (ended(one, "OK"), ended(other, "OK")) == (1, 4)


@pytest.mark.parametrize("role", ["TextEncoder", "Denoiser", "VAE"])
async def test_a_request_is_held_while_every_replica_of_a_model_sleeps(tmp_path: Path, role: str) -> None:
    async with served(tmp_path, ready_seconds=SECONDS) as servers, AsyncClient(servers.gateway.address) as client:
        node = servers.node(role)
        await sleep(node)
        waiting = asyncio.create_task(client.generate(PROMPT, steps=2, timeout=SECONDS))
        await until(servers, "latentflow_gateway_held", 1, model=node.context.settings.identity)
        await wake(node)
        assert (await waiting).image.size == (64, 64)


async def test_a_request_whose_denoiser_falls_asleep_continues_elsewhere_bit_for_bit(tmp_path: Path) -> None:
    async with served(tmp_path, denoisers=2) as servers, AsyncClient(servers.gateway.address) as client:
        undisturbed = await client.generate(PROMPT, steps=200, seed=3, timeout=SECONDS)
        images = []
        slept: Node | None = None
        async for event in client.stream(PROMPT, steps=200, seed=3, timeout=SECONDS):
            if isinstance(event, Progress) and slept is None:
                slept = next(node for node in denoisers(servers) if node.context.load.state().running)
                await sleep(slept)
            if isinstance(event, ImageReady):
                images.append(event.pil)
        assert slept is not None
        assert ended(slept, "UNAVAILABLE") == 1
        assert [image.tobytes() for image in images] == [undisturbed.image.tobytes()]
