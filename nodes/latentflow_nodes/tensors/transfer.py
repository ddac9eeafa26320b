"""How bundles of tensors move between servers: the one place that knows more than one transport.

Bytes in gRPC messages reach any server. Where two servers share a memory, the values are written to a page of it and gRPC
carries the page's name. The reader names its memory in every request. The owner answers with a page where it shares that
memory and has room in it, and with bytes otherwise. So the servers negotiate nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Literal

import structlog
import torch
from latentflow.internal.metrics import Instruments
from latentflow.v1 import tensors_pb2

from latentflow_nodes.tensors import codec
from latentflow_nodes.tensors.shared_memory import Memory, Page, PageError

_log = structlog.get_logger()
Kind = Literal["grpc", "shared-memory"]


class Transport:
    """A server's transports to its peers.

    Args:
        memory: The memory that it shares with some of them; None: it shares none.
    """

    def __init__(self, *, memory: Memory | None, metrics: Instruments) -> None:
        self._memory = memory
        self._metrics = metrics
        self._failing = False

    @property
    def memory(self) -> str:
        """The memory to name in a request that may be answered with a page; empty: none."""
        return self._memory.id if self._memory else ""

    def sender(self, *, constant: bool = False) -> Sender:
        """A sender of bundles to one reader, or with `constant` of one bundle to any number of readers."""
        return Sender(self, self._memory, constant=constant)

    def receiver(self) -> Receiver:
        """A receiver of one bundle."""
        return Receiver(self._memory)

    def count(self, kind: Kind, direction: Literal["send", "receive"], *, size: int, seconds: float) -> None:
        """Adds a transfer to the metrics."""
        self._metrics.of("latentflow_tensor_bytes_total", transport=kind, direction=direction).inc(size)
        self._metrics.of("latentflow_tensor_seconds_total", transport=kind, direction=direction).inc(seconds)

    def report(self, problem: str | None) -> None:
        """Logs once that the shared memory cannot be written; logs again only after a write has succeeded."""
        if problem and not self._failing:
            _log.warning("shared memory cannot be written; sending tensors over gRPC", problem=problem)
        self._failing = problem is not None


class Sender:
    """Sends bundles; keeps the page, from which the reader may be reading, until it is closed.

    The next bundle overwrites the page, so the reader requests it only after it has read the last one. The bundles of a
    constant sender are all equal, and its page is written once.
    """

    def __init__(self, transport: Transport, memory: Memory | None, *, constant: bool) -> None:
        self._transport = transport
        self._memory = memory
        self._constant = constant
        self._page: Page | None = None

    def __enter__(self) -> Sender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._page is not None:
            self._page.close()
            self._page = None

    def pieces(self, tensors: Mapping[str, torch.Tensor], *, memory: str) -> Iterator[tensors_pb2.TensorChunk]:
        """The messages of a bundle for a reader of that memory; counts the transfer when all have been consumed."""
        started, size = time.perf_counter(), codec.total_bytes(tensors.values())
        kind: Kind = "grpc"
        page = self._written(self._memory, tensors) if self._memory and self._memory.id == memory and size else None
        if page is not None:
            kind = "shared-memory"
            yield tensors_pb2.TensorChunk(headers=codec.headers(tensors), page=page.name, last=True)
        else:
            yield from codec.chunks(tensors)
        self._transport.count(kind, "send", size=size, seconds=time.perf_counter() - started)

    def _written(self, memory: Memory, tensors: Mapping[str, torch.Tensor]) -> Page | None:
        """The page that holds the bundle; None where the memory is full."""
        if self._page is not None and self._constant:
            return self._page
        try:
            self._page = self._page or memory.page()
            self._page.write([codec.view(tensor) for tensor in tensors.values()])
        except OSError as error:
            self.close()
            self._transport.report(error.strerror)
            return None
        self._transport.report(None)
        return self._page


class Receiver:
    """Assembles one bundle from its messages.

    `add` each; it returns True for the last one. `tensors` then holds the bundle by name, `size` its bytes and `kind` the
    transport.
    """

    def __init__(self, memory: Memory | None) -> None:
        self._memory = memory
        self._assembler = codec.Assembler()
        self._read: dict[str, torch.Tensor] | None = None

    def add(self, chunk: tensors_pb2.TensorChunk) -> bool:
        """Adds one message. DataLossError where the bundle is damaged; PageError where its page cannot be read."""
        if not chunk.page:
            return self._assembler.add(chunk)
        if self._memory is None:
            raise PageError("A peer answered with a page of shared memory to a server that has none.")
        tensors = codec.empty(chunk.headers)
        self._memory.read(chunk.page, [codec.view(tensor) for tensor in tensors.values()])
        self._read = tensors
        return True

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return self._assembler.tensors if self._read is None else self._read

    @property
    def size(self) -> int:
        return codec.total_bytes(self.tensors.values())

    @property
    def kind(self) -> Kind:
        return "grpc" if self._read is None else "shared-memory"
