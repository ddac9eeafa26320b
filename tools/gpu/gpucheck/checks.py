"""The checks by name; `python -m gpucheck.checks NAME DEVICE FILE` runs one of them."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from gpucheck.report import Report


@dataclass(frozen=True, kw_only=True)
class Check:
    """A module with a `run(report, device)`.

    Attributes:
        seconds: After which it is ended.
    """

    name: str
    seconds: float


CHECKS = (
    Check(name="parity", seconds=150),
    Check(name="resuming", seconds=120),
    Check(name="workflow", seconds=150),
    Check(name="steps", seconds=150),
    Check(name="decoding", seconds=60),
    Check(name="moving", seconds=90),
)


def main() -> None:
    name, device, path = sys.argv[1:]
    if device == "cpu":
        # Servers, client and reference share the cores of a small machine.
        torch.set_num_threads(1)
    importlib.import_module(f"gpucheck.{name}").run(Report(Path(path)), device)


if __name__ == "__main__":
    main()
