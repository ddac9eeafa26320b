"""Whether figures are within the ranges of ranges.yaml. The ranges are data, so that a change of one is seen in review."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

FILE = Path(__file__).with_name("ranges.yaml")


@dataclass(frozen=True, kw_only=True)
class Range:
    """Inclusive bounds of a figure. NaN is in no range."""

    min: float = -math.inf
    max: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.min <= value <= self.max

    def __str__(self) -> str:
        bounds = {"at least": self.min, "at most": self.max}
        return ", ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))


def load(*sections: str) -> dict[str, Range]:
    """The ranges in some sections of the file, by figure. KeyError for a section that the file does not have."""
    file = YAML(typ="safe").load(FILE)
    return {figure: Range(**bounds) for section in sections for figure, bounds in file[section].items()}


def complaints(figures: Mapping[str, float], ranges: Mapping[str, Range]) -> list[str]:
    """A sentence for each figure that is outside its range or missing."""
    found = []
    for name, allowed in ranges.items():
        if name not in figures:
            found.append(f"{name} was not measured")
        elif figures[name] not in allowed:
            found.append(f"{name} is {figures[name]:g}; allowed is {allowed}")
    return found


def conclude(figures: Mapping[str, float], ranges: Mapping[str, Range], *, title: str, console: Console) -> int:
    """Prints figures with their ranges, the complaints, and the figures as JSON in the last line; returns the exit code."""
    table = Table("figure", "value", "allowed", title=title)
    for name, value in figures.items():
        table.add_row(name, f"{value:g}", str(ranges[name]) if name in ranges else "")
    console.print(table)
    found = complaints(figures, ranges)
    for complaint in found:
        console.print(f"OUT OF RANGE: {complaint}")
    print(json.dumps({"figures": dict(figures)}))
    return int(bool(found))
