"""A cancelled request frees the denoiser within two steps, and the counters include requests that still run."""

from __future__ import annotations

import asyncio

import pytest
from latentflow import AsyncClient, Progress
from latentflow_local.runtime import Runtime
from support.scraping import value

pytestmark = pytest.mark.asyncio(loop_scope="session")


def unfinished(denoiser: str) -> float:
    """Requests that the denoiser has started and not ended, by its counters."""
    started, ended = "latentflow_requests_started_total", "latentflow_requests_total"
    return value(denoiser, started, call="Denoise") - value(denoiser, ended, call="Denoise")


async def test_the_denoiser_is_free_within_two_steps_of_a_cancellation(runtime: Runtime) -> None:
    denoiser = next(one for one in runtime.supervised.values() if one.spec.role == "Denoiser").spec.metrics
    async with AsyncClient(runtime.target) as client:
        # Large enough that a step takes much longer than a message.
        async for event in client.stream("a red circle", width=512, height=512, steps=50, timeout=120):
            if isinstance(event, Progress) and event.step >= 3:
                assert await asyncio.to_thread(unfinished, denoiser) == 1
                steps = await asyncio.to_thread(value, denoiser, "latentflow_step_seconds_count")
                break
    async with asyncio.timeout(30):
        while await asyncio.to_thread(value, denoiser, "latentflow_in_flight"):
            pass
        while await asyncio.to_thread(unfinished, denoiser):
            pass
    assert value(denoiser, "latentflow_step_seconds_count") - steps <= 2
