"""Many clients at the same time, some of which disconnect: every other client gets an image, and nothing leaks."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import psutil
import pytest
from latentflow import NO_RETRIES, AsyncClient, LatentflowError, Retries
from latentflow_local.runtime import Runtime
from support.scraping import value

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]
CLIENTS, REQUESTS = 20, 200
COLORS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle", "star")


async def one_request(client: AsyncClient, rng: random.Random) -> str:
    """The outcome of a request: "image", "gone" if its client disconnected early, or the error's reason."""
    disconnect_after = rng.randint(1, 3) if rng.random() < 0.2 else None
    prompt = f"a {rng.choice(COLORS)} {rng.choice(SHAPES)}"
    loras = {rng.choice(("outline", "neon")): 0.5} if rng.random() < 0.3 else {}
    events = images = 0
    try:
        async for event in client.stream(prompt, steps=4, seed=rng.randrange(1000), loras=loras, timeout=300):
            events += 1
            if events == disconnect_after:
                return "gone"
            images += type(event).__name__ == "ImageReady"
    except LatentflowError as error:
        return error.reason
    return "image" if images == 1 else f"{images} images"


async def wave(runtime: Runtime, *, retries: Retries, seed: int) -> Counter[str]:
    """200 requests from 20 clients; every fourth client disconnects in the middle of a request once."""
    outcomes: Counter[str] = Counter()

    async def client_task(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        done = 0
        while done < REQUESTS // CLIENTS:
            async with AsyncClient(runtime.target, retries=retries) as client:
                if number % 4 == 0 and done == 3:
                    # Disconnects without cancelling while a request runs.
                    task = asyncio.create_task(one_request(client, rng))
                    await asyncio.wait({task}, timeout=0.05)
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                    outcomes["gone"] += 1
                    done += 1
                    continue
                for _ in range(min(3, REQUESTS // CLIENTS - done)):
                    outcomes[await one_request(client, rng)] += 1
                    done += 1

    await asyncio.gather(*(client_task(number) for number in range(CLIENTS)))
    return outcomes


async def settled(runtime: Runtime) -> None:
    """Waits until no process counts a request or holds a tensor and every request has ended; fails with the rest."""

    def left() -> dict[str, float]:
        counts: dict[str, float] = {}
        for one in runtime.supervised.values():
            names = ["latentflow_in_flight", "latentflow_queue_depth", "latentflow_tensors_held"]
            names = ["latentflow_gateway_in_flight"] if one.spec.role == "Gateway" else names
            counts |= {f"{one.spec.role} {name}": value(one.spec.metrics, name) for name in names}
            if one.spec.role != "Gateway":
                started = value(one.spec.metrics, "latentflow_requests_started_total")
                counts[f"{one.spec.role} not ended"] = started - value(one.spec.metrics, "latentflow_requests_total")
        return {name: count for name, count in counts.items() if count}

    remaining: dict[str, float] = {}
    try:
        async with asyncio.timeout(90):
            while remaining := await asyncio.to_thread(left):
                pass
    except TimeoutError:
        pytest.fail(f"not released: {remaining}")


def resident(runtime: Runtime) -> int:
    """Bytes of memory of all servers and the gateway."""
    return sum(psutil.Process(one.pid).memory_info().rss for one in runtime.supervised.values())


async def test_every_client_that_stays_connected_gets_its_image_and_nothing_leaks(runtime: Runtime) -> None:
    memory = []
    for seed in range(3):
        outcomes = await wave(runtime, retries=Retries(), seed=seed)
        assert outcomes.total() == REQUESTS
        assert set(outcomes) == {"image", "gone"}
        await settled(runtime)
        memory.append(resident(runtime))
    assert memory[2] <= memory[1] * 1.05


async def test_without_retries_a_client_gets_its_image_or_a_queue_full_error(runtime: Runtime) -> None:
    outcomes = await wave(runtime, retries=NO_RETRIES, seed=9)
    assert outcomes.total() == REQUESTS
    assert set(outcomes) <= {"image", "gone", "QUEUE_FULL"}
    assert outcomes["image"] > REQUESTS / 2
    await settled(runtime)
