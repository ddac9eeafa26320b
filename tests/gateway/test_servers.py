"""What gateways and model servers have in common: health, reflection, metrics, TLS, draining."""

from __future__ import annotations

import asyncio
import contextlib
import io
import urllib.request
from pathlib import Path

import grpc
import grpc.aio
import pytest
import trustme
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from latentflow import AsyncClient, Progress, Retries
from latentflow.api import identity, load_workflows
from latentflow.cli.kube import Route
from latentflow.errors import (
    AuthenticationError,
    ConflictError,
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from latentflow.internal import rpc, status
from latentflow.internal.directory import Directory
from latentflow.internal.rpc import Tls
from latentflow.reasons import Reason
from latentflow.retries import NO_RETRIES
from latentflow.v1 import control_pb2, control_pb2_grpc
from latentflow_gateway.server import serve as serve_gateway
from latentflow_gateway.settings import GatewaySettings
from PIL import Image
from support.paths import EXAMPLES
from support.scraping import value
from support.serving import PROMPT, WORKFLOW, served
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

(SHAPES,) = load_workflows(EXAMPLES / "shapes.yaml")
CONTROLLED = ("text", "base", "edges", "pixels")


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
async def test_every_server_has_health_reflection_and_metrics(tmp_path: Path, host: str) -> None:
    async with served(tmp_path, host=host) as servers:
        servers_and_services = [(servers.gateway.address, servers.gateway.metrics_port, "latentflow.v1.Generation")]
        servers_and_services += [(node.address, node.metrics_port, "latentflow.v1.Stage") for node in servers.nodes]
        method = {"latentflow.v1.Generation": "Generate", "latentflow.v1.Stage": "Denoise"}
        for address, metrics_port, service in servers_and_services:
            assert address.startswith(f"{host}:")
            async with grpc.aio.insecure_channel(address) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                for name in ("", service):
                    response = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
                    assert response.status == health_pb2.HealthCheckResponse.SERVING
                symbols = (service, f"{service}.{method[service]}", f"{service}.Absent")
                questions = [reflection_pb2.ServerReflectionRequest(list_services="")]
                questions += [reflection_pb2.ServerReflectionRequest(file_containing_symbol=one) for one in symbols]
                stub = reflection_pb2_grpc.ServerReflectionStub(channel)
                answers = [answer async for answer in stub.ServerReflectionInfo(iter(questions), timeout=10)]
                assert service in {found.name for found in answers[0].list_services_response.service}
                found_files = [bool(one.file_descriptor_response.file_descriptor_proto) for one in answers[1:]]
                assert found_files == [True, True, False]
            url = f"http://{host}:{metrics_port}/metrics"
            text = (await asyncio.to_thread(urllib.request.urlopen, url, timeout=10)).read().decode()
            assert "# HELP latentflow_" in text
        async with AsyncClient(servers.gateway.address) as client:
            assert (await client.generate(PROMPT, steps=1, timeout=60)).image.size == (64, 64)


async def test_clients_gateways_and_model_servers_use_mutual_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    tls = Tls(ca=tmp_path / "ca.pem", certificate=tmp_path / "cert.pem", key=tmp_path / "key.pem")
    async with served(tmp_path, tls=tls, client_tls=tls) as servers:
        async with AsyncClient(servers.gateway.address, tls=tls) as client:
            result = await client.generate(PROMPT, steps=2, timeout=60)
            assert result.image.size == (64, 64)
        # A client without a certificate of the authority is refused, by the gateway and by a model server.
        without = Tls(ca=tmp_path / "ca.pem")
        for address in (servers.gateway.address, servers.nodes[0].address):
            async with AsyncClient(address, tls=without, retries=Retries(attempts=1)) as stranger:
                with pytest.raises(UnavailableError):
                    await stranger.generate(PROMPT, steps=2, timeout=10)


async def test_behind_a_forwarded_port_gateways_are_verified_by_the_name_of_their_service(tmp_path: Path) -> None:
    authority = trustme.CA()
    host = Route(workflow="art/shapes", service="latentflow-gateway", namespace="latentflow", port=8400).host
    certificate = authority.issue_cert(host)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    tls = Tls(certificate=tmp_path / "cert.pem", key=tmp_path / "key.pem")
    async with served(tmp_path, client_tls=tls) as servers:
        port = servers.gateway.address.rpartition(":")[2]
        for name, known in ((host, True), (None, False)):
            by_name = Tls(ca=tmp_path / "ca.pem", name=name)
            async with AsyncClient(f"127.0.0.1:{port}", tls=by_name, retries=Retries(attempts=1)) as client:
                with contextlib.nullcontext() if known else pytest.raises(UnavailableError):
                    await client.generate(PROMPT, steps=2, timeout=60 if known else 10)


async def test_requests_for_unknown_workflows_are_counted_in_one_series(tmp_path: Path) -> None:
    directory = tmp_path / "directory.json"
    Directory(workflows=(WORKFLOW,), models={}).write(directory)
    settings = GatewaySettings(directory=directory, listen="127.0.0.1:0")
    async with serve_gateway(settings) as gateway, AsyncClient(gateway.address, timeout=20) as client:
        for name in ("absent", "default/other"):
            with pytest.raises(NotFoundError):
                await client.generate(PROMPT, workflow=name)
        metrics = f"127.0.0.1:{gateway.metrics_port}"
        labels = {"workflow": "?", "code": "NOT_FOUND"}
        assert value(metrics, "latentflow_gateway_requests_total") == 2
        assert value(metrics, "latentflow_gateway_requests_total", **labels) == 2


async def test_no_request_runs_longer_than_request_seconds_whatever_its_client_s_timeout(tmp_path: Path) -> None:
    async with served(tmp_path, request_seconds=0.5) as servers, AsyncClient(servers.gateway.address) as client:
        with pytest.raises(DeadlineError, match=r"the longest time that this gateway allows \(--request-seconds\)"):
            await client.generate(PROMPT, steps=50, width=512, height=512, timeout=120)


async def test_damaged_pixels_of_a_control_image_are_refused_by_its_controlnet(tmp_path: Path) -> None:
    spec = SHAPES.spec.model_copy(update={"models": [m for m in SHAPES.spec.models if m.name in CONTROLLED]})
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(stream, "PNG")
    # The header is whole, which is all that the gateway reads of it.
    damaged = stream.getvalue()[:-1000]
    async with (
        served(tmp_path, workflow=SHAPES.model_copy(update={"spec": spec})) as servers,
        AsyncClient(servers.gateway.address, retries=NO_RETRIES) as client,
    ):
        with pytest.raises(InvalidRequestError, match="The control image cannot be read as PNG"):
            await client.generate(PROMPT, steps=2, control_images={"edges": damaged}, timeout=60)
        metrics = f"127.0.0.1:{servers.node('Denoiser').metrics_port}"
        assert value(metrics, "latentflow_requests_total", call="Denoise") == 1


async def test_api_keys_are_accepted_by_gateways_only_and_the_token_by_model_servers_only(
    tmp_path: Path,
) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/anna").write_text("key-of-anna")
    async with served(tmp_path, token="token-of-the-servers", api_keys=tmp_path / "keys") as servers:
        async with AsyncClient(servers.gateway.address, api_key="key-of-anna") as client:
            result = await client.generate(PROMPT, steps=2, timeout=60)
            assert result.image.size == (64, 64)
        async with AsyncClient(servers.gateway.address, api_key="token-of-the-servers") as client:
            with pytest.raises(AuthenticationError):
                await client.generate(PROMPT, steps=2, timeout=60)
        async with grpc.aio.insecure_channel(servers.nodes[0].address) as channel:
            stub = control_pb2_grpc.ControlStub(channel)
            key = rpc.metadata(token="key-of-anna", trace=None, request_id=None)
            with pytest.raises(grpc.RpcError) as caught:
                await stub.Describe(control_pb2.DescribeRequest(protocol_version=1), timeout=60, metadata=key)
            assert status.error_from(caught.value).code is grpc.StatusCode.UNAUTHENTICATED


async def test_clients_with_different_api_keys_do_not_share_idempotency_keys(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    for name in ("anna", "ben"):
        (tmp_path / "keys" / name).write_text(f"key-of-{name}")
    async with served(tmp_path, api_keys=tmp_path / "keys") as servers:
        for name, steps in (("anna", 2), ("ben", 3)):
            async with AsyncClient(servers.gateway.address, api_key=f"key-of-{name}") as client:
                result = await client.generate(PROMPT, steps=steps, idempotency_key="1", timeout=60)
                assert result.done.steps == steps
        async with AsyncClient(servers.gateway.address, api_key="key-of-ben") as client:
            with pytest.raises(ConflictError):
                await client.generate(PROMPT, steps=2, idempotency_key="1", timeout=60)


async def test_a_stopping_gateway_finishes_running_requests_and_admits_no_new_ones(tmp_path: Path) -> None:
    async with served(tmp_path) as servers, AsyncClient(servers.gateway.address) as client:
        running = client.stream(PROMPT, steps=60)
        async for event in running:
            if isinstance(event, Progress):
                break
        stopping = asyncio.create_task(servers.gateway.stop(60))
        kinds = [type(event).__name__ async for event in running]
        await stopping
        assert kinds[-2:] == ["ImageReady", "Done"]
        async with AsyncClient(servers.gateway.address, retries=Retries(attempts=1)) as late:
            with pytest.raises(UnavailableError):
                await late.generate(PROMPT, steps=2, timeout=10)


async def test_a_draining_model_server_finishes_running_requests(tmp_path: Path) -> None:
    async with served(tmp_path) as servers, AsyncClient(servers.gateway.address) as client:
        running = client.stream(PROMPT, steps=60)
        async for event in running:
            if isinstance(event, Progress):
                break
        denoiser = servers.node("Denoiser")
        draining = asyncio.create_task(denoiser.drain(60))
        kinds = [type(event).__name__ async for event in running]
        await draining
        assert kinds[-2:] == ["ImageReady", "Done"]
        async with AsyncClient(servers.gateway.address, retries=Retries(attempts=1)) as late:
            with pytest.raises(UnavailableError) as caught:
                await late.generate(PROMPT, steps=2, timeout=60)
        assert caught.value.reason == Reason.MODEL_NOT_READY


async def test_a_request_is_held_for_all_its_models_at_once_and_held_requests_are_bounded(tmp_path: Path) -> None:
    directory = tmp_path / "directory.json"
    Directory(workflows=(WORKFLOW,), models={}).write(directory)
    settings = GatewaySettings(directory=directory, listen="127.0.0.1:0", max_running=1, max_queued=1)
    async with serve_gateway(settings) as gateway, AsyncClient(gateway.address, retries=NO_RETRIES) as client:
        calls = [asyncio.create_task(client.generate(PROMPT, timeout=60)) for _ in range(2)]

        @retry(retry=retry_if_exception_type(AssertionError), stop=stop_after_delay(20), wait=wait_fixed(0.05))
        async def held() -> None:
            for model in WORKFLOW.spec.models:
                waits = await asyncio.to_thread(
                    value, f"127.0.0.1:{gateway.metrics_port}", "latentflow_gateway_held", model=identity(model)
                )
                assert waits == 2

        await held()
        with pytest.raises(OverloadedError):
            await client.generate(PROMPT, timeout=60)
        for one in calls:
            one.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


async def test_a_call_that_a_stopping_server_cancels_is_retried_on_another_replica() -> None:
    server, checks = grpc.aio.server(), health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with rpc.channel(f"127.0.0.1:{port}", tls=None) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        stopping = asyncio.create_task(server.stop(0))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch.read()
        await stopping
    assert isinstance(status.error_of_peer(caught.value), UnavailableError)
