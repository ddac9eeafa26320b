"""API keys: which calls are admitted, and what logs and metrics contain of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from latentflow import AsyncClient, Client
from latentflow.api import load_workflows
from latentflow.cli import app
from latentflow.errors import AuthenticationError, FailedPreconditionError, InvalidRequestError, NotFoundError
from latentflow.internal.directory import Directory
from latentflow.internal.metrics import GATEWAY, Instruments
from latentflow.reasons import Reason
from latentflow_gateway.api_keys import ApiKeys, client_of, digests
from latentflow_gateway.server import Gateway, serve
from latentflow_gateway.settings import GatewaySettings
from structlog.testing import capture_logs
from support.paths import EXAMPLES
from typer.testing import CliRunner

ANNA, BEN, STRANGER = "4f1d" * 8, "9c02" * 8, "77aa" * 8
WORKFLOW = load_workflows(EXAMPLES / "shapes-minimal.yaml")[0]


def mounted(folder: Path, **keys: str) -> Path:
    """A Secret as the kubelet mounts it, or updates the mount: one rename replaces all entries."""
    folder.mkdir(exist_ok=True)
    version = folder / f"..version{sum(1 for _ in folder.iterdir())}"
    version.mkdir()
    for name, key in keys.items():
        (version / name).write_text(key)
    (folder / "..data_tmp").symlink_to(version.name)
    (folder / "..data_tmp").rename(folder / "..data")
    for name in keys:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    for path in folder.iterdir():
        if not path.name.startswith("..") and path.name not in keys:
            path.unlink()
    return folder


def directory(folder: Path) -> Path:
    path = folder / "directory.json"
    Directory(workflows=(WORKFLOW,), models={}).write(path)
    return path


@contextlib.asynccontextmanager
async def serving(folder: Path, keys: Path) -> AsyncIterator[Gateway]:
    settings = GatewaySettings(directory=directory(folder), listen="127.0.0.1:0", api_keys=keys)
    async with serve(settings) as gateway:
        yield gateway


async def listed(gateway: Gateway, key: str) -> list[str]:
    async with AsyncClient(gateway.address, api_key=key, timeout=20) as client:
        return await client.workflows()


async def refused(gateway: Gateway, key: str) -> AuthenticationError:
    """The error of every call with this key."""
    async with AsyncClient(gateway.address, api_key=key, timeout=20) as client:
        errors = []
        for call in (client.workflows(), client.describe(), client.generate("a")):
            with pytest.raises(AuthenticationError) as caught:
                await call
            errors.append(caught.value)
    assert len({error.message for error in errors}) == 1
    return errors[0]


async def test_only_clients_with_a_key_of_the_folder_are_admitted(tmp_path: Path) -> None:
    async with serving(tmp_path, mounted(tmp_path / "keys", anna=ANNA, ben=f"{BEN}\n")) as gateway:
        for key in (ANNA, BEN, f" {BEN}\n"):
            assert await listed(gateway, key) == [WORKFLOW.full_name]
        missing, unknown = await refused(gateway, ""), await refused(gateway, STRANGER)
    assert missing.reason == Reason.API_KEY_MISSING
    assert "LATENTFLOW_API_KEY" in missing.message
    assert unknown.reason == Reason.API_KEY_UNKNOWN
    assert STRANGER not in unknown.message


async def test_a_rotated_key_is_accepted_from_the_next_call_on_and_the_old_one_refused(tmp_path: Path) -> None:
    keys = mounted(tmp_path / "keys", anna=ANNA)
    async with serving(tmp_path, keys) as gateway:
        assert await listed(gateway, ANNA)
        mounted(keys, anna=BEN)
        assert await listed(gateway, BEN)
        assert (await refused(gateway, ANNA)).reason == Reason.API_KEY_UNKNOWN
        mounted(keys, ben=BEN, anna=ANNA)
        assert await listed(gateway, ANNA)
        mounted(keys)
        assert (await refused(gateway, BEN)).reason == Reason.API_KEY_UNKNOWN


async def test_while_the_folder_cannot_be_read_the_last_keys_stay_valid(tmp_path: Path) -> None:
    keys = mounted(tmp_path / "keys", anna=ANNA)
    async with serving(tmp_path, keys) as gateway:
        keys.rename(tmp_path / "away")
        assert await listed(gateway, ANNA)
        await refused(gateway, STRANGER)
        mounted(keys, ben=BEN)
        assert await listed(gateway, BEN)
        await refused(gateway, ANNA)


async def test_health_and_reflection_need_no_key(tmp_path: Path) -> None:
    keys = mounted(tmp_path / "keys", anna=ANNA)
    async with serving(tmp_path, keys) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        response = await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert response.status == health_pb2.HealthCheckResponse.SERVING
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        answers = [answer async for answer in stub.ServerReflectionInfo(iter([listing]), timeout=10)]
        assert len(answers[0].list_services_response.service) == 3


async def test_a_gateway_does_not_start_without_its_folder_of_keys(tmp_path: Path) -> None:
    with pytest.raises(FailedPreconditionError, match="API keys cannot be read from"):
        async with serving(tmp_path, tmp_path / "absent"):
            pass


def test_files_without_a_key_that_can_be_sent_are_reported_by_name(tmp_path: Path) -> None:
    with capture_logs() as logs:
        keys = ApiKeys(
            mounted(tmp_path / "keys", anna="\n", ben=BEN, carla="schlüssel", dora=f"{ANNA}\n{BEN}\n"),
            metrics=Instruments(GATEWAY),
        )
    keys.admit(f"Bearer {BEN}")
    warnings = {one["file"]: one["problem"] for one in logs if one["log_level"] == "warning"}
    unsendable = "its key has characters other than printable ASCII, or several lines"
    assert warnings == {"anna": "it is empty", "carla": unsendable, "dora": unsendable}


@pytest.mark.parametrize("sent", [ANNA, f"Basic {ANNA}", f"Bearer:{ANNA}"])
def test_a_key_without_its_scheme_is_refused_with_the_form_of_the_header(tmp_path: Path, sent: str) -> None:
    keys = ApiKeys(mounted(tmp_path / "keys", anna=ANNA), metrics=Instruments(GATEWAY))
    with pytest.raises(AuthenticationError, match="Send `Authorization: Bearer KEY`") as caught:
        keys.admit(sent)
    assert caught.value.reason == Reason.API_KEY_MISSING
    assert ANNA not in caught.value.message


async def test_a_key_may_contain_spaces(tmp_path: Path) -> None:
    async with serving(tmp_path, mounted(tmp_path / "keys", anna="four words in one\n")) as gateway:
        assert await listed(gateway, "four words in one") == [WORKFLOW.full_name]


def test_a_folder_without_keys_is_reported(tmp_path: Path) -> None:
    with capture_logs() as logs:
        ApiKeys(mounted(tmp_path / "keys"), metrics=Instruments(GATEWAY))
    assert [one["event"] for one in logs if one["log_level"] == "warning"] == [
        "the folder of API keys holds no key: every call is refused"
    ]


def test_logs_and_metrics_contain_client_names_and_no_keys(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "latentflow_gateway.server",
        "--listen=127.0.0.1:0",
        "--http-listen=127.0.0.1:0",
        "--log-format=json",
    ]
    keys = mounted(tmp_path / "keys", anna=ANNA, ben=BEN)
    command += [f"--directory={directory(tmp_path)}", f"--api-keys={keys}"]
    environment = os.environ | {"LATENTFLOW_LOG_LEVEL": "DEBUG"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines: list[str] = []
        try:
            while not lines or json.loads(lines[-1])["event"] != "serving":
                lines.append(process.stderr.readline())
            started = json.loads(lines[-1])
            for key, error in ((ANNA, NotFoundError), (BEN, NotFoundError), (STRANGER, AuthenticationError)):
                with Client(started["address"], api_key=key, timeout=20) as client, pytest.raises(error):
                    client.generate("a", workflow="absent")
            url = f"http://127.0.0.1:{started['metrics_port']}/metrics"
            metrics = urllib.request.urlopen(url, timeout=10).read().decode()
        finally:
            process.terminate()
        lines += process.stderr.readlines()
    ended = [json.loads(line) for line in lines if '"request ended"' in line]
    assert [line["client"] for line in ended] == ["anna", "ben"]
    for name in ("anna", "ben", "?"):
        assert f'latentflow_gateway_authentications_total{{client="{name}"}} 1.0' in metrics
    for key in (ANNA, BEN, STRANGER):
        assert key not in "".join(lines) + metrics


async def test_clients_take_their_key_from_an_argument_or_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path, mounted(tmp_path / "keys", anna=ANNA)) as gateway:
        describe = ["describe", f"--target={gateway.address}", "--json"]
        done = await asyncio.to_thread(CliRunner().invoke, app, [*describe, f"--api-key={ANNA}"])
        assert json.loads(done.stdout)["name"] == WORKFLOW.full_name
        done = await asyncio.to_thread(CliRunner().invoke, app, describe)
        assert isinstance(done.exception, AuthenticationError)
        monkeypatch.setenv("LATENTFLOW_API_KEY", f"{ANNA}\n")
        done = await asyncio.to_thread(CliRunner().invoke, app, describe)
        assert json.loads(done.stdout)["name"] == WORKFLOW.full_name
        async with AsyncClient(gateway.address, timeout=20) as client:
            assert await client.workflows() == [WORKFLOW.full_name]
        await refused(gateway, STRANGER)


def test_a_key_with_unprintable_characters_is_refused_when_a_client_is_created() -> None:
    with pytest.raises(InvalidRequestError, match="printable ASCII"):
        Client("127.0.0.1:1", api_key=f"{ANNA}\n{BEN}")


NAMES = st.text(alphabet="abcdefgh-._", min_size=1, max_size=8)
KEYS = st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)


@given(keys=st.dictionaries(NAMES, KEYS, max_size=5), sent=KEYS, space=st.sampled_from(["", " ", "\n"]))
def test_a_key_identifies_its_client_and_no_other(keys: dict[str, str], sent: str, space: str) -> None:
    known = digests((name, f"{key}{space}".encode()) for name, key in keys.items())
    found = client_of(f"Bearer {sent}", known)
    assert found is None if sent not in keys.values() else keys[str(found)] == sent
    for key in keys.values():
        assert keys[str(client_of(f"bearer {key}", known))] == key
        assert client_of(f"Basic {key}", known) is None
        assert client_of(key, known) is None
    assert client_of("Bearer ", digests([("empty", b" \n")])) is None
    assert client_of("", known) is None
