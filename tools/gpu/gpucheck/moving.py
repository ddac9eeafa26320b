"""How long an SDXL ControlNet's residuals take from one process's device to another's, by each transport.

The answering process is a Stage server with nothing to compute; asking and receiving is what a denoiser does.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import torch
from latentflow.internal import rpc
from latentflow.internal.metrics import NODE, Instruments
from latentflow.v1 import stage_pb2, stage_pb2_grpc
from latentflow_nodes.families.base import Residuals
from latentflow_nodes.tensors.peers import Peers
from latentflow_nodes.tensors.shared_memory import Memory, private_folder
from latentflow_nodes.tensors.step_stream import ResidualStream
from latentflow_nodes.tensors.transfer import Transport

from gpucheck import sizes
from gpucheck.report import Report

_ROUNDS = 12
_SECONDS = 60.0


class Answering(stage_pb2_grpc.StageServicer):
    """Answers every step with the same tensors, copied off the device each time."""

    def __init__(self, transport: Transport, bundle: dict[str, torch.Tensor]) -> None:
        self._transport = transport
        self._bundle = bundle

    async def Residuals(  # noqa: N802
        self, requests: AsyncIterator[stage_pb2.ResidualsRequest], _context: Any
    ) -> AsyncIterator[stage_pb2.ResidualsResponse]:
        with self._transport.sender() as sender:
            async for request in requests:
                if request.WhichOneof("message") == "open":
                    yield stage_pb2.ResidualsResponse(opened=True)
                else:
                    for chunk in sender.pieces(self._bundle, memory=request.step.shared_memory):
                        yield stage_pb2.ResidualsResponse(step=request.step.step, chunk=chunk)


def run(report: Report, device: str) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in sizes.residuals(device).values())
    report.figure("size", size / 2**20, "MiB")
    with private_folder() as folder, _answering(folder, device) as (plain, shared):
        for name, memory, address in (("gRPC", None, plain), ("shared memory", folder, shared)):
            with report.case(name):
                seconds, kinds = asyncio.run(_measure(address, memory, device))
                report.figure(f"{name}, a step", seconds * 1e3, "ms")
                report.figure(f"{name}, rate", size / seconds / 2**30, "GiB/s")
                report.figure(f"{name}, sent by", kinds)


@contextlib.contextmanager
def _answering(folder: Path | None, device: str) -> Iterator[list[str]]:
    """The addresses of the answering process: without shared memory, with it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gpucheck.moving", device, str(folder or "")], stdout=subprocess.PIPE, text=True
    )
    try:
        # A process that cannot start ends, and with it its output.
        addresses = process.stdout.readline().split() if process.stdout else []
        if not addresses:
            raise RuntimeError("The answering process did not start.")
        yield addresses
    finally:
        process.kill()
        process.wait()


async def _measure(address: str, memory: Path | None, device: str) -> tuple[float, str]:
    """Seconds from the question to the residuals on the device, and which transport the answers took."""
    metrics = Instruments(NODE, model="m", role="Denoiser")
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(contextlib.closing(Memory(memory))) if memory else None
        transport = Transport(memory=own, metrics=metrics)
        async with Peers(token=None, tls=None, transport=transport, metrics=metrics) as peers:
            ref = stage_pb2.ControlNetRef(peer=stage_pb2.Peer(address=address), scale=1.0)
            async with ResidualStream(peers, ref, stage_pb2.ResidualsOpen()) as stream:
                return await asyncio.to_thread(_ask, stream, device), _kinds(metrics)


def _ask(stream: ResidualStream, device: str) -> float:
    side = sizes.latent_side(device)
    sample = torch.randn(2, 4, side, side, device=device, dtype=sizes.dtype(device))
    times = []
    for step in range(3 if device == "cpu" else _ROUNDS):
        began = time.perf_counter()
        found: Residuals = stream.request(step=step, timestep=1.0, sample=sample, scale=1.0).result(_SECONDS)
        for tensor in (*found.down, found.mid):
            tensor.to(device)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _kinds(metrics: Instruments) -> str:
    """The transports that bytes came by."""
    found = metrics.of("latentflow_tensor_bytes_total", transport="shared-memory", direction="receive")
    return "shared-memory" if found._value.get() else "grpc"


async def _answer(device: str, folder: str) -> None:
    servers, addresses, bundle = [], [], sizes.residuals(device)
    with contextlib.ExitStack() as stack:
        shared = stack.enter_context(contextlib.closing(Memory(Path(folder)))) if folder else None
        for memory in (None, shared):
            transport = Transport(memory=memory, metrics=Instruments(NODE, model="m", role="ControlNet"))
            server = grpc.aio.server(options=list(rpc.SERVER_OPTIONS))
            addresses.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
            stage_pb2_grpc.add_StageServicer_to_server(Answering(transport, bundle), server)
            await server.start()
            servers.append(server)
        print(*addresses, flush=True)
        await asyncio.gather(*(server.wait_for_termination() for server in servers))


if __name__ == "__main__":
    asyncio.run(_answer(sys.argv[1], sys.argv[2]))
