"""How bundles of tensors get from server to server: the one place that knows more than one way.

Bytes in gRPC messages go anywhere. Where two servers share a memory, the values go through a page of it and gRPC
carries the page's name. The reader says in every question which memory it reads. The owner answers with a page where
that is its own memory and has room, else with bytes; so nothing is negotiated, and a pair that does not share, or of
which one knows no pages, never notices.
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
    """One server's ways to its peers.

    Args:
        memory: The memory that it shares with some of them; None: with nobody.
    """

    def __init__(self, *, memory: Memory | None, metrics: Instruments) -> None:
        self._memory = memory
        self._metrics = metrics
        self._troubled = False

    @property
    def memory(self) -> str:
        """What to say in a question that may be answered with a page; empty: nothing."""
        return self._memory.id if self._memory else ""

    def sender(self, *, constant: bool = False) -> Sender:
        """For bundles to one reader, or with `constant` for one bundle to any number of readers."""
        return Sender(self, self._memory, constant=constant)

    def receiver(self) -> Receiver:
        """For one bundle."""
        return Receiver(self._memory)

    def count(self, kind: Kind, direction: Literal["send", "receive"], *, size: int, seconds: float) -> None:
        """Adds a transfer to the metrics."""
        self._metrics.of("latentflow_tensor_bytes_total", transport=kind, direction=direction).inc(size)
        self._metrics.of("latentflow_tensor_seconds_total", transport=kind, direction=direction).inc(seconds)

    def report(self, problem: str | None) -> None:
        """Says once that the shared memory cannot be written to, until it can again."""
        if problem and not self._troubled:
            _log.warning("the shared memory takes nothing; tensors go over gRPC", problem=problem)
        self._troubled = problem is not None


class Sender:
    """Sends bundles, and keeps the page that their reader may be reading until it is closed.

    The page is written anew for the next bundle. So the reader asks for that only when it has read the last; a constant
    sender's bundles are all the same, and its page is written once.
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
        """The messages of a bundle for a reader of that memory; counts them when all have been taken."""
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
        """The page with the bundle in it; None where there is no room."""
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
    """Puts one bundle together from its messages.

    `add` each; it returns True with the last one, and `tensors` then holds the bundle by name, `size` its bytes and
    `kind` how they came.
    """

    def __init__(self, memory: Memory | None) -> None:
        self._memory = memory
        self._assembler = codec.Assembler()
        self._read: dict[str, torch.Tensor] | None = None

    def add(self, chunk: tensors_pb2.TensorChunk) -> bool:
        """Takes one message. DataLossError where the bundle is damaged: PageError where its page cannot be read."""
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
