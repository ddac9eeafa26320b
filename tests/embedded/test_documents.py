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
import torch
from latentflow.api import load_workflows
from latentflow_local.runtime import Runtime, run
from PIL import Image
from safetensors.torch import load_file
from support.documents import blocks
from support.packs import MODELS
from support.paths import EXAMPLES, ROOT

BIN = Path(sys.executable).parent


def commands(document: str) -> list[list[str]]:
    """The `latentflow generate`, `describe` and `validate` commands that a document shows."""
    lines = [line for block in blocks(document, "bash") for line in block.splitlines()]
    shown = [shlex.split(line, comments=True) for line in lines if line.startswith(".venv/bin/latentflow ")]
    return [words[1:] for words in shown if words[1] in ("generate", "describe", "validate")]


async def succeeds(*command: str, cwd: Path, env: dict[str, str] | None = None) -> None:
    """Asserts that a command ends with the exit code 0."""
    process = await asyncio.create_subprocess_exec(*command, cwd=cwd, env=env)
    assert await asyncio.wait_for(process.wait(), 120) == 0, command


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("document", ["README.md", "docs/tutorial.md"])
async def test_the_commands_in_a_document_work(runtime: Runtime, tmp_path: Path, document: str) -> None:
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "my-workflow.yaml").write_text((EXAMPLES / "shapes-minimal.yaml").read_text())
    shown = commands(document)
    assert len(shown) >= 3
    for words in shown:
        await succeeds(str(BIN / "latentflow"), *words, cwd=tmp_path, env={"LATENTFLOW_TARGET": runtime.target})


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
        script = script.replace("127.0.0.1:8402", runtime.http)
        await succeeds("bash", "-euo", "pipefail", "-c", script, cwd=tmp_path)
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            assert image.size == (64, 64)


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("document", ["README.md", "docs/tutorial.md", "docs/http.md"])
async def test_the_programs_in_a_document_work(runtime: Runtime, tmp_path: Path, document: str) -> None:
    shown = blocks(document, "python")
    assert shown
    for program in shown:
        program = program.replace("127.0.0.1:8400", runtime.target).replace("127.0.0.1:8402", str(runtime.http))
        await succeeds(sys.executable, "-c", program, cwd=tmp_path, env={"LATENTFLOW_TARGET": runtime.target})
    assert list(tmp_path.glob("*.png"))


@pytest.mark.asyncio(loop_scope="session")
async def test_the_steps_of_the_page_on_loras_work(tmp_path: Path) -> None:
    shutil.copytree(MODELS / "shapes", tmp_path / "models/shapes")
    (workflow,), (prepare, serve, *_) = (blocks("docs/loras.md", language) for language in ("yaml", "bash"))
    (tmp_path / "painter.yaml").write_text(workflow)
    await succeeds("bash", "-euc", prepare, cwd=tmp_path)
    assert serve.strip() == ".venv/bin/latentflow up painter.yaml"
    workflows = load_workflows(tmp_path / "painter.yaml")
    async with run(workflows, model_root=tmp_path / "models", listen="127.0.0.1:0", log_level="WARNING") as running:
        await running.supervisor.wait_ready(240)
        environment = {"LATENTFLOW_TARGET": running.target}
        for words in commands("docs/loras.md"):
            await succeeds(str(BIN / "latentflow"), *words, cwd=tmp_path, env=environment)
    with Image.open(tmp_path / "star.png") as image:
        assert image.size == (64, 64)


@pytest.mark.asyncio(loop_scope="session")
async def test_the_commands_of_the_page_on_controlnets_work(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(EXAMPLES)
    first, *of_nets = commands("docs/controlnets.md")
    assert len(of_nets) == 2
    await succeeds(str(BIN / "latentflow"), *first, cwd=tmp_path, env={"LATENTFLOW_TARGET": runtime.target})
    workflows = load_workflows(EXAMPLES / "shapes-nets.yaml")
    async with run(workflows, model_root=MODELS, listen="127.0.0.1:0", log_level="WARNING") as running:
        await running.supervisor.wait_ready(240)
        for words in of_nets:
            await succeeds(str(BIN / "latentflow"), *words, cwd=tmp_path, env={"LATENTFLOW_TARGET": running.target})


def test_the_steps_of_the_page_on_weights_are_valid(tmp_path: Path) -> None:
    (workflow, *_) = blocks("docs/weights.md", "yaml")
    (tmp_path / "castle.yaml").write_text(workflow)
    shutil.copytree(MODELS / "shapes", tmp_path / "my-models/castle")
    (words,) = commands("docs/weights.md")
    ended = subprocess.run([BIN / "latentflow", *words], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stdout == "default/castle: valid, 3 models\n"


def test_the_program_of_the_page_on_weights_converts_a_pickle(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    state = {"a": shared.T, "b": shared, "c": torch.ones(2, dtype=torch.float16)}
    (program,) = blocks("docs/weights.md", "python")
    for name, content in (("ckpt", {"state_dict": state, "global_step": 5}), ("bin", state)):
        torch.save(content, tmp_path / "model.ckpt")
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
        converted = load_file(tmp_path / "model.safetensors")
        assert converted.keys() == state.keys(), name
        assert all(torch.equal(converted[key], state[key]) for key in state)


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
