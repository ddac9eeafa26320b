"""The runtime ends while a process is still starting."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from latentflow.internal.metrics import LOCAL, Instruments
from latentflow_local import processes
from latentflow_local.planning import plan_gateway
from latentflow_local.supervisor import Supervisor


async def test_a_process_still_starting_ends_with_the_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, resumed, started = threading.Event(), threading.Event(), list[processes.Process]()
    start = processes.start

    def delayed_start(*arguments: object, **options: object) -> processes.Process:
        entered.set()
        resumed.wait()
        started.append(start(*arguments, **options))  # type: ignore[arg-type]
        return started[0]

    monkeypatch.setattr(processes, "start", delayed_start)
    spec = plan_gateway(
        directory=tmp_path / "none",
        listen="127.0.0.1:1",
        http=None,
        cors_origins=(),
        api_keys=None,
        max_pixels=None,
        metrics="127.0.0.1:2",
        log_format="console",
    )
    async with Supervisor([spec], environment={}, drain=1, metrics=Instruments(LOCAL)):
        await asyncio.to_thread(entered.wait)
        asyncio.get_running_loop().call_later(0.2, resumed.set)
    assert [process.exitcode is not None for process in started] == [True]
