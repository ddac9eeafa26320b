"""The tensors of a request are released when it ends, also those whose handles it never received."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from latentflow.internal import rpc
from latentflow.v1 import stage_pb2, stage_pb2_grpc
from latentflow_gateway.leases import Leases
from latentflow_gateway.replicas import Replica
from support.serving import PROMPT, served


async def test_the_tensors_of_a_call_cancelled_during_its_answer_are_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(tmp_path) as servers:
        text = servers.node("TextEncoder")
        store, put = text.context.store, text.context.store.put

        def put_and_cancel(*arguments: Any, **named: Any) -> Any:
            # The server answers at once, and the answer finds nobody.
            calling.cancel()
            return put(*arguments, **named)

        monkeypatch.setattr(store, "put", put_and_cancel)
        async with rpc.channel(text.address, tls=None) as channel:
            replica = Replica(identity="text", address=text.address, channel=channel)
            leases = Leases("r", list)

            async def encode() -> None:
                with leases.answering(replica):
                    request = stage_pb2.EncodeRequest(request_id="r", prompt=PROMPT)
                    response = await stage_pb2_grpc.StageStub(channel).Encode(request)
                leases.hold(response.conditioning.values(), replica)

            calling = asyncio.create_task(encode())
            await asyncio.wait({calling})
            assert calling.cancelled()
            assert len(store) == 1
            await leases.release()
            assert len(store) == 0
