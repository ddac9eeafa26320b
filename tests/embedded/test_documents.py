"""The commands and programs in the documents work as shown."""

from __future__ import annotations

import asyncio
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from latentflow_local.runtime import Runtime
from PIL import Image
from support.documents import blocks
from support.paths import EXAMPLES, ROOT

BIN = Path(sys.executable).parent


def commands(document: str) -> list[list[str]]:
    """The `latentflow generate`, `describe` and `validate` commands that a document shows."""
    lines = [line for block in blocks(document, "bash") for line in block.splitlines()]
    shown = [shlex.split(line, comments=True) for line in lines if line.startswith(".venv/bin/latentflow ")]
    return [words[1:] for words in shown if words[1] in ("generate", "describe", "validate")]


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("document", ["README.md", "docs/tutorial.md"])
async def test_the_commands_in_a_document_work(runtime: Runtime, tmp_path: Path, document: str) -> None:
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "my-workflow.yaml").write_text((EXAMPLES / "shapes-minimal.yaml").read_text())
    shown = commands(document)
    assert len(shown) >= 3
    for words in shown:
        process = await asyncio.create_subprocess_exec(
            str(BIN / "latentflow"), *words, cwd=tmp_path, env={"LATENTFLOW_TARGET": runtime.target}
        )
        assert await asyncio.wait_for(process.wait(), 120) == 0, words


@pytest.mark.skipif(
    not all(map(shutil.which, ("curl", "jq"))), reason="curl or jq is not installed; on Debian: tools/debian"
)
@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("document", ["docs/http.md", "docs/tutorial.md"])
async def test_the_curl_commands_in_a_document_work(runtime: Runtime, tmp_path: Path, document: str) -> None:
    (tmp_path / "examples").symlink_to(EXAMPLES)
    shown = [block for block in blocks(document, "bash") if "curl " in block]
    assert shown
    assert runtime.http is not None
    for script in shown:
        process = await asyncio.create_subprocess_exec(
            "bash", "-euo", "pipefail", "-c", script.replace("127.0.0.1:8402", runtime.http), cwd=tmp_path
        )
        assert await asyncio.wait_for(process.wait(), 120) == 0, script
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            assert image.size == (64, 64)


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("document", ["README.md", "docs/tutorial.md", "docs/http.md"])
async def test_the_programs_in_a_document_work(runtime: Runtime, tmp_path: Path, document: str) -> None:
    shown = blocks(document, "python")
    assert shown
    for program in shown:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            program.replace("127.0.0.1:8400", runtime.target).replace("127.0.0.1:8402", str(runtime.http)),
            cwd=tmp_path,
            env={"LATENTFLOW_TARGET": runtime.target},
        )
        assert await asyncio.wait_for(process.wait(), 120) == 0
    assert list(tmp_path.glob("*.png"))


def test_the_demo_writes_its_image(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "out/demo.png" in ended.stdout
    with Image.open(tmp_path / "out/demo.png") as image:
        assert image.size == (64, 64)


def test_make_help_names_every_target() -> None:
    output = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = ("setup", "demo", "test", "lint", "bench", "pack", "pack-eval", "proto", "docs", "check")
    assert all(re.search(rf"^  {name} ", output, re.MULTILINE) for name in wanted)
