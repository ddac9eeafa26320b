"""Sizes in bytes as text, the same in every log and status."""

from __future__ import annotations

_UNITS = ((1 << 30, "GiB", 1), (1 << 20, "MiB", 0), (1 << 10, "KiB", 0))


def progress(done: float, total: float) -> str:
    """Progress in the unit of the total: "1.2 of 6.9 GiB". Both in bytes, not negative."""
    size, unit, digits = next((one for one in _UNITS if total >= one[0]), (1, "bytes", 0))
    return f"{min(done, total) / size:.{digits}f} of {total / size:.{digits}f} {unit}"
