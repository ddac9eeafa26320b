"""The lock under which the model servers of one machine compute one after the other.

Model servers that each use all cores, and compute at the same time, wait for each other's threads at every parallel
region: many times slower than one after the other. Servers that name the same lock file take turns. The lock is the
kernel's, so it is released when its holder is killed.

Before a server waits, it ends its OpenMP threads (see `openmp`): spinning, they would take a core from the next server.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from latentflow_nodes.engine import openmp


class ComputeLock:
    """Held during a forward pass. Used by one thread.

    Args:
        path: The file that the servers share, created where it is missing. None: the lock is always free.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._pause = None if path is None else openmp.find_pause()

    def __enter__(self) -> ComputeLock:
        self._take()
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def idle(self) -> None:
        """Called by a thread that does not hold the lock, before it waits for work."""
        if self._pause is not None:
            self._pause()

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """While the lock is held: releases it for the block, which waits for another server, and takes it again."""
        self._release()
        self.idle()
        try:
            yield
        finally:
            self._take()

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _take(self) -> None:
        if self._file is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.idle()
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def _release(self) -> None:
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)
