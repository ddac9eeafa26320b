"""`latentflow up` as a user starts and ends it: its errors, and that no process or shared memory remains."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import pytest
import trustme
from latentflow import AsyncClient, Client, Tls
from latentflow.api import load_workflows
from latentflow.errors import AuthenticationError, InvalidRequestError, UnavailableError
from latentflow_local.runtime import run
from support.packs import MODELS
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


@contextlib.contextmanager
def ready(*options: str, **environment: str) -> Iterator[Up]:
    """`latentflow up` from its readiness on; it is ended with the context."""
    up = start(str(MINIMAL), f"--model-root={MODELS}", "--threads=1", *options, **environment)
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
        up.terminate()
        up.wait(SECONDS)


@pytest.fixture
def serving() -> Iterator[Up]:
    with ready("--listen=127.0.0.1:0") as up:
        yield up


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


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Up, Path]]:
    """`latentflow up` with an API key and limits, behind a proxy, with a long TMPDIR, in a narrow terminal; its file for Prometheus."""
    folder = tmp_path_factory.mktemp("up")
    temporary, keys, targets = folder / ("x" * 150), folder / "keys", folder / "targets.json"
    temporary.mkdir()
    keys.mkdir()
    (keys / "anna").write_text("key-of-anna\n")
    options = ("--listen=[::1]:0", f"--api-keys={keys}", f"--prometheus-targets={targets}")
    limits = ("--max-steps=3", "--max-images=2", "--request-seconds=500")
    proxies = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    with ready(*options, *limits, TMPDIR=str(temporary), COLUMNS="40", **proxies) as up:
        yield up, targets


def test_the_address_of_the_http_api_is_printed(configured: tuple[Up, Path]) -> None:
    printed = configured[0].printed
    found = re.search(r"^OpenAI API: (http://127\.0\.0\.1:\d+/v1)$", printed, re.MULTILINE)
    assert found is not None, printed
    request = urllib.request.Request(f"{found[1]}/models", headers={"Authorization": "Bearer key-of-anna"})
    with urllib.request.urlopen(request, timeout=20) as response:
        assert json.loads(response.read())["data"][0]["id"] == "default/shapes-minimal"


def test_clients_need_a_key_and_images_have_a_limit(configured: tuple[Up, Path]) -> None:
    line = configured[0].printed.splitlines()[-1]
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


def test_it_serves_behind_a_proxy_with_a_long_tmpdir_and_in_a_narrow_terminal(configured: tuple[Up, Path]) -> None:
    up, file = configured
    printed = up.printed.splitlines()
    targets = json.loads(file.read_text())
    scraped = [value(entry["targets"][0], "python_info") for entry in targets]
    assert "--target [::1]:" in printed[-1]
    # Each process, the gateway and the command itself.
    assert len(targets) == len(scraped) == 5
    for entry in targets:
        (line,) = (line for line in printed if line.startswith(f"{entry['labels']['process']} "))
        assert entry["targets"][0] in line


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A certificate for 127.0.0.1 and localhost, its key, and the CA that has signed it, as files."""

    ca: Path
    certificate: Path
    key: Path

    @property
    def options(self) -> tuple[str, str]:
        return f"--tls-cert={self.certificate}", f"--tls-key={self.key}"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    made = Certificate(ca=folder / "ca.pem", certificate=folder / "cert.pem", key=folder / "key.pem")
    authority.cert_pem.write_to_path(made.ca)
    issued.private_key_pem.write_to_path(made.key)
    issued.cert_chain_pems[0].write_to_path(made.certificate)
    return made


@pytest.fixture(scope="module")
def secured(certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """`latentflow up` with TLS and an API key, on all addresses of this machine; it prints one that the certificate contains."""
    keys = tmp_path_factory.mktemp("keys")
    (keys / "anna").write_text("key-of-anna\n")
    addresses = ("--listen=0.0.0.0:0", "--http-listen=0.0.0.0:0")
    with ready(*addresses, f"--api-keys={keys}", *certificate.options) as up:
        yield up


def secured_api(up: Up) -> str:
    found = re.search(r"^OpenAI API: (https://127\.0\.0\.1:\d+/v1)$", up.printed, re.MULTILINE)
    assert found is not None, up.printed
    return found[1]


def test_the_printed_command_works_with_tls_once_ca_and_key_are_set(
    secured: Up, certificate: Certificate, tmp_path: Path
) -> None:
    line = secured.printed.splitlines()[-1].removeprefix("Try: ")
    assert " --api-key KEY --tls-ca CA --target " in line
    command = line.replace("KEY", "key-of-anna").replace("--tls-ca CA", f"--tls-ca {certificate.ca}") + " --steps 2"
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True, timeout=SECONDS)
    assert (tmp_path / "out.png").stat().st_size


def test_the_client_of_openai_makes_an_image_over_https(secured: Up, certificate: Certificate) -> None:
    trusted = openai.DefaultHttpxClient(verify=ssl.create_default_context(cafile=str(certificate.ca)))
    url = secured_api(secured)
    with openai.OpenAI(base_url=url, api_key="key-of-anna", http_client=trusted, timeout=SECONDS) as client:
        made = client.images.generate(prompt="a red circle", extra_body={"seed": 3, "steps": 2})
    assert made.data is not None
    assert made.data[0].b64_json
    with (
        openai.OpenAI(base_url=url, api_key="key-of-anna", max_retries=0) as stranger,
        pytest.raises(openai.APIConnectionError) as caught,
    ):
        stranger.models.list()
    assert "CERTIFICATE_VERIFY_FAILED" in str(caught.value.__cause__)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed; on Debian: tools/debian")
def test_curl_lists_the_models_over_https(secured: Up, certificate: Certificate) -> None:
    options = ["--silent", "--fail", "--cacert", str(certificate.ca), "--header", "Authorization: Bearer key-of-anna"]
    command = ["curl", *options, f"{secured_api(secured)}/models"]
    listed = subprocess.run(command, capture_output=True, check=True, timeout=20)
    assert json.loads(listed.stdout)["data"][0]["id"] == "default/shapes-minimal"


def test_a_client_without_tls_is_advised_to_use_it(secured: Up, certificate: Certificate) -> None:
    target = secured.printed.split()[-1]
    with (
        Client(target, api_key="key-of-anna", timeout=20) as plain,
        pytest.raises(UnavailableError, match="as a gateway with TLS does: pass its CA"),
    ):
        plain.workflows()
    with Client(target, api_key="key-of-anna", timeout=20, tls=Tls(ca=certificate.ca)) as anna:
        assert anna.workflows() == ["default/shapes-minimal"]


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


@pytest.mark.parametrize(
    ("of_certificate", "of_key", "words"),
    [
        ("absent", None, "TLS needs both --tls-cert and --tls-key."),
        (None, "key", "TLS needs both --tls-cert and --tls-key."),
        ("absent", "key", "absent cannot be read for TLS: No such file or directory."),
        ("certificate", "absent", "absent cannot be read for TLS: No such file or directory."),
        ("certificate", "other", "cannot be used for TLS: KEY_VALUES_MISMATCH."),
    ],
)
def test_tls_files_that_cannot_be_used_are_named_before_a_process_starts(
    certificate: Certificate, tmp_path: Path, of_certificate: str | None, of_key: str | None, words: str
) -> None:
    trustme.CA().issue_cert("127.0.0.1").private_key_pem.write_to_path(tmp_path / "other")
    files = {"certificate": certificate.certificate, "key": certificate.key}
    named = {"--tls-cert": of_certificate, "--tls-key": of_key}
    options = [f"{option}={files.get(name, tmp_path / name)}" for option, name in named.items() if name]
    # A process would report first that there are no weights.
    assert words in refusal(str(MINIMAL), "--listen=127.0.0.1:0", "--model-root=/nonexistent", *options)


def test_a_file_of_targets_that_cannot_be_written_is_named() -> None:
    message = refusal(str(MINIMAL), "--listen=127.0.0.1:0", "--prometheus-targets=/nonexistent/targets.json")
    assert "cannot be written to /nonexistent/targets.json: No such file or directory" in message


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
