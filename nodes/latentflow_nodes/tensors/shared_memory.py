"""Memory that servers of one machine share: pages that their owner writes and others copy out.

Servers meet in a folder on memory (a tmpfs: a pod's memory volume, a folder in /dev/shm). It holds `id`, by which they
know that they mean the same memory, and for each server a folder with its pages. A server's folder is locked for as
long as the server lives, however it ends; what is found unlocked is nobody's, and whoever sees it first removes it.

Pages are written and read as files, not mapped: a full memory is then an error to the writer, not a SIGBUS, a reader
has its own copy before the page is written anew, and no peer can shorten a file under a reader's mapping.

Knows neither tensors nor gRPC; `transport` sends with it.
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
# A peer that puts a symbolic link or a pipe where a page should be makes nobody follow it or wait for it.
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class PageError(DataLossError):
    """A page that cannot be read here; the same values can be asked for as bytes."""


class Page:
    """A file of shared memory. Its writer may write it anew; closing removes it.

    Attributes:
        name: By which a server that shares the memory reads it.
    """

    def __init__(self, *, folder: int, owner: str) -> None:
        own = _token()
        self.name = f"{owner}/{own}"
        self._folder, self._own = folder, own
        self._file = os.open(own, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)

    def write(self, buffers: Sequence[memoryview]) -> None:
        """Writes the buffers of bytes one behind the other. OSError where the memory is full; close it then."""
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
    """One server's part in a shared memory.

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
                    f"The shared memory {folder} cannot be used ({error.strerror}): it has to be a folder that this "
                    "server may write to, of which all servers run as one user. Mount it, or leave --shared-memory out.",
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
        """Fills the buffers of bytes, one behind the other, from a page of any server. PageError where it cannot."""
        if not _PAGE.fullmatch(name):
            raise PageError(f"{name!r} is no name of a page; the sender is broken.")
        try:
            with self._reading(name) as file:
                offset = 0
                for buffer in buffers:
                    while buffer:
                        count = os.preadv(file, [buffer], offset)
                        if not count:
                            raise PageError(f"The page {name} ends after {offset} bytes, before its values do.")
                        buffer, offset = buffer[count:], offset + count
        except OSError as error:
            raise PageError(f"The page {name} cannot be read ({error.strerror}); its owner may be gone.") from None

    def sweep(self) -> None:
        """Removes the pages of servers that ended without doing so."""
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

    What runtimes that were killed have left is removed on the way.
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
    """The memory's id, made by whoever comes first."""
    file = os.open("id", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file).st_uid != os.geteuid():
            # Only root gets here. Others could not read the pages that it makes.
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
    """Makes a folder and locks it; the descriptor holds the lock."""
    while True:
        os.mkdir(name, 0o700, dir_fd=parent)
        # Between making and locking it looks abandoned, and another process may remove it.
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
    """Removes the folders that `_claim` made and nobody holds any more."""
    for name in filter(names.fullmatch, os.listdir(parent)):
        try:
            found = os.open(name, _FOLDER_FLAGS, dir_fd=parent)
        except OSError:
            # Gone by now, or another user's.
            continue
        try:
            fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(name, ignore_errors=True, dir_fd=parent)
        except BlockingIOError:
            pass
        finally:
            os.close(found)
