"""`latentflow up` as a user starts and ends it: its errors, and that no process or shared memory remains."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from latentflow import AsyncClient, Client
from latentflow.api import load_workflows
from latentflow.errors import AuthenticationError, InvalidRequestError
from latentflow_local.runtime import run
from support.packs import MODELS, SHAPES
from support.scraping import value

EXAMPLES = MODELS.parent / "examples"
MINIMAL = EXAMPLES / "shapes-minimal.yaml"
PROGRAM = str(Path(sys.executable).parent / "latentflow")
SECONDS = 240


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [PROGRAM, "up", "--http-listen=127.0.0.1:0", *arguments]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )


@dataclass(frozen=True, kw_only=True)
class Up:
    """A `latentflow up` that is ready, all its descendant processes, and what it has printed."""

    process: subprocess.Popen[str]
    children: list[psutil.Process]
    printed: str


@pytest.fixture
def serving() -> Iterator[Up]:
    up = start(str(MINIMAL), "--model-root", str(MODELS), "--listen", "127.0.0.1:0", "--threads", "1")
    assert up.stderr is not None
    printed = ""
    for line in up.stderr:
        printed += line
        if line.startswith("Try: "):
            break
    children = psutil.Process(up.pid).children(recursive=True)
    # Closes the pipes, too.
    with up:
        yield Up(process=up, children=children, printed=printed)
        up.kill()


def memory_folders(process: int) -> set[Path]:
    """The folders of shared memory that a process holds open."""
    opened = {Path(os.readlink(link)) for link in Path(f"/proc/{process}/fd").iterdir()}
    return {path for path in opened if path.parent == Path("/dev/shm") and path.is_dir()}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_after_any_signal(serving: Up, signum: signal.Signals) -> None:
    up, children = serving.process, serving.children
    memory = memory_folders(up.pid)
    assert len(memory) == 1
    assert len(children) >= 4
    up.send_signal(signum)
    code = up.wait(SECONDS)
    # The fork server unloads torch when it ends, which takes long on a busy machine.
    gone, alive = psutil.wait_procs(children, timeout=120)
    assert not alive
    assert len(gone) == len(children)
    assert code == (-signal.SIGKILL if signum is signal.SIGKILL else 0)
    # What a killed runtime leaves there is removed by the next one.
    assert signum is signal.SIGKILL or not any(path.exists() for path in memory)


def test_ctrl_c_during_the_start_prints_no_traceback() -> None:
    """In a terminal, which sends the signal to all processes of the foreground."""
    terminal, side = os.openpty()
    up = subprocess.Popen(
        ["setsid", "--ctty", PROGRAM, "up", "--http-listen=127.0.0.1:0", "--listen=127.0.0.1:0", str(MINIMAL)],
        stdin=side,
        stdout=side,
        stderr=side,
        cwd=MODELS.parent,
    )
    os.close(side)
    printed = ""
    with open(terminal, "r+b", buffering=0) as screen, up, contextlib.suppress(OSError):
        while part := screen.read(4096):
            # The first line is there while the model servers import their libraries.
            if not printed:
                screen.write(b"\x03")
            printed += part.decode(errors="replace")
    assert up.returncode == 0
    assert "Traceback" not in printed, printed


def test_the_address_of_the_http_api_is_printed(serving: Up) -> None:
    found = re.search(r"^OpenAI API: (http://127\.0\.0\.1:\d+/v1)$", serving.printed, re.MULTILINE)
    assert found is not None, serving.printed
    with urllib.request.urlopen(f"{found[1]}/models", timeout=20) as response:
        assert json.loads(response.read())["data"][0]["id"] == "default/shapes-minimal"


def test_clients_need_a_key_and_images_have_a_limit(tmp_path: Path) -> None:
    (tmp_path / "anna").write_text("key-of-anna\n")
    limits = ("--max-steps=3", "--max-images=2", "--request-seconds=500")
    options = (f"--model-root={MODELS}", "--listen=127.0.0.1:0", "--threads=1", f"--api-keys={tmp_path}", *limits)
    up = start(str(MINIMAL), *options)
    assert up.stderr is not None
    with up:
        line = next(line for line in up.stderr if line.startswith("Try: "))
        # The program as it was started, because the search path need not contain it.
        assert line.startswith(f"Try: {PROGRAM} generate")
        assert " --api-key KEY --target " in line
        with Client(line.split()[-1], timeout=20) as stranger, pytest.raises(AuthenticationError, match="--api-key"):
            stranger.workflows()
        with Client(line.split()[-1], timeout=20, api_key="key-of-anna") as anna:
            assert anna.describe().limits["max_pixels"] == 256 * 256
            with pytest.raises(InvalidRequestError, match="accepts at most 65536 \\(--max-pixels\\)"):
                anna.generate("a red circle", width=1024, height=1024)
            with pytest.raises(InvalidRequestError, match="The number of steps must be from 1 to 3, not 4"):
                anna.generate("a red circle", steps=4)
            with pytest.raises(InvalidRequestError, match="The number of images must be from 1 to 2, not 3"):
                anna.generate("a red circle", steps=3, images=3)
        up.terminate()


def test_it_serves_behind_a_proxy_with_a_long_tmpdir_and_in_a_narrow_terminal(tmp_path: Path) -> None:
    temporary = tmp_path / ("x" * 150)
    temporary.mkdir()
    file = tmp_path / "targets.json"
    proxies = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    up = start(
        str(MINIMAL),
        f"--model-root={MODELS}",
        "--listen=[::1]:0",
        "--threads=1",
        f"--prometheus-targets={file}",
        TMPDIR=str(temporary),
        COLUMNS="40",
        **proxies,
    )
    assert up.stderr is not None
    printed = []
    with up:
        for line in up.stderr:
            printed.append(line)
            if line.startswith("Try: "):
                break
        targets = json.loads(file.read_text())
        scraped = [value(entry["targets"][0], "python_info") for entry in targets]
        up.terminate()
    assert "--target [::1]:" in printed[-1]
    # Each process, the gateway and the command itself.
    assert len(targets) == len(scraped) == 5
    for entry in targets:
        (line,) = (line for line in printed if line.startswith(f"{entry['labels']['process']} "))
        assert entry["targets"][0] in line


def refusal(*arguments: str) -> str:
    """The error at the end of what a start that fails prints. The process ends by itself, without a traceback."""
    up = start(*arguments)
    _, message = up.communicate(timeout=SECONDS)
    assert up.returncode == 1
    assert "Traceback" not in message
    _, error, last = message.rpartition("Error: ")
    assert error
    return " ".join(last.split())


def test_a_typo_in_the_file_is_reported_with_its_line_and_a_suggestion(tmp_path: Path) -> None:
    path = tmp_path / "typo.yaml"
    path.write_text(MINIMAL.read_text().replace("role: VAE", "rol: VAE"))
    message = refusal(str(path))
    assert "typo.yaml:9:" in message
    assert "did you mean 'role'?" in message


def test_the_error_for_a_missing_weights_folder_names_it() -> None:
    message = refusal(str(MINIMAL), "--model-root", "/nonexistent", "--listen", "127.0.0.1:0")
    assert "There is no weights folder /nonexistent/shapes" in message
    assert "the model root (--model-root)" in message


def test_the_error_for_a_truncated_weights_file_names_it(tmp_path: Path) -> None:
    shutil.copytree(SHAPES, tmp_path / "shapes")
    broken = next((tmp_path / "shapes/vae").glob("*.safetensors"))
    broken.write_bytes(broken.read_bytes()[:-100])
    message = refusal(str(MINIMAL), "--model-root", str(tmp_path), "--listen", "127.0.0.1:0")
    assert f"{broken.name} is damaged or incomplete" in message


def test_weights_in_a_pickle_file_are_refused(tmp_path: Path) -> None:
    shutil.copytree(SHAPES, tmp_path / "shapes")
    weights = next((tmp_path / "shapes/unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    message = refusal(str(MINIMAL), "--model-root", str(tmp_path), "--listen", "127.0.0.1:0")
    assert "Weights load from safetensors only" in message


def test_the_error_for_a_taken_port_names_the_address() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"cannot listen on {address}" in refusal(str(MINIMAL), "--listen", address)


@pytest.mark.asyncio(loop_scope="session")
async def test_two_workflows_with_the_same_models_share_their_processes() -> None:
    workflows = load_workflows(EXAMPLES / "shapes-shared.yaml")
    async with run(workflows, model_root=MODELS, listen="127.0.0.1:0", threads=1, log_level="WARNING") as runtime:
        assert len(runtime.supervised) == 4 + 1
        await runtime.supervisor.wait_ready(SECONDS)
        async with AsyncClient(runtime.target, timeout=120) as client:
            assert await client.workflows() == ["default/plain", "default/traced"]
            plain, traced = await asyncio.gather(
                client.generate("a red circle", workflow="plain", steps=3, seed=1),
                client.generate("a red circle", workflow="traced", steps=3, seed=1),
            )
    assert plain.image.size == traced.image.size == (64, 64)
