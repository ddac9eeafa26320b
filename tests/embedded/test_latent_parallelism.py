"""Two processes of `latentflow up` compute the guidance halves of a request, and one of them may die meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio
from latentflow import AsyncClient, Progress, results
from latentflow.api import parse_workflows
from latentflow_local.runtime import Runtime, run
from latentflow_local.supervisor import Supervised
from support.packs import MODELS, SHAPES
from support.reference import reference
from support.scraping import value
from support.stack import Request

pytestmark = pytest.mark.asyncio(loop_scope="session")
REQUEST = Request(prompt="a small blue star on the right, black background", seed=5, steps=100, guidance_scale=3.0)
FILE = """
apiVersion: latentflow.io/v1alpha1
kind: DiffusionWorkflow
metadata: {name: shapes}
spec:
  models:
    - {name: text, role: TextEncoder, source: {uri: shapes}}
    - name: base
      role: Denoiser
      source: {uri: shapes}
      scaling: {minReplicas: 2, maxReplicas: 2}
      parallelism: {latent: 2}
    - {name: pixels, role: VAE, source: {uri: shapes}}
  defaults: {guidanceScale: 3.0, width: 64, height: 64, steps: 100}
"""


def guest_of(runtime: Runtime) -> Supervised | None:
    """The process that computes a half for another one at present."""
    for one in runtime.supervised.values():
        started = value(one.spec.metrics, "latentflow_requests_started_total", call="PredictNoise")
        if started > value(one.spec.metrics, "latentflow_requests_total", call="PredictNoise"):
            return one
    return None


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """The pixels that plain diffusers makes."""
    return np.asarray(reference(SHAPES, REQUEST)[1], dtype=int)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pair() -> AsyncIterator[Runtime]:
    async with run(
        parse_workflows(FILE), model_root=MODELS, listen="127.0.0.1:0", threads=1, cores=2, log_level="WARNING"
    ) as running:
        yield running


async def wait_for_both(runtime: Runtime) -> None:
    """Returns when the gateway may use both replicas, and neither works for the other."""
    await runtime.supervisor.wait_ready(240)
    gateway = runtime.supervised["gateway"].spec.metrics
    async with asyncio.timeout(60):
        # The gateway has its own view of the replicas: text, pixels and two of base.
        while await asyncio.to_thread(value, gateway, "latentflow_gateway_replicas_ready") < 4:
            pass
        while await asyncio.to_thread(guest_of, runtime):
            pass


@pytest.mark.parametrize("signum", [None, signal.SIGKILL, signal.SIGSTOP], ids=["undisturbed", "killed", "stopped"])
async def test_two_processes_make_diffusers_image_even_if_one_is_lost(
    pair: Runtime, expected: np.ndarray, signum: signal.Signals | None
) -> None:
    await wait_for_both(pair)
    async with AsyncClient(pair.target, timeout=120) as client:
        guest: Supervised | None = None
        stopped: int | None = None
        collector = results.Collector()
        async for event in client.stream(REQUEST.prompt, seed=REQUEST.seed):
            collector.take(event)
            if isinstance(event, Progress) and guest is None:
                guest = guest_of(pair)
                if signum is not None and guest is not None:
                    assert guest.pid is not None
                    os.kill(guest.pid, signum)
                    stopped = guest.pid if signum is signal.SIGSTOP else None
        if stopped is not None:
            os.kill(stopped, signal.SIGCONT)
        assert guest is not None
        result = collector.result()
        assert np.abs(np.asarray(result.image, dtype=int) - expected).max() <= 1
        attempts = [stage.attempts for stage in result.done.stages if stage.stage == "denoise"]
        assert attempts == [1]
