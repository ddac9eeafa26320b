"""The commands of an installation without the extras."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize(
    ("program", "missing"),
    [("node", "torch"), ("gateway", "cachetools"), ("operator", "kopf"), ("operator", "aiohttp")],
)
def test_a_server_without_its_packages_reports_how_to_install_them(program: str, missing: str) -> None:
    # The program as it is installed, in a Python that cannot import the package.
    run = f"import runpy, sys; sys.modules[{missing!r}] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    path = Path(sys.executable).parent / f"latentflow-{program}"
    ended = subprocess.run([sys.executable, "-c", run, path], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(
        f"latentflow-{program}: It needs packages that are not installed (import of {missing} halted"
    )
    extra = {"node": "nodes"}.get(program, program)
    assert line.endswith(f"pip install '.[{extra}]'")


def test_an_unknown_form_of_log_lines_is_refused() -> None:
    program = Path(sys.executable).parent / "latentflow"
    ended = subprocess.run(
        [program, "up", "workflow.yaml", "--log-format=xml"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "'xml' is not one of 'console', 'json'" in " ".join(ended.stderr.replace("│", " ").split())


def test_ctrl_c_while_a_command_is_imported_prints_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "latentflow_local").mkdir()
    (tmp_path / "latentflow_local/__init__.py").touch()
    (tmp_path / "latentflow_local/command.py").write_text("raise KeyboardInterrupt")
    ended = subprocess.run(
        [Path(sys.executable).parent / "latentflow", "version"],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (130, "")


def test_the_option_version_prints_what_the_command_prints() -> None:
    program = Path(sys.executable).parent / "latentflow"
    printed = [subprocess.check_output([program, word], text=True) for word in ("--version", "version")]
    assert printed[0] == printed[1] != ""
