"""The runtime ends while a process is still starting."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from latentflow.internal.metrics import LOCAL, Instruments
from latentflow_local import processes
from latentflow_local.planning import plan_gateway
from latentflow_local.supervisor import Supervisor

# A process of its own, because all runtimes of a process share a fork server. This fork server imports a module that reads a
# pipe without end.
PROGRAM = """
import asyncio, multiprocessing, os
from latentflow.api.types import Engine
from latentflow.internal.metrics import LOCAL, Instruments
from latentflow_local.planning import ProcessSpec
from latentflow_local.supervisor import Supervisor

async def work():
    at = {"address": "127.0.0.1:1", "metrics": "127.0.0.1:2"}
    specs = [
        ProcessSpec(name=f"{i}", model="m", role="VAE", uses=(), options=(), engine=Engine(), **at) for i in range(50)
    ]
    async with Supervisor(specs, environment={}, drain=1, metrics=Instruments(LOCAL)):
        # Returns once the fork server has opened the other end.
        await asyncio.to_thread(os.open, "pipe", os.O_WRONLY)
    print([one for one in multiprocessing.active_children()])

multiprocessing.get_context("forkserver").set_forkserver_preload(["blocking"])
asyncio.run(work())
"""


def test_the_runtime_ends_while_the_fork_server_still_imports(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "blocking.py").write_text('open("pipe").read()')
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "[]\n", "")


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
        tls=None,
        limits={},
        metrics="127.0.0.1:2",
        log_format="console",
    )
    async with Supervisor([spec], environment={}, drain=1, metrics=Instruments(LOCAL)):
        await asyncio.to_thread(entered.wait)
        asyncio.get_running_loop().call_later(0.2, resumed.set)
    assert [process.exitcode is not None for process in started] == [True]
