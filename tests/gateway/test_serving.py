"""Gateways and model servers bind their ports and end at signals in the same way."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from latentflow.api import load_workflows
from latentflow.errors import FailedPreconditionError, InvalidRequestError
from latentflow.internal.directory import Directory
from latentflow.reasons import Reason
from latentflow_gateway.server import serve as serve_gateway
from latentflow_gateway.settings import GatewaySettings
from latentflow_nodes.server import serve as serve_node
from latentflow_nodes.settings import NodeSettings
from support.packs import MODELS
from support.paths import EXAMPLES

WORKFLOWS = tuple(load_workflows(EXAMPLES / "shapes-minimal.yaml"))
ADDRESSES = [
    ("gateway", "listen"),
    ("gateway", "http"),
    ("gateway", "metrics"),
    ("model server", "listen"),
    ("model server", "metrics"),
]


@pytest.fixture
def taken() -> Iterator[str]:
    """An address that another process listens on."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield f"127.0.0.1:{other.getsockname()[1]}"


async def start(kind: str, folder: Path, **addresses: str) -> None:
    """Starts a server and ends it."""
    if kind == "gateway":
        directory = folder / "directory.json"
        Directory(workflows=WORKFLOWS).write(directory)
        async with serve_gateway(GatewaySettings(directory=directory, **({"listen": "127.0.0.1:0"} | addresses))):  # type: ignore[arg-type]
            return
    async with serve_node(NodeSettings(role="VAE", uri="shapes", model_root=MODELS, **addresses)):  # type: ignore[arg-type]
        return


@pytest.mark.parametrize(("kind", "option"), ADDRESSES)
async def test_a_taken_port_is_named_with_its_address(kind: str, option: str, taken: str, tmp_path: Path) -> None:
    with pytest.raises(FailedPreconditionError, match=f"cannot listen on {taken}: ") as caught:
        await start(kind, tmp_path, **{option: taken})
    assert caught.value.reason == Reason.PORT_TAKEN


@pytest.mark.parametrize(("kind", "option"), ADDRESSES)
async def test_an_address_without_a_port_is_refused(kind: str, option: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="'localhost' is not an address; write host:port"):
        await start(kind, tmp_path, **{option: "localhost"})


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_a_gateway_and_ends_it_without_an_error(signum: signal.Signals, tmp_path: Path) -> None:
    directory = tmp_path / "directory.json"
    Directory(workflows=WORKFLOWS).write(directory)
    command = [
        sys.executable,
        "-m",
        "latentflow_gateway.server",
        "--listen=127.0.0.1:0",
        "--http-listen=127.0.0.1:0",
        "--log-format=json",
    ]
    with subprocess.Popen([*command, f"--directory={directory}"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while json.loads(process.stderr.readline())["event"] != "serving":
            pass
        process.send_signal(signum)
        rest = process.stderr.read()
        assert process.wait(20) == 0
    assert [json.loads(line)["event"] for line in rest.splitlines()] == ["draining"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_loads_exits_at_a_signal_though_its_main_thread_waits(signum: signal.Signals) -> None:
    # A blocked signal reaches another thread, as one that arrives just before the main thread waits has no effect on it.
    program = (
        "import signal, threading; from latentflow.internal import serving; serving.exit_at_signals();"
        "signal.pthread_sigmask(signal.SIG_BLOCK, serving.SIGNALS); print('waiting', flush=True);"
        "threading.Event().wait()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signum)
        try:
            assert process.wait(20) == 0
        finally:
            process.kill()
