"""Errors in OpenAI's own client: which class it raises, and how often it sends the request."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import openai
import pytest
from latentflow.errors import FailedPreconditionError
from latentflow.reasons import Reason
from latentflow_gateway.http import errors
from latentflow_gateway.server import Gateway
from support.scraping import value
from support.serving import PROMPT, served, without_servers

SHAPES = "default/shapes"


def client(gateway: Gateway, **options: object) -> openai.AsyncOpenAI:
    assert gateway.http is not None
    arguments = {"base_url": f"http://{gateway.http.address}/v1", "api_key": "none", "timeout": 60} | options
    return openai.AsyncOpenAI(**arguments)  # type: ignore[arg-type]


async def responses(gateway: Gateway, status: int) -> float:
    """The responses of a status that the gateway has sent."""
    metrics = f"127.0.0.1:{gateway.metrics_port}"
    return await asyncio.to_thread(value, metrics, "latentflow_gateway_http_responses_total", status=str(status))


async def test_a_wrong_request_is_a_bad_request_error_and_is_sent_once(tmp_path: Path) -> None:
    async with without_servers(tmp_path) as gateway, client(gateway) as own:
        with pytest.raises(openai.BadRequestError) as caught:
            await own.images.generate(model=SHAPES, prompt=PROMPT, extra_body={"step": 4})
        assert (caught.value.param, caught.value.code) == ("step", "INVALID_REQUEST")
        assert caught.value.type == "invalid_request_error"
        assert "did you mean 'steps'?" in caught.value.message
        assert caught.value.request_id
        with pytest.raises(openai.BadRequestError, match="stores no images"):
            await own.images.generate(model=SHAPES, prompt=PROMPT, response_format="url")
        with pytest.raises(openai.BadRequestError, match="The gRPC API streams progress"):
            await own.images.generate(model=SHAPES, prompt=PROMPT, stream=True)
        assert await responses(gateway, 400) == 3


@pytest.mark.parametrize(
    ("reason", "field"),
    [
        (Reason.ADAPTER_MISMATCH, "loras"),
        (Reason.ADAPTER_UNREADABLE, "loras"),
        (Reason.CONTROLNET_MISMATCH, "control_images"),
        (Reason.FAMILY_MISMATCH, None),
    ],
)
def test_an_error_about_what_a_field_names_has_the_field_as_param(reason: Reason, field: str | None) -> None:
    error = FailedPreconditionError("It cannot be used.", reason=reason)
    assert json.loads(errors.body(error, 400))["error"]["param"] == field


async def test_an_unknown_workflow_is_a_not_found_error(tmp_path: Path) -> None:
    async with without_servers(tmp_path) as gateway, client(gateway) as own:
        for call in (own.images.generate(model="absent", prompt=PROMPT), own.models.retrieve("absent")):
            with pytest.raises(openai.NotFoundError, match="it serves default/shapes-minimal, default/shapes"):
                await call
        assert await responses(gateway, 404) == 2


async def test_a_wrong_key_is_an_authentication_error(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/anna").write_text("key-of-anna")
    async with without_servers(tmp_path, api_keys=tmp_path / "keys") as gateway:
        async with client(gateway, api_key="key-of-ben") as stranger:
            with pytest.raises(openai.AuthenticationError) as caught:
                await stranger.models.list()
        assert caught.value.code == "API_KEY_UNKNOWN"
        async with client(gateway, api_key="key-of-anna") as anna:
            assert [model.id async for model in anna.models.list()] == ["default/shapes-minimal", SHAPES]
        assert await responses(gateway, 401) == 1


async def test_a_full_queue_is_a_rate_limit_error_after_the_retries(tmp_path: Path) -> None:
    async with (
        without_servers(tmp_path, max_running=1, max_queued=0) as gateway,
        client(gateway, max_retries=2) as own,
    ):
        first = asyncio.create_task(own.images.generate(model=SHAPES, prompt=PROMPT))
        metrics = f"127.0.0.1:{gateway.metrics_port}"
        async with asyncio.timeout(20):
            while not await asyncio.to_thread(value, metrics, "latentflow_gateway_in_flight"):
                pass
        with pytest.raises(openai.RateLimitError) as caught:
            await own.images.generate(model=SHAPES, prompt=PROMPT)
        assert caught.value.code == "QUEUE_FULL"
        assert await responses(gateway, 429) == 3
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_a_model_without_servers_is_an_internal_server_error(tmp_path: Path) -> None:
    async with without_servers(tmp_path, ready_seconds=0.1) as gateway, client(gateway, max_retries=0) as own:
        with pytest.raises(openai.InternalServerError) as caught:
            await own.images.generate(model=SHAPES, prompt=PROMPT)
        assert (caught.value.status_code, caught.value.code) == (503, "MODEL_NOT_READY")


async def test_a_request_that_takes_too_long_is_not_sent_again(tmp_path: Path) -> None:
    async with served(tmp_path, request_seconds=0.5) as servers, client(servers.gateway) as own:
        with pytest.raises(openai.InternalServerError) as caught:
            await own.images.generate(prompt=PROMPT, size="512x512", extra_body={"steps": 200})
        assert (caught.value.status_code, caught.value.code) == (504, "DEADLINE_EXCEEDED")
        assert await responses(servers.gateway, 504) == 1
