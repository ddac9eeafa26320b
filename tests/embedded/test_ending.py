"""The end of the runtime, at an awkward moment."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from latentflow.internal.metrics import LOCAL, Instruments
from latentflow_local import processes
from latentflow_local.planning import plan_gateway
from latentflow_local.supervisor import Supervisor


async def test_a_process_that_was_being_started_does_not_outlive_the_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, going, started = threading.Event(), threading.Event(), list[processes.Process]()
    start = processes.start

    def slowly(*arguments: object, **options: object) -> processes.Process:
        begun.set()
        going.wait()
        started.append(start(*arguments, **options))  # type: ignore[arg-type]
        return started[0]

    monkeypatch.setattr(processes, "start", slowly)
    spec = plan_gateway(directory=tmp_path / "none", listen="127.0.0.1:1", metrics="127.0.0.1:2", log_format="console")
    async with Supervisor([spec], environment={}, drain=1, metrics=Instruments(LOCAL)):
        await asyncio.to_thread(begun.wait)
        asyncio.get_running_loop().call_later(0.2, going.set)
    assert [process.exitcode is not None for process in started] == [True]
