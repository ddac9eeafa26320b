"""The commands of an installation without the extras."""

from __future__ import annotations

import subprocess
import sys

import pytest

# A module that is None in sys.modules cannot be found or imported.
PROGRAM = """
import sys
sys.modules[sys.argv.pop(1)] = None
from latentflow.cli import main
main()
"""


@pytest.mark.parametrize("missing", ["torch", "cachetools"])
def test_a_command_without_its_packages_reports_how_to_install_them(missing: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, missing, "up", "workflow.yaml", "--threads", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert "pip install '.[local]'" in ended.stderr
    assert missing in ended.stderr
    listed = subprocess.run(
        [sys.executable, "-c", PROGRAM, missing, "--help"], capture_output=True, text=True, check=True
    )
    assert "(not installed: pip install '.[local]')" in listed.stdout
