"""The HTTP API around requests for images: routes, errors, API keys, limits, CORS, draining."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import trustme
from latentflow.errors import CLASSES
from latentflow.internal.directory import Directory
from latentflow.internal.rpc import Tls
from latentflow_gateway.http import errors, openapi
from latentflow_gateway.server import Gateway, serve
from latentflow_gateway.settings import GatewaySettings, Limits, parse
from openapi_spec_validator import validate
from support.http import Response, send
from support.scraping import value
from support.serving import PROMPT, WORKFLOW, served, without_servers
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

IMAGES = "/v1/images/generations"
IN_ITS_BODY = (
    f"POST {IMAGES} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{{".encode()
)
PAGE = "https://app.example"


async def response(gateway: Gateway, path: str, **arguments: Any) -> Response:
    assert gateway.http is not None
    return await asyncio.to_thread(send, gateway.http.address, path, **arguments)


async def test_the_models_are_the_workflows(tmp_path: Path) -> None:
    async with without_servers(tmp_path) as gateway:
        listed = (await response(gateway, "/v1/models")).json
        assert [one["id"] for one in listed["data"]] == ["default/shapes-minimal", "default/shapes"]
        for path in ("default/shapes", "default%2Fshapes", "shapes"):
            found = await response(gateway, f"/v1/models/{path}")
            assert found.json == listed["data"][1]
        assert (found.json["object"], found.json["owned_by"], found.json["ready"]) == ("model", "default", False)
        assert found.json["control_images"] == ["edges", "layout"]
        absent = await response(gateway, "/v1/models/absent")
        assert (absent.status, absent.error["code"]) == (404, "UNKNOWN_WORKFLOW")
        assert absent.error["type"] == "invalid_request_error"


async def test_whatever_is_no_request_of_the_api_gets_an_error_of_the_same_form(tmp_path: Path) -> None:
    async with without_servers(tmp_path) as gateway:
        for path in ("/", "/v1", "/v1/images/edits", "/v1/models/", "/v1/images/generations/"):
            missing = await response(gateway, path)
            assert (missing.status, missing.error["code"]) == (404, "NOT_FOUND")
        options = await response(gateway, IMAGES, method="OPTIONS")
        wrong = await response(gateway, IMAGES, method="GET")
        assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
        assert "use POST" in wrong.error["message"]
        form = await response(gateway, IMAGES, body=b"prompt=a", headers={"content-type": "text/plain"})
        assert form.status == 415
        assert "must have the content type application/json, not text/plain" in form.error["message"]
        broken = await response(gateway, IMAGES, body=b"{")
        assert (broken.status, broken.error["code"]) == (400, "INVALID_REQUEST")
        unknown = await response(gateway, IMAGES, body={"prompt": "a", "seeed": 1})
        assert (unknown.status, unknown.error["param"]) == (400, "seeed")
        assert unknown.headers["x-should-retry"] == "false"
        nobody = await response(gateway, IMAGES, body={"prompt": "a"})
        assert "default/shapes-minimal, default/shapes" in nobody.error["message"]
        assert len({a.headers["x-request-id"] for a in (missing, options, wrong, form, broken, unknown, nobody)}) == 7
        for route, status, count in (("?", "404", 4), ("?", "405", 2), (IMAGES, "400", 2), (IMAGES, "415", 1)):
            labels = {"route": route, "status": status}
            metrics = f"127.0.0.1:{gateway.metrics_port}"
            found = await asyncio.to_thread(value, metrics, "latentflow_gateway_http_responses_total", **labels)
            assert found == count, labels


async def test_a_body_that_is_too_large_is_refused_before_it_has_been_read(tmp_path: Path) -> None:
    async with without_servers(tmp_path, limits=Limits(max_control_image_bytes=1000)) as gateway:
        assert gateway.http is not None
        host, port = gateway.http.address.split(":")
        # Two ControlNets.
        limit = (1 << 20) + 2 * 1500
        for framing, sent in (
            (f"content-length: {limit + 1}", b""),
            ("transfer-encoding: chunked", b"%x\r\n%s\r\n" % (limit + 1, b" " * (limit + 1))),
        ):
            reader, writer = await asyncio.open_connection(host, int(port))
            head = f"POST {IMAGES} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n{framing}\r\n\r\n"
            writer.write(head.encode() + sent)
            # The rest of the body is never sent.
            status = await asyncio.wait_for(reader.readline(), 20)
            assert status.split()[1] == b"413"
            writer.close()
            await writer.wait_closed()
        largest = await response(gateway, IMAGES, body=b" " * limit)
        assert largest.status == 400


async def test_api_keys_are_those_of_grpc(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/anna").write_text("key-of-anna")
    async with without_servers(tmp_path, api_keys=tmp_path / "keys") as gateway:
        for path, body in (("/v1/models", None), ("/v1/models/shapes", None), (IMAGES, {"prompt": "a"})):
            missing = await response(gateway, path, body=body)
            assert (missing.status, missing.headers["www-authenticate"]) == (401, "Bearer")
            assert missing.error["type"] == "authentication_error"
            assert missing.error["code"] == "API_KEY_MISSING"
            wrong = await response(gateway, path, body=body, headers={"authorization": "Bearer key-of-ben"})
            assert (wrong.status, wrong.error["code"]) == (401, "API_KEY_UNKNOWN")
        known = await response(gateway, "/v1/models", headers={"authorization": "Bearer key-of-anna"})
        assert known.status == 200
        for path in ("/healthz", "/openapi.json"):
            assert (await response(gateway, path)).status == 200
        metrics = f"127.0.0.1:{gateway.metrics_port}"
        for client, count in (("anna", 1), ("?", 6)):
            found = await asyncio.to_thread(value, metrics, "latentflow_gateway_authentications_total", client=client)
            assert found == count


async def test_pages_of_the_listed_origins_may_use_the_api_and_no_others(tmp_path: Path) -> None:
    async with without_servers(tmp_path, cors_origins=(PAGE,)) as gateway:
        asked = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        allowed = await response(gateway, IMAGES, method="OPTIONS", headers={"origin": PAGE} | asked)
        assert allowed.status == 200
        assert allowed.headers["access-control-allow-origin"] == PAGE
        assert "POST" in allowed.headers["access-control-allow-methods"]
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        refused = await response(gateway, IMAGES, method="OPTIONS", headers={"origin": "https://other.example"} | asked)
        assert refused.status == 400
        # Pages read errors, too.
        error = await response(gateway, IMAGES, body={}, headers={"origin": PAGE})
        assert (error.status, error.headers["access-control-allow-origin"]) == (400, PAGE)
        assert "x-request-id" in error.headers["access-control-expose-headers"]
        other = await response(gateway, "/v1/models", headers={"origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
    async with without_servers(tmp_path) as gateway:
        without = await response(gateway, "/v1/models", headers={"origin": PAGE})
        assert "access-control-allow-origin" not in without.headers
        assert (await response(gateway, IMAGES, method="OPTIONS", headers={"origin": PAGE} | asked)).status == 405


async def test_a_full_queue_is_a_429_with_the_time_after_which_to_try_again(tmp_path: Path) -> None:
    async with without_servers(tmp_path, max_running=1, max_queued=0) as gateway:
        body = {"prompt": PROMPT, "model": "shapes"}
        first = asyncio.create_task(response(gateway, IMAGES, body=body))
        metrics = f"127.0.0.1:{gateway.metrics_port}"

        @retry(retry=retry_if_exception_type(AssertionError), stop=stop_after_delay(20), wait=wait_fixed(0.05))
        async def running() -> None:
            assert await asyncio.to_thread(value, metrics, "latentflow_gateway_in_flight") == 1

        await running()
        full = await response(gateway, IMAGES, body=body)
        assert (full.status, full.error["code"], full.error["type"]) == (429, "QUEUE_FULL", "rate_limit_error")
        assert full.headers["retry-after"] == "1"
        assert 0 < int(full.headers["retry-after-ms"]) <= 1000
        assert full.headers["x-should-retry"] == "true"
        # The stop of the gateway ends the request that still runs.
        await gateway.stop(0)
        ended = await first
        assert (ended.status, ended.error["code"]) == (503, "DRAINING")


async def test_a_client_that_disconnects_while_its_request_is_held_frees_its_place(tmp_path: Path) -> None:
    async with without_servers(tmp_path, max_running=1, max_queued=0) as gateway:
        assert gateway.http is not None
        host, port = gateway.http.address.split(":")
        body = b'{"prompt": "a", "model": "shapes"}'
        head = f"POST {IMAGES} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.encode() + body)
        metrics = f"127.0.0.1:{gateway.metrics_port}"
        async with asyncio.timeout(20):
            while not await asyncio.to_thread(value, metrics, "latentflow_gateway_in_flight"):
                pass
            writer.close()
            await writer.wait_closed()
            while await asyncio.to_thread(value, metrics, "latentflow_gateway_in_flight"):
                pass
        gone = {"route": IMAGES, "status": "499"}
        assert await asyncio.to_thread(value, metrics, "latentflow_gateway_http_responses_total", **gone) == 1


@pytest.mark.parametrize(
    "sent", [b"GET /v1/models HTTP/1.1\r\n", b"\x16\x03\x01\x02\x00\x01", IN_ITS_BODY, IN_ITS_BODY[:-3]]
)
async def test_a_connection_that_ends_in_the_middle_of_a_request_harms_no_other(tmp_path: Path, sent: bytes) -> None:
    async with without_servers(tmp_path) as gateway:
        assert gateway.http is not None
        host, port = gateway.http.address.split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        assert (await response(gateway, "/healthz")).status == 200


async def test_a_model_without_servers_is_a_503(tmp_path: Path) -> None:
    async with without_servers(tmp_path, ready_seconds=0.2) as gateway:
        late = await response(gateway, IMAGES, body={"prompt": PROMPT, "model": "shapes"})
        assert (late.status, late.error["code"], late.error["type"]) == (503, "MODEL_NOT_READY", "server_error")
        assert late.headers["retry-after"] == "1"


async def test_a_draining_gateway_is_unhealthy_and_admits_no_images(tmp_path: Path) -> None:
    async with without_servers(tmp_path) as gateway:
        assert (await response(gateway, "/healthz")).json == {"status": "serving"}
        gateway.generation.running.draining = True
        health = await response(gateway, "/healthz")
        assert (health.status, health.json) == (503, {"status": "draining"})
        refused = await response(gateway, IMAGES, body={"prompt": PROMPT, "model": "shapes"})
        assert (refused.status, refused.error["code"]) == (503, "DRAINING")


async def test_a_stopping_gateway_finishes_running_http_requests(tmp_path: Path) -> None:
    async with served(tmp_path) as servers:
        running = asyncio.create_task(response(servers.gateway, IMAGES, body={"prompt": PROMPT, "steps": 60}))
        denoiser = f"127.0.0.1:{servers.node('Denoiser').metrics_port}"

        @retry(retry=retry_if_exception_type(AssertionError), stop=stop_after_delay(20), wait=wait_fixed(0.01))
        async def denoising() -> None:
            assert await asyncio.to_thread(value, denoiser, "latentflow_in_flight") == 1

        await denoising()
        stopping = asyncio.create_task(servers.gateway.stop(60))
        await asyncio.wait({stopping}, timeout=0)
        health = await response(servers.gateway, "/healthz")
        assert (health.status, health.json) == (503, {"status": "draining"})
        assert not running.done()
        await stopping
        finished = await running
        assert finished.status == 200
        assert servers.gateway.http is not None
        with pytest.raises(OSError, match="refused"):
            await response(servers.gateway, "/healthz")


async def test_http_has_the_tls_of_grpc(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    tls = Tls(ca=tmp_path / "ca.pem", certificate=tmp_path / "cert.pem", key=tmp_path / "key.pem")
    async with without_servers(tmp_path, tls=tls) as gateway:
        assert gateway.http is not None
        url = f"https://{gateway.http.address}/healthz"
        known = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        known.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
        with await asyncio.to_thread(urllib.request.urlopen, url, timeout=20, context=known) as response:
            assert json.loads(response.read()) == {"status": "serving"}
        without = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        with pytest.raises(OSError, match=r"certificate|closed|reset|EOF"):
            (await asyncio.to_thread(urllib.request.urlopen, url, timeout=20, context=without)).read()


async def test_a_gateway_serves_http_only_where_it_is_asked_to(tmp_path: Path) -> None:
    directory = tmp_path / "directory.json"
    Directory(workflows=(WORKFLOW,), models={}).write(directory)
    for option, address in (("none", None), ("127.0.0.1:0", "127.0.0.1")):
        settings = parse([f"--directory={directory}", "--listen=127.0.0.1:0", f"--http-listen={option}"])
        async with serve(settings) as gateway:
            assert (gateway.http and gateway.http.address.partition(":")[0]) == address


async def test_http_is_served_on_ipv6(tmp_path: Path) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    directory = tmp_path / "directory.json"
    Directory(workflows=(WORKFLOW,), models={}).write(directory)
    async with serve(GatewaySettings(directory=directory, listen="127.0.0.1:0", http="[::1]:0")) as gateway:
        assert (await response(gateway, "/healthz")).status == 200


async def test_the_openapi_document_is_valid_and_has_every_route(tmp_path: Path) -> None:
    async with without_servers(tmp_path) as gateway:
        assert gateway.http is not None
        document = (await response(gateway, "/openapi.json")).json
    validate(document)
    assert document["paths"].keys() == {IMAGES, "/v1/models", "/v1/models/{model}", "/healthz", "/openapi.json"}
    properties = document["components"]["schemas"]["ImageRequest"]["properties"]
    assert all("description" in found for found in properties.values())
    validate(openapi.document(keyed=True))


def test_every_class_of_error_has_a_status() -> None:
    assert errors.STATUS.keys() == set(CLASSES)
    statuses = {status for status in errors.STATUS.values() if status != 499}
    documented = openapi.document(keyed=True)["paths"][IMAGES]["post"]["responses"]
    assert {str(status) for status in statuses} <= documented.keys()
