"""Models that are scaled, as real processes: replicas start and end with the load, and no request fails."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from latentflow import NO_RETRIES, AsyncClient, Progress, results
from latentflow.api import parse_workflows
from latentflow.errors import FailedPreconditionError
from latentflow_local.addresses import Addresses
from latentflow_local.runtime import Runtime, run
from latentflow_local.scaling import ScalingConfig
from latentflow_local.supervisor import State, Supervised
from latentflow_scheduler.policy import Settings
from support.packs import MODELS
from support.scraping import value

pytestmark = pytest.mark.asyncio(loop_scope="session")
SECONDS = 120
PROMPT = "a small blue star on the right, black background"
FILE = """
apiVersion: latentflow.io/v1alpha1
kind: DiffusionWorkflow
metadata: {{name: shapes}}
spec:
  models:
    - {{name: text, role: TextEncoder, source: {{uri: shapes}}}}
    - {{name: base, role: Denoiser, source: {{uri: shapes}}, scaling: {scaling}}}
    - {{name: pixels, role: VAE, source: {{uri: shapes}}}}
  defaults: {{guidanceScale: 3.0, width: 64, height: 64, steps: 20}}
"""


def config(*, down: float, idle: float = 3600.0) -> ScalingConfig:
    """Short times, so that tests are fast, and a target utilization of one half."""
    settings = Settings(
        target_utilization=0.5, backlog_seconds=1.0, up_seconds=1.0, down_seconds=down, idle_seconds=idle
    )
    return ScalingConfig(interval_seconds=0.2, window_seconds=2.0, policy=settings)


@contextlib.asynccontextmanager
async def served(scaling: str, *, config: ScalingConfig, drain: float = 10.0) -> AsyncIterator[Runtime]:
    """The workflow with this scaling of its denoiser, on two cores, which is the capacity for two replicas."""
    workflows = parse_workflows(FILE.format(scaling=scaling))
    async with run(
        workflows,
        model_root=MODELS,
        listen="127.0.0.1:0",
        threads=1,
        cores=2,
        scaling=config,
        drain=drain,
        log_level="WARNING",
    ) as runtime:
        await runtime.supervisor.wait_ready(240)
        yield runtime


def denoiser(runtime: Runtime) -> str:
    return next(one.spec.model for one in runtime.supervised.values() if one.spec.role == "Denoiser")


@contextlib.asynccontextmanager
async def load(runtime: Runtime, *, clients: int) -> AsyncIterator[set[str]]:
    """Clients that send requests one after another. Yields the addresses that have denoised; raises if a request failed."""
    used: set[str] = set()
    stopped = asyncio.Event()

    async def send(number: int) -> None:
        async with AsyncClient(runtime.target, timeout=SECONDS) as client:
            while not stopped.is_set():
                result = await client.generate(PROMPT, seed=number)
                used.update(stage.replica for stage in result.done.stages if stage.stage == "denoise")

    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(send(number))
        try:
            yield used
        finally:
            stopped.set()


def ready(runtime: Runtime, name: str) -> bool:
    return name in runtime.supervised and runtime.supervised[name].state is State.READY


async def test_a_replica_added_under_load_serves_requests_and_is_removed_again() -> None:
    async with served("{maxReplicas: 2}", config=config(down=2.0)) as runtime:
        model, before = denoiser(runtime), set(runtime.supervised)
        added = f"{model}-2"
        async with load(runtime, clients=4) as used:
            await runtime.supervisor.wait_for(lambda: ready(runtime, added), seconds=SECONDS)
            # The models with equal bounds keep their replicas.
            assert set(runtime.supervised) == before | {added}
            address = runtime.supervised[added].spec.address
            async with asyncio.timeout(SECONDS), AsyncClient(runtime.target) as client:
                while address not in used:
                    await client.generate(PROMPT)
        await runtime.supervisor.wait_for(lambda: set(runtime.supervised) == before, seconds=SECONDS)
        for direction in ("up", "down"):
            labels = {"model": model, "direction": direction}
            assert value(runtime.metrics, "latentflow_scheduler_decisions_total", **labels) >= 1
        assert value(runtime.metrics, "latentflow_scheduler_replicas", model=model) == 1


async def test_an_added_replica_that_is_killed_is_restarted() -> None:
    async with served("{maxReplicas: 2}", config=config(down=3600.0)) as runtime:
        added = f"{denoiser(runtime)}-2"
        async with load(runtime, clients=4):
            await runtime.supervisor.wait_for(lambda: ready(runtime, added), seconds=SECONDS)
            one = runtime.supervised[added]
            assert one.pid is not None
            os.kill(one.pid, signal.SIGKILL)
            await runtime.supervisor.wait_for(lambda: one.restarts == 1 and ready(runtime, added), seconds=SECONDS)
        assert runtime.supervised[added] is one


async def test_an_idle_model_has_no_replica_until_a_request_and_no_request_fails() -> None:
    async with (
        served("{minReplicas: 0}", config=config(down=0.5, idle=0.5)) as runtime,
        AsyncClient(runtime.target, timeout=SECONDS, retries=NO_RETRIES) as client,
    ):
        model = denoiser(runtime)

        def present() -> list[State]:
            return [one.state for one in runtime.supervised.values() if one.spec.model == model]

        await runtime.supervisor.wait_for(lambda: not present(), seconds=SECONDS)
        assert len((await client.generate(PROMPT)).images) == 1
        # And a request that arrives while the last replica drains.
        await runtime.supervisor.wait_for(lambda: State.DRAINING in present(), seconds=SECONDS)
        assert len((await client.generate(PROMPT)).images) == 1


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "out of time"])
async def test_removing_a_replica_in_mid_request_neither_restarts_it_nor_changes_pixels(
    killed: bool,
) -> None:
    async with (
        served("{minReplicas: 2, maxReplicas: 2}", config=config(down=0.0), drain=0.2) as runtime,
        AsyncClient(runtime.target, timeout=SECONDS) as client,
    ):
        model = denoiser(runtime)
        both = [runtime.supervised[name] for name in (model, f"{model}-2")]
        arguments: dict[str, Any] = {"seed": 5, "steps": 100}
        expected = (await client.generate(PROMPT, **arguments)).image.tobytes()
        removed: Supervised | None = None
        collector = results.Collector()
        async for event in client.stream(PROMPT, **arguments):
            collector.take(event)
            if isinstance(event, Progress) and removed is None and event.step >= 20:
                removed = next(one for one in both if value(one.spec.metrics, "latentflow_in_flight"))
                runtime.supervisor.remove(removed.spec.name)
                if killed:
                    assert removed.pid is not None
                    os.kill(removed.pid, signal.SIGKILL)
        assert removed is not None
        await runtime.supervisor.wait_for(lambda: removed.spec.name not in runtime.supervised, seconds=SECONDS)
        assert (removed.state, removed.restarts) == (State.STOPPED, 0)
        assert collector.result().image.tobytes() == expected


async def test_a_replica_that_cannot_start_is_no_error_while_another_serves() -> None:
    async with served("{}", config=config(down=0.0)) as runtime, AsyncClient(runtime.target, timeout=SECONDS) as client:
        supervisor, serving = runtime.supervisor, runtime.supervised[denoiser(runtime)]
        failed = asyncio.create_task(supervisor.wait_failed())
        with Addresses() as addresses:
            address, metrics = addresses.free(2)
        another = serving.spec.another(2, address=address, metrics=metrics)
        supervisor.add(replace(another, options=(*another.options, "--dtype=none")))
        broken = runtime.supervised[another.name]
        await supervisor.wait_for(lambda: broken.state is State.FAILED, seconds=SECONDS)
        assert len((await client.generate(PROMPT)).images) == 1
        assert not failed.done()
        supervisor.remove(serving.spec.name)
        with pytest.raises(FailedPreconditionError, match=r"Denoiser .* cannot be served"):
            await failed
