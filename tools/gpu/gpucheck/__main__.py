"""Runs every check in a process of its own within a time limit, prints a table, and last one line of JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from gpucheck import checks
from gpucheck.checks import CHECKS
from gpucheck.report import Entry, read
from gpucheck.versions import versions

_ALL_SECONDS = 540.0
# A machine without a GPU may have few cores, and those be busy.
_CPU_PATIENCE = 4.0
# What is left of a program's output in the report of its failure.
_OUTPUT_LINES = 40


def main() -> None:
    parser = argparse.ArgumentParser(prog="gpucheck", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--only", nargs="*", choices=[check.name for check in CHECKS], help="default: all")
    options = parser.parse_args()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    patience = _CPU_PATIENCE if device == "cpu" else 1.0
    began = time.monotonic()
    for name, version in versions().items():
        print(f"{name}: {version}")
    if device == "cpu":
        print("No GPU is used: the checks run small, on the CPU.")
    entries: dict[str, list[Entry]] = {}
    for check in CHECKS:
        if options.only and check.name not in options.only:
            continue
        left = patience * _ALL_SECONDS - (time.monotonic() - began)
        started = time.monotonic()
        entries[check.name] = _run(check.name, device=device, seconds=min(patience * check.seconds, left))
        print(f"{check.name}: {time.monotonic() - started:.1f} s", flush=True)
    failed = _print(entries)
    print(f"{time.monotonic() - began:.0f} s in all")
    figures = {f"{check}.{e.name}": e.value for check, found in entries.items() for e in found if _is_figure(e)}
    total = sum(map(len, entries.values()))
    about = {"device": device, **versions(), "passed": total - len(failed), "failed": failed}
    print(json.dumps({"figures": about | figures}))
    sys.exit(bool(failed))


def _is_figure(entry: Entry) -> bool:
    return isinstance(entry.value, str) or (entry.value is not None and math.isfinite(entry.value))


def _run(name: str, *, device: str, seconds: float) -> list[Entry]:
    """A check's entries; one more of its process where that failed."""
    if seconds <= 0:
        return [Entry(name="not run", value=None, passed=False, trouble="The time for all checks was over.")]
    with tempfile.TemporaryDirectory(prefix="gpucheck-") as folder:
        path, log = Path(folder) / "entries.json", Path(folder) / "log"
        log.touch()
        process = checks.processes(device).Process(target=checks.run, args=(name, device, path, log))
        process.start()
        trouble = ""
        try:
            process.join(seconds)
            if process.exitcode is None:
                trouble = f"It was ended after {seconds:.0f} s."
            elif process.exitcode:
                trouble = f"It exited with {process.exitcode}."
        finally:
            # With whatever it started and left behind.
            _kill(process)
        entries = read(path)
        if not entries and not trouble:
            trouble = "It found nothing."
        said = "\n".join(log.read_text(errors="replace").splitlines()[-_OUTPUT_LINES:])
        if trouble:
            entries.append(Entry(name="process", value=None, passed=False, trouble=f"{trouble}\n{said}"))
        elif any(not entry.passed for entry in entries):
            # What the servers logged often says more than the traceback of the call that failed.
            entries[-1] = replace(entries[-1], trouble=f"{entries[-1].trouble}\noutput of {name}:\n{said}")
        return entries


def _kill(process: BaseProcess) -> None:
    process.kill()
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def _print(entries: dict[str, list[Entry]]) -> list[str]:
    """The table and the troubles; the names of what failed."""
    lines = [(f"{check}.{entry.name}", entry) for check, found in entries.items() for entry in found]
    width = max((len(name) for name, _ in lines), default=0)
    print()
    for name, entry in lines:
        value = "-" if entry.value is None else entry.value if isinstance(entry.value, str) else f"{entry.value:.6g}"
        verdict = "FAILED" if not entry.passed else "ok" if entry.bar else ""
        print(f"{name:<{width}}  {value + ' ' + entry.unit:<16} {entry.bar:<10} {verdict}".rstrip())
    for name, entry in lines:
        if entry.trouble:
            print(f"\n--- {name}\n{entry.trouble}")
    print()
    return [name for name, entry in lines if not entry.passed]


if __name__ == "__main__":
    main()
