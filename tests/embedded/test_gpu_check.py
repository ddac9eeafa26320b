"""The check of the GPU paths, as far as it runs without a GPU."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from importlib import metadata

import pytest
from support.paths import ROOT

# What docs/gpu.md asks of the machine.
PRESENT = ("torch", "transformers", "accelerate", "peft", "pillow")
PARTS = ("parity", "resuming", "sleeping", "workflow", "steps", "decoding", "moving")
_IMPORTING = """
import sys
from importlib.machinery import PathFinder

class Present(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in MISSING else super().find_spec(name, path, target)

MISSING = set(sys.argv[1].split(","))
sys.meta_path[sys.meta_path.index(PathFinder)] = Present
import latentflow_gateway.server, latentflow_local.runtime, latentflow_nodes.server
"""


def closure(names: tuple[str, ...]) -> set[str]:
    """Installed distributions, with all that they require."""
    found: set[str] = set()
    open_ = list(names)
    while open_:
        name = re.sub("[-_.]+", "-", open_.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        open_ += [re.split(r"[^\w.-]", one)[0] for one in required if "extra ==" not in one]
    return found


def test_the_bundle_and_what_its_machine_has_suffice_to_start_the_servers() -> None:
    packed = runpy.run_path(str(ROOT / "tools/gpu/bundle"))["PACKAGES"]
    there = closure(PRESENT) | set(packed) | {"latentflow"}
    modules = metadata.packages_distributions()
    missing = [
        name for name, owners in modules.items() if not {re.sub("[-_.]+", "-", o).lower() for o in owners} & there
    ]
    assert "kopf" in missing
    run = subprocess.run([sys.executable, "-c", _IMPORTING, ",".join(missing)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.timeout(1200)
def test_the_gpu_check_passes_on_a_machine_without_a_gpu() -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "tools/gpu-check", "--device", "cpu"], capture_output=True, text=True, timeout=1190
    )
    assert run.returncode == 0, run.stdout + run.stderr
    figures = json.loads(run.stdout.splitlines()[-1])["figures"]
    assert figures["failed"] == []
    assert set(PARTS) <= {name.split(".")[0] for name in figures}
