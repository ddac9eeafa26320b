"""The directory as a file, which the embedded runtime writes and the gateway follows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import structlog
from latentflow.errors import InvalidRequestError
from latentflow.internal.directory import Directory

_log = structlog.get_logger()
_POLL_SECONDS = 0.5


async def follow(path: Path) -> AsyncGenerator[Directory, None]:
    """The directory, now and at every change of the file. InvalidRequestError where it cannot be read at first."""
    seen = _stamp(path)
    yield Directory.read(path)
    while True:
        await asyncio.sleep(_POLL_SECONDS)
        try:
            stamp = _stamp(path)
            if stamp != seen:
                directory = Directory.read(path)
                seen = stamp
                yield directory
        except InvalidRequestError as error:
            _log.warning("directory file cannot be read; the last directory stays in force", problem=error.message)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise InvalidRequestError(f"The directory file {path} cannot be read: {error.strerror}.") from None
    return found.st_mtime_ns, found.st_ino
