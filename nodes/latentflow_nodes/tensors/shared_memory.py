"""Shared memory of the servers of one machine: pages that their owner writes and readers copy.

Servers share a folder on a tmpfs (a pod's memory volume, a folder in /dev/shm). It contains the file `id`, by which
servers recognise the same memory, and for each server a folder with its pages. A server holds a lock on its folder until
its process ends, however that happens. An unlocked folder has no owner, and the first server that finds it removes it.

Pages are written and read as files and not mapped, for three reasons: a full memory is an error for the writer instead
of a SIGBUS; a reader has its own copy before the page is overwritten; no peer can truncate a file under a reader's
mapping.

Knows neither tensors nor gRPC; `transfer` sends with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from latentflow.errors import DataLossError, FailedPreconditionError
from latentflow.reasons import Reason

_TOKEN = re.compile(r"[0-9a-f]{32}")
_PAGE = re.compile(rf"{_TOKEN.pattern}/{_TOKEN.pattern}")
_PRIVATE = re.compile(rf"latentflow-{_TOKEN.pattern}")
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# A peer that replaces a page by a symbolic link or a pipe makes no reader follow it or block on it.
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class PageError(DataLossError):
    """A page that cannot be read here; the values can be requested as bytes instead."""


class Page:
    """A file of shared memory. Its writer may overwrite it; closing removes it.

    Attributes:
        name: The name by which a server that shares the memory reads it.
    """

    def __init__(self, *, folder: int, owner: str) -> None:
        own = _token()
        self.name = f"{owner}/{own}"
        self._folder, self._own = folder, own
        self._file = os.open(own, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)

    def write(self, buffers: Sequence[memoryview]) -> None:
        """Writes the buffers one after the other. OSError where the memory is full; the page must then be closed."""
        offset = 0
        for buffer in buffers:
            while buffer:
                written = os.pwrite(self._file, buffer, offset)
                buffer, offset = buffer[written:], offset + written

    def close(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._own, dir_fd=self._folder)
        os.close(self._file)


class Memory:
    """A server's access to a shared memory.

    Args:
        folder: The folder that the servers share. FailedPreconditionError where it cannot be used.

    Attributes:
        id: 32 hexadecimal digits, the same for every server that shares the folder, and for no other.
    """

    def __init__(self, folder: Path) -> None:
        with contextlib.ExitStack() as opened:
            try:
                self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                opened.callback(os.close, self._folder)
                self.id = _id(self._folder)
                self.sweep()
                self._owner = _token()
                self._own = _claim(self._folder, self._owner)
                opened.callback(os.close, self._own)
                opened.callback(shutil.rmtree, self._owner, ignore_errors=True, dir_fd=self._folder)
            except OSError as error:
                raise FailedPreconditionError(
                    f"The shared memory {folder} cannot be used ({error.strerror}): it must be a folder that this "
                    "server may write to, and all servers that share it must run as one user. Mount it, or omit --shared-memory.",
                    reason=Reason.SHARED_MEMORY_UNUSABLE,
                ) from None
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Removes this server's pages."""
        self._opened.close()

    def page(self) -> Page:
        """A new, empty page. OSError where there is no room for it."""
        return Page(folder=self._own, owner=self._owner)

    def read(self, name: str, buffers: Sequence[memoryview]) -> None:
        """Fills the buffers one after the other from a page of any server. PageError where the page cannot be read."""
        if not _PAGE.fullmatch(name):
            raise PageError(f"{name!r} is not the name of a page; the sender is defective.")
        try:
            with self._reading(name) as file:
                offset = 0
                for buffer in buffers:
                    while buffer:
                        count = os.preadv(file, [buffer], offset)
                        if not count:
                            raise PageError(f"The page {name} ends after {offset} bytes, before all values are read.")
                        buffer, offset = buffer[count:], offset + count
        except OSError as error:
            raise PageError(f"The page {name} cannot be read ({error.strerror}); its owner may have ended.") from None

    def sweep(self) -> None:
        """Removes the pages of servers that ended without removing them."""
        _remove_abandoned(self._folder, _TOKEN)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[int]:
        owner, page = name.split("/")
        folder = os.open(owner, _FOLDER_FLAGS, dir_fd=self._folder)
        try:
            file = os.open(page, _READ_FLAGS, dir_fd=folder)
        finally:
            os.close(folder)
        try:
            yield file
        finally:
            os.close(file)


@contextlib.contextmanager
def private_folder(parent: Path = Path("/dev/shm")) -> Iterator[Path | None]:
    """A folder for the servers of one runtime, removed at the end; None where the machine has no such memory.

    Also removes the folders of runtimes that were killed.
    """
    with contextlib.ExitStack() as stack:
        name = f"latentflow-{_token()}"
        try:
            folder = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, folder)
            _remove_abandoned(folder, _PRIVATE)
            stack.callback(os.close, _claim(folder, name))
            stack.callback(shutil.rmtree, name, ignore_errors=True, dir_fd=folder)
        except OSError:
            yield None
            return
        yield parent / name


def _token() -> str:
    return secrets.token_hex(16)


def _id(folder: int) -> str:
    """The memory's id, created by the first server."""
    file = os.open("id", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file).st_uid != os.geteuid():
            # Only root reaches this line. The other servers could not read root's pages.
            raise PermissionError(1, "it belongs to another user")
        known = os.pread(file, 64, 0).decode("ascii", "replace")
        if not _TOKEN.fullmatch(known):
            known = _token()
            os.ftruncate(file, 0)
            os.pwrite(file, known.encode(), 0)
        return known
    finally:
        os.close(file)


def _claim(parent: int, name: str) -> int:
    """Creates a folder and locks it; the returned descriptor holds the lock."""
    while True:
        os.mkdir(name, 0o700, dir_fd=parent)
        # Between creation and locking it looks abandoned, and another process may remove it.
        with contextlib.suppress(FileNotFoundError):
            own = os.open(name, _FOLDER_FLAGS, dir_fd=parent)
            try:
                fcntl.flock(own, fcntl.LOCK_EX)
                os.stat(name, dir_fd=parent)
            except OSError:
                os.close(own)
                raise
            return own


def _remove_abandoned(parent: int, names: re.Pattern[str]) -> None:
    """Removes the folders of `_claim` whose lock is no longer held."""
    for name in filter(names.fullmatch, os.listdir(parent)):
        try:
            found = os.open(name, _FOLDER_FLAGS, dir_fd=parent)
        except OSError:
            # Removed in the meantime, or owned by another user.
            continue
        try:
            fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(name, ignore_errors=True, dir_fd=parent)
        except BlockingIOError:
            pass
        finally:
            os.close(found)
