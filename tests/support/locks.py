"""Locks of the kernel that other threads and processes take."""

from __future__ import annotations

import fcntl
import time
from typing import IO

_SECONDS = 30


def until_locked(file: IO[str]) -> None:
    """Returns when another one holds the kernel's lock of a file."""
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        fcntl.flock(file, fcntl.LOCK_UN)
    raise TimeoutError
