"""Benchmark figures are compared with ranges.yaml, and a figure that is out of its range fails the bench."""

from __future__ import annotations

import io
import json
import math

import pytest
import ranges
from ranges import Range
from rich.console import Console

RANGES = {"ratio": Range(max=1.06), "rate": Range(min=2, max=3)}


@pytest.mark.parametrize(
    ("figures", "complaint"),
    [
        ({"ratio": 1.07, "rate": 2}, "ratio is 1.07; allowed is at most 1.06"),
        ({"ratio": 1.06, "rate": 1.9}, "rate is 1.9; allowed is at least 2, at most 3"),
        ({"ratio": math.nan, "rate": 3}, "ratio is nan; allowed is at most 1.06"),
        ({"ratio": 1.0}, "rate was not measured"),
    ],
)
def test_a_figure_out_of_range_or_missing_fails_the_bench(
    figures: dict[str, float], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = io.StringIO()
    assert ranges.conclude(figures, RANGES, title="bench", console=Console(file=printed)) == 1
    assert f"OUT OF RANGE: {complaint}\n" in printed.getvalue()


def test_figures_within_their_ranges_pass_and_end_as_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"ratio": 1.06, "rate": 2, "other": 9}
    assert ranges.conclude(figures, RANGES, title="bench", console=Console()) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"figures": figures}


def test_every_section_of_the_file_holds_ranges() -> None:
    found = ranges.load("overhead-shapes", "overhead-mid", "operator")
    assert all(allowed.min > -math.inf or allowed.max < math.inf for allowed in found.values())
    assert {"latency_ratio", "latency_ratio_mid", "restart_writes"} <= found.keys()
