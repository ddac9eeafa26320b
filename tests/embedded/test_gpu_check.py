"""The check of the GPU paths, as far as it runs without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from support.paths import ROOT


@pytest.mark.timeout(1200)
def test_the_gpu_check_passes_on_a_machine_without_a_gpu() -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "tools/gpu-check", "--device", "cpu"], capture_output=True, text=True, timeout=1190
    )
    assert run.returncode == 0, run.stdout + run.stderr
    figures = json.loads(run.stdout.splitlines()[-1])["figures"]
    assert figures["failed"] == []
    assert {"parity", "resuming", "workflow", "steps", "decoding", "moving"} <= {name.split(".")[0] for name in figures}
