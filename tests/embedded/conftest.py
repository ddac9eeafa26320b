from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio
from latentflow.api import load_workflows
from latentflow_local.runtime import Runtime, run
from support.packs import MODELS

EXAMPLES = MODELS.parent / "examples"


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def runtime() -> AsyncIterator[Runtime]:
    """examples/shapes.yaml as real processes."""
    workflows = load_workflows(EXAMPLES / "shapes.yaml")
    async with run(
        workflows,
        model_root=MODELS,
        listen="127.0.0.1:0",
        http="127.0.0.1:0",
        cors_origins=["*"],
        threads=1,
        log_level="WARNING",
    ) as running:
        await running.supervisor.wait_ready(240)
        yield running
