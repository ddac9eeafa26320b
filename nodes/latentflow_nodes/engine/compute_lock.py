"""Whose turn it is to compute, among the servers of one machine.

Model servers that each have all the machine's cores would, computing at the same time, wait for each other's threads at
every parallel region: many times slower than one after the other. Servers that name the same turn file go one after the
other. The lock is the kernel's, so it falls open when its holder is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


class Turn:
    """Entered around a forward pass. Used by one thread.

    Args:
        path: The file that the servers share, made where it is missing. None: always this server's turn.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> Turn:
        self._lock(fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock(fcntl.LOCK_UN)

    @contextlib.contextmanager
    def passed_on(self) -> Iterator[None]:
        """While entered: lets others compute in the block, which waits for one of them."""
        self._lock(fcntl.LOCK_UN)
        try:
            yield
        finally:
            self._lock(fcntl.LOCK_EX)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _lock(self, operation: int) -> None:
        if self._file is not None:
            fcntl.flock(self._file, operation)
