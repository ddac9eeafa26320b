"""The ranks of one replica: processes that each hold a part of its network, and the group over which they exchange tensors.

Rank 0 is the server. It starts the other ranks, sends them every operation as a message, and computes the same operation
itself. A message goes through a pipe; its tensors are broadcast in the group.

The replica fails as a whole. When a rank ends, the server ends with a line in its log, and whatever supervises the server starts
it again. When the server ends, so do the other ranks. An operation that fails on all ranks alike, such as one for which the
memory does not suffice, fails alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NoReturn

import structlog
import torch
import torch.distributed
from latentflow.errors import FailedPreconditionError
from latentflow.reasons import Reason

_log = structlog.get_logger()
# Its type hints do not have all of its public names.
_dist: Any = torch.distributed

# Until a rank has imported its libraries, which takes seconds.
START_SECONDS = 120.0
# How much longer than rank 0 another rank may load.
LOAD_SECONDS = 600.0
# A rank that is not at a sum or a broadcast this long after another rank hangs.
_STALL_SECONDS = 120.0
# A rank whose operation failed waits for the others to fail for so long.
FAILURE_SECONDS = 30.0
_END_SECONDS = 5.0


@dataclass(frozen=True)
class Blank:
    """Stands for a tensor in a message; the tensor follows in the group."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Ready:
    """A rank has done what was requested of it, at the start."""


class Stop:
    """The rank has to end."""


class Failed:
    """The last operation failed here."""


class Abandoned(Exception):
    """Rank 0 has failed in the middle of an operation."""


@dataclass(frozen=True)
class Refusal:
    """Why a rank cannot load its part."""

    message: str
    reason: Reason | None


@dataclass(frozen=True, kw_only=True)
class Place:
    """The place of a rank in its replica.

    Attributes:
        folder: A folder that only the ranks of this replica use, in which they find each other.
    """

    rank: int
    ranks: int
    device: torch.device
    folder: Path


class Group:
    """What ranks compute together. Each rank calls the same operations in the same order, from one thread.

    Waits for the other ranks when it is made.
    """

    def __init__(self, place: Place) -> None:
        self._device = place.device
        store = _dist.FileStore(str(place.folder / "ranks"), place.ranks)
        if place.device.type == "cuda":
            torch.cuda.set_device(place.device)
            options = _dist.ProcessGroupNCCL.Options()
            options._timeout = timedelta(seconds=_STALL_SECONDS)
            self._group = _dist.ProcessGroupNCCL(store, place.rank, place.ranks, options)
        else:
            gloo = _dist.ProcessGroupGloo
            options = gloo._Options()
            options._timeout = timedelta(seconds=_STALL_SECONDS)
            # The default is the address of the host's name, which other hosts can reach.
            options._devices = [gloo.create_device(hostname="127.0.0.1")]
            self._group = gloo(store, place.rank, place.ranks, options)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the ranks. May change the tensor."""
        tensor = tensor.contiguous()
        self._group.allreduce([tensor]).wait()
        return tensor

    def send(self, tensor: torch.Tensor) -> None:
        """From rank 0: a tensor for the other ranks."""
        self._group.broadcast([tensor.to(self._device).contiguous()]).wait()

    def receive(self, blank: Blank) -> torch.Tensor:
        """On another rank: the tensor that rank 0 sends."""
        tensor = torch.empty(blank.shape, dtype=blank.dtype, device=self._device)
        self._group.broadcast([tensor]).wait()
        return tensor


class Ranks:
    """Rank 0's side of the others. FailedPreconditionError where they do not start. Used by one thread, after it was made.

    Attributes:
        place, group: Of rank 0.

    Args:
        follow: What each rank runs: gets its end of a pipe, its `Place` and `part`, all of which can be pickled.
        devices: Of all ranks, this one first.
    """

    def __init__(
        self, follow: Callable[[Connection, Place, Any], None], part: Any, *, devices: Sequence[torch.device]
    ) -> None:
        self._stack = contextlib.ExitStack()
        self._processes: list[SpawnProcess] = []
        self._connections: list[Connection] = []
        self._is_closing = False
        self._losing = threading.Lock()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="latentflow-ranks-")))
        # A new interpreter: CUDA does not work in a process that was forked.
        context = multiprocessing.get_context("spawn")
        with self._closed_at_error():
            places = [
                Place(rank=rank, ranks=len(devices), device=device, folder=folder)
                for rank, device in enumerate(devices)
            ]
            self.place = places[0]
            for place in places[1:]:
                own, other = context.Pipe()
                process = context.Process(target=follow, args=(other, place, part), daemon=True)
                process.start()
                other.close()
                self._processes.append(process)
                self._connections.append(own)
            self._wait_ready(START_SECONDS, doing="start")
            try:
                self.group = Group(self.place)
            except RuntimeError as error:
                raise _rank_failed(f"The ranks cannot connect to each other: {error}") from None

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """While rank 0 loads its part, and until the others have loaded theirs.

        FailedPreconditionError where a rank cannot load its part or is too late. The other ranks have ended then.
        """
        with self._closed_at_error():
            yield
            self._wait_ready(LOAD_SECONDS, doing="load its part of the weights")
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    def send(self, message: Callable[[Any], object], value: Any) -> None:
        """Sends a message to all ranks.

        Args:
            message: Its class.
            value: Tensors and plain values, in mappings, tuples and lists.
        """
        tensors: list[torch.Tensor] = []

        def blank(tensor: torch.Tensor) -> Blank:
            tensors.append(tensor)
            return Blank(tuple(tensor.shape), tensor.dtype)

        self._post(message(replaced(value, torch.Tensor, blank)))
        for tensor in tensors:
            self.group.send(tensor)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """During an operation of all ranks. Raises its error if it failed on all of them; ends the process otherwise."""
        try:
            yield
        except Exception as error:
            self._post(Failed())
            for rank, connection in enumerate(self._connections, start=1):
                with self._lost_at_error(rank):
                    if not connection.poll(FAILURE_SECONDS) or not isinstance(connection.recv(), Failed):
                        self._lose(f"an operation failed on rank 0 and not on rank {rank}", error=str(error))
            raise

    def close(self, *, seconds: float = _END_SECONDS) -> None:
        """Ends the other ranks, each of which may take some seconds."""
        self._is_closing = True
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send(Stop())
        for process in self._processes:
            process.join(seconds)
            process.kill()
            process.join()
            process.close()
        for connection in self._connections:
            connection.close()
        self._stack.close()

    def _post(self, message: object) -> None:
        for rank, connection in enumerate(self._connections, start=1):
            with self._lost_at_error(rank):
                connection.send(message)

    def _wait_ready(self, seconds: float, *, doing: str) -> None:
        for rank, (connection, process) in enumerate(zip(self._connections, self._processes, strict=True), start=1):
            if not connection.poll(seconds):
                raise _rank_failed(f"Rank {rank} did not {doing} within {seconds:g} s.")
            try:
                answer = connection.recv()
            except (EOFError, OSError):
                # It has closed the pipe, and its interpreter takes a while to end.
                process.join(FAILURE_SECONDS)
                raise _rank_failed(
                    f"Rank {rank} ended with exit code {process.exitcode} before it could {doing}; the log above shows the "
                    "reason."
                ) from None
            if isinstance(answer, Refusal):
                raise FailedPreconditionError(f"Rank {rank}: {answer.message}", reason=answer.reason)

    def _watch(self) -> None:
        sentinels = {process.sentinel: rank for rank, process in enumerate(self._processes, start=1)}
        ended = multiprocessing.connection.wait(list(sentinels))
        if not self._is_closing:
            rank = min(sentinels[one] for one in ended if isinstance(one, int))
            process = self._processes[rank - 1]
            process.join()
            self._lose(f"rank {rank} ended", exit_code=process.exitcode)

    def _lose(self, why: str, **details: object) -> NoReturn:
        # Of two threads that notice it, one reports it.
        with self._losing:
            _log.error("the server ends because a rank failed", why=why, ranks=len(self._processes) + 1, **details)
            os._exit(1)

    @contextlib.contextmanager
    def _lost_at_error(self, rank: int) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            self._lose(f"rank {rank} ended")

    @contextlib.contextmanager
    def _closed_at_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close(seconds=0)
            raise


def begin_following() -> None:
    """At the start of another rank's process: it ends when rank 0 does, however that ends."""
    # Shells send signals to the group of the server, which drains first.
    os.setpgid(0, 0)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), name="end-with-rank-0", daemon=True).start()


def replaced(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A value in which each instance of a class is replaced, in an order that depends on the structure alone."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, Mapping):
        return {key: replaced(one, kind, change) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [replaced(one, kind, change) for one in value]
    return value


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _rank_failed(message: str) -> FailedPreconditionError:
    return FailedPreconditionError(message, reason=Reason.RANK_FAILED)
