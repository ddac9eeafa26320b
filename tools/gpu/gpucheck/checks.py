"""The checks by name, and running one of them in a process of its own."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, SpawnContext
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
    Check(name="sleeping", seconds=60),
    Check(name="workflow", seconds=150),
    Check(name="steps", seconds=150),
    Check(name="decoding", seconds=60),
    Check(name="moving", seconds=90),
)


def processes(device: str) -> ForkServerContext | SpawnContext:
    """Makes the processes of the checks: new ones, or on a CPU forks of one that has imported the libraries.

    CUDA does not work in a process that is forked after the GPUs were counted, which diffusers does when it is imported.
    """
    if device != "cpu":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"gpucheck.{check.name}" for check in CHECKS])
    return context


def run(name: str, device: str, entries: Path, log: Path) -> None:
    """Runs a check in this process, which leads a group of its own from now on.

    Args:
        entries: The file for what it finds.
        log: The file for what is printed.
    """
    os.setsid()
    with log.open("wb") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    if device == "cpu":
        # Servers, client and reference share the cores of a small machine.
        torch.set_num_threads(1)
    importlib.import_module(f"gpucheck.{name}").run(Report(entries), device)
