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

    Servers get the lock in the order in which they began to wait: one that takes it again at once would otherwise win against
    one that has to wake up first.

    Args:
        path: The file that the servers share, created where it is missing, with another one beside it for the order. None:
            the lock is always free.
    """

    def __init__(self, path: Path | None) -> None:
        self._files: tuple[int, ...] = (
            () if path is None else (_opened(path.with_name(f"{path.name}.next")), _opened(path))
        )
        self._pause = None if path is None else openmp.find_pause()
        self._is_held = False

    def __enter__(self) -> ComputeLock:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def take(self) -> None:
        """Waits for the lock; returns at once if it is held already. Leaving a `with` block or `idle` releases it."""
        if not self._files or self._is_held:
            return
        # Only one server waits for the lock itself; the others wait for its place.
        following, lock = self._files
        self._wait(following)
        self._wait(lock)
        fcntl.flock(following, fcntl.LOCK_UN)
        self._is_held = True

    def idle(self) -> None:
        """Called by a thread before it waits for work. Releases the lock if it is held."""
        self._release()
        if self._pause is not None:
            self._pause()

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """While the lock is held: releases it for the block, which waits for another server, and takes it again."""
        self.idle()
        try:
            yield
        finally:
            self.take()

    def close(self) -> None:
        for file in self._files:
            os.close(file)
        self._files = ()

    def _wait(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if self._pause is not None:
                self._pause()
            fcntl.flock(file, fcntl.LOCK_EX)

    def _release(self) -> None:
        if self._is_held:
            self._is_held = False
            fcntl.flock(self._files[-1], fcntl.LOCK_UN)


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
