"""A denoiser of two ranks in real processes: its images, and what happens when a rank is killed in mid request."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from latentflow import AsyncClient, Progress, results
from latentflow.api import parse_workflows
from latentflow_local.runtime import Runtime, run
from latentflow_local.supervisor import State, Supervised
from support.packs import MODELS, SHAPES
from support.reference import reference
from support.stack import Request

pytestmark = pytest.mark.asyncio(loop_scope="session")
REQUEST = Request(prompt="a small blue star on the right, black background", seed=5, steps=40, guidance_scale=3.0)
FILE = """
apiVersion: latentflow.io/v1alpha1
kind: DiffusionWorkflow
metadata: {name: shapes}
spec:
  models:
    - {name: text, role: TextEncoder, source: {uri: shapes}}
    - {name: base, role: Denoiser, source: {uri: shapes}, parallelism: {tensor: 2}}
    - {name: pixels, role: VAE, source: {uri: shapes}}
  defaults: {guidanceScale: 3.0, width: 64, height: 64, steps: 40}
"""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def divided() -> AsyncIterator[Runtime]:
    async with run(
        parse_workflows(FILE), model_root=MODELS, listen="127.0.0.1:0", threads=1, cores=2, log_level="WARNING"
    ) as running:
        await running.supervisor.wait_ready(240)
        yield running


def rank_of(one: Supervised) -> int:
    """The process of the other rank of a server."""
    tasks = Path(f"/proc/{one.pid}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    (rank,) = (pid for pid in children if "--multiprocessing-fork" in Path(f"/proc/{pid}/cmdline").read_text())
    return rank


async def test_a_request_completes_with_the_same_image_when_a_rank_is_killed(divided: Runtime) -> None:
    expected = np.asarray(reference(SHAPES, REQUEST)[1], dtype=int)
    denoiser = next(one for one in divided.supervised.values() if one.spec.role == "Denoiser")
    rank = rank_of(denoiser)
    collector = results.Collector()
    async with AsyncClient(divided.target, timeout=120) as client:
        async for event in client.stream(REQUEST.prompt, seed=REQUEST.seed):
            collector.take(event)
            if isinstance(event, Progress) and denoiser.restarts == 0 and rank:
                os.kill(rank, signal.SIGKILL)
                rank = 0
    result = collector.result()
    assert rank == 0
    assert np.abs(np.asarray(result.image, dtype=int) - expected).max() <= 1
    assert [stage.attempts for stage in result.done.stages if stage.stage == "denoise"] == [2]
    assert denoiser.restarts == 1
    await asyncio.wait_for(divided.supervisor.wait_for(lambda: denoiser.state is State.READY, seconds=120), timeout=120)
