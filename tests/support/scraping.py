"""Reads the /metrics of a process."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families


def value(address: str, name: str, **labels: str) -> float:
    """The sum of the samples of a metric that have these labels."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    # Only its own lines, because to parse them all takes longer than to fetch them.
    text = "\n".join(line for line in lines if line.startswith(name))
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )
