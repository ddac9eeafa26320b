"""kill -9 in the middle of a request: the process is restarted, and the request completes with the same pixels."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from latentflow import AsyncClient, Progress, results
from latentflow_local.runtime import Runtime
from latentflow_local.supervisor import State, Supervised
from PIL import Image, ImageDraw

pytestmark = pytest.mark.asyncio(loop_scope="session")


def circle() -> Image.Image:
    image = Image.new("RGB", (64, 64))
    ImageDraw.Draw(image).ellipse((12, 12, 44, 44), outline="white")
    return image


ARGUMENTS: dict[str, Any] = {
    "seed": 5,
    "steps": 30,
    "control_images": {"edges": circle()},
    "loras": {"outline": 0.5},
    "timeout": 120,
}
PROMPT = "a small blue star on the right, black background"


def of_role(runtime: Runtime, role: str) -> Supervised:
    return next(one for one in runtime.supervised.values() if one.spec.role == role)


async def pixels(client: AsyncClient, *, kill_at: int = 0, victim: Supervised | None = None) -> bytes:
    """The image's pixels. The victim is killed at the first progress event of step `kill_at` or a later one."""
    collector = results.Collector()
    async for event in client.stream(PROMPT, **ARGUMENTS):
        collector.take(event)
        if victim is not None and isinstance(event, Progress) and kill_at <= event.step < event.total:
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)
            victim = None
    assert victim is None, "nothing was killed"
    return collector.result().image.tobytes()


async def wait_restarted(runtime: Runtime, one: Supervised, restarts: int) -> None:
    """Returns when the process has been restarted and takes requests again."""
    ready = lambda: one.restarts > restarts and one.state is State.READY  # noqa: E731
    await runtime.supervisor.wait_for(ready, seconds=60)


@pytest.mark.parametrize("role", ["TextEncoder", "Denoiser", "ControlNet", "LoRAStore", "VAE", "Gateway"])
async def test_a_process_killed_in_mid_request_is_restarted_and_the_pixels_are_the_same(
    runtime: Runtime, role: str
) -> None:
    async with AsyncClient(runtime.target) as client:
        expected = await pixels(client)
        victim = of_role(runtime, role)
        restarts = victim.restarts
        survived = await pixels(client, kill_at=11, victim=victim)
        assert survived == expected
        await wait_restarted(runtime, victim, restarts)
        assert await pixels(client) == expected


@pytest.mark.parametrize("role", ["ControlNet", "Denoiser"])
async def test_the_shared_memory_of_a_killed_server_is_removed(runtime: Runtime, role: str) -> None:
    victim = of_role(runtime, role)
    (option,) = (option for option in victim.spec.argv if option.startswith("--shared-memory="))
    folder = Path(option.partition("=")[2])
    servers, restarts = len(runtime.supervised) - 1, victim.restarts
    # Tensors whose leases still run, if an earlier test killed the gateway.
    before = set(folder.glob("*/*"))

    def clean() -> bool:
        return sum(path.is_dir() for path in folder.iterdir()) == servers and before >= set(folder.glob("*/*"))

    async with AsyncClient(runtime.target) as client:
        await pixels(client, kill_at=11, victim=victim)
    await wait_restarted(runtime, victim, restarts)
    async with asyncio.timeout(30):
        while not await asyncio.to_thread(clean):
            pass
