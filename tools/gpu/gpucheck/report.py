"""What a check found: gates that have to hold, figures, failures. Written after every entry, so that a crash loses none."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the report.

    Attributes:
        value: The figure; None where a case failed before it had one.
        bar: What it has to reach, in words; empty: it is only a figure.
        passed: False where the bar is missed or the case raised.
        trouble: The traceback of a case that raised.
    """

    name: str
    value: float | str | None
    unit: str = ""
    bar: str = ""
    passed: bool = True
    trouble: str = ""


class Report:
    """Collects the entries of one check in a file.

    Args:
        path: The file; JSON, a list of entries.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: list[Entry] = []
        self._write()

    def figure(self, name: str, value: float | str, unit: str = "") -> None:
        """A figure without a bar."""
        self._add(Entry(name=name, value=value, unit=unit))

    def at_most(self, name: str, value: float, bar: float, unit: str = "") -> None:
        """A gate that holds at the bar and below it; not for NaN."""
        self._add(Entry(name=name, value=value, unit=unit, bar=f"<= {bar:g}", passed=value <= bar))

    def at_least(self, name: str, value: float, bar: float, unit: str = "") -> None:
        """A gate that holds at the bar and above it; not for NaN."""
        self._add(Entry(name=name, value=value, unit=unit, bar=f">= {bar:g}", passed=value >= bar))

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[None]:
        """Records what is raised inside as the failure of `name`; the next case runs all the same."""
        try:
            yield
        except Exception:
            self._add(Entry(name=name, value=None, passed=False, trouble=traceback.format_exc()))

    def _add(self, entry: Entry) -> None:
        self._entries.append(entry)
        self._write()

    def _write(self) -> None:
        self._path.write_text(json.dumps([asdict(entry) for entry in self._entries]))


def read(path: Path) -> list[Entry]:
    """The entries of a check's file; none where it was not written."""
    try:
        return [Entry(**entry) for entry in json.loads(path.read_text())]
    except (OSError, ValueError):
        return []
