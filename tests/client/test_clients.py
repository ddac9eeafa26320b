"""Both clients with a mock transport, and with an unreachable gateway."""

from __future__ import annotations

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from latentflow import (
    NO_RETRIES,
    Accepted,
    AsyncClient,
    AsyncMockTransport,
    Client,
    Done,
    ImageReady,
    MockTransport,
    Progress,
    Retries,
)
from latentflow.errors import DeadlineError, InvalidRequestError, OverloadedError, UnavailableError
from latentflow.reasons import Reason

FAST = Retries(first=0.001, longest=0.002)


def test_generate_returns_as_many_images_as_were_requested() -> None:
    steps: list[int] = []
    with Client(transport=MockTransport()) as client:
        result = client.generate("a", images=2, seed=3, width=16, on_progress=lambda p: steps.append(p.step))
    assert [image.size for image in result.images] == [(16, 64), (16, 64)]
    assert [ready.seed for ready in result.ready] == [3, 4]
    assert steps == [1, 2, 1, 2]


def test_the_error_for_the_port_of_http_names_the_one_of_grpc() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with (
            Client(f"127.0.0.1:{server.server_port}", timeout=20, retries=NO_RETRIES) as client,
            pytest.raises(UnavailableError, match=r"That port speaks HTTP/1\.1; pass the address of gRPC"),
        ):
            client.workflows()
        server.shutdown()


def test_stream_yields_events_in_order() -> None:
    with Client(transport=MockTransport()) as client:
        kinds = [type(event) for event in client.stream("a")]
    assert kinds == [Accepted, Progress, Progress, ImageReady, Done]


async def test_the_asynchronous_client_has_the_same_surface() -> None:
    async with AsyncClient(transport=AsyncMockTransport()) as client:
        result = await client.generate("a", seed=3)
        kinds = [type(event) async for event in client.stream("a")]
        assert (await client.describe()).name == "default/mock"
        assert await client.workflows() == ["default/mock"]
    assert result.seed == 3
    assert kinds == [Accepted, Progress, Progress, ImageReady, Done]


def test_retryable_errors_are_retried_with_the_same_seed_and_key() -> None:
    transport = MockTransport(errors=[UnavailableError("gone"), OverloadedError("full", retry_after=0.001)])
    with Client(transport=transport, retries=FAST) as client:
        client.generate("a")
    assert len(transport.requests) == 3
    assert len({(request.seed, request.idempotency_key) for request in transport.requests}) == 1


async def test_the_asynchronous_client_retries_too() -> None:
    transport = AsyncMockTransport(errors=[UnavailableError("gone")])
    async with AsyncClient(transport=transport, retries=FAST) as client:
        await client.generate("a")
    assert len(transport.requests) == 2


def test_errors_that_would_occur_again_are_raised_at_once() -> None:
    transport = MockTransport(errors=[InvalidRequestError("no")])
    with Client(transport=transport, retries=FAST) as client, pytest.raises(InvalidRequestError):
        client.generate("a")
    assert len(transport.requests) == 1


def test_retries_can_be_turned_off() -> None:
    transport = MockTransport(errors=[UnavailableError("gone")])
    with Client(transport=transport, retries=NO_RETRIES) as client, pytest.raises(UnavailableError):
        client.generate("a")
    assert len(transport.requests) == 1


def test_a_timeout_bounds_all_attempts_together() -> None:
    transport = MockTransport(errors=[UnavailableError("gone") for _ in range(50)])
    raises = pytest.raises((UnavailableError, DeadlineError))
    with Client(transport=transport, retries=Retries(attempts=50)) as client, raises:
        client.generate("a", timeout=0.3)
    assert len(transport.requests) < 5


def test_an_unreachable_gateway_is_reported_with_its_target_and_a_remedy() -> None:
    raises = pytest.raises(UnavailableError, match=r"No gateway responds at 127\.0\.0\.1:1\. Start one with")
    with Client("127.0.0.1:1", retries=NO_RETRIES) as client, raises as caught:
        client.generate("a", timeout=10)
    assert caught.value.reason == Reason.GATEWAY_UNREACHABLE


@pytest.mark.parametrize("method", ["workflows", "describe"])
async def test_a_timeout_of_zero_is_not_the_client_s_default(method: str) -> None:
    with Client("127.0.0.1:1", timeout=10) as client, pytest.raises(DeadlineError):
        getattr(client, method)(timeout=0)
    async with AsyncClient("127.0.0.1:1", timeout=10) as client:
        with pytest.raises(DeadlineError):
            await getattr(client, method)(timeout=0)


def test_importing_the_client_imports_grpc_protobuf_and_pillow_and_no_other_library() -> None:
    program = (
        "import sys; before = set(sys.modules); import latentflow; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    imported = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    # gRPC imports its own other packages if they are installed, and parts that Cython compiled.
    others = {name for name in imported.split() if not name.startswith(("grpc", "_cython"))}
    assert others <= {"latentflow", "google", "PIL", "typing_extensions", "cython_runtime"}
