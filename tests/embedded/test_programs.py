"""Programs that use the clients in ways that their authors do not think about: before a loop, in two loops, after the end."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from latentflow_local.runtime import Runtime

pytestmark = pytest.mark.asyncio(loop_scope="session")
ASYNC = """
import asyncio
from latentflow import AsyncClient
client = AsyncClient({target!r}, timeout=60)
async def work():
    result = await client.generate("a red circle", seed=1, steps=2)
    print(result.image.size)
"""
SYNC = """
from latentflow import Client, errors
client = Client({target!r}, timeout=60)
"""


async def run(runtime: Runtime, program: str, **environment: str) -> tuple[str, str]:
    """What a program prints on stdout and stderr; its `{target!r}` is the gateway's address."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        program.format(target=runtime.target),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 120)
    return out.decode(), err.decode()


async def test_a_client_made_outside_an_event_loop_works(runtime: Runtime) -> None:
    assert await run(runtime, ASYNC + "asyncio.run(work())") == ("(64, 64)\n", "")


async def test_a_client_works_in_a_second_event_loop(runtime: Runtime) -> None:
    assert await run(runtime, ASYNC + "asyncio.run(work()); asyncio.run(work())") == ("(64, 64)\n" * 2, "")


async def test_a_call_after_the_end_of_a_client_is_refused(runtime: Runtime) -> None:
    after = """
for call in (lambda: client.generate("a", steps=1), client.workflows, client.describe):
    try:
        call()
    except errors.InvalidRequestError as error:
        print(error.message)
"""
    closed = "This client is closed; create another one.\n"
    assert await run(runtime, SYNC + "client.close()" + after) == (closed * 3, "")
    used = SYNC + 'client.generate("a", steps=1)\nclient.close()' + after
    assert await run(runtime, used) == (closed * 3, "")
    late = 'client.close()\nasync def late():\n  await client.close()\n  await client.generate("a")\n'
    out, err = await run(runtime, ASYNC + late.removeprefix("client.close()\n") + "asyncio.run(late())")
    assert err.splitlines()[-1] == f"latentflow.errors.InvalidRequestError: {closed.strip()}"
    assert out == ""


async def test_a_client_that_ends_at_once_after_its_call_prints_nothing(runtime: Runtime) -> None:
    program = (
        SYNC
        + 'for _ in range(2): client.generate("a", steps=1)\nfor _ in client.stream("a", steps=2): break\nclient.close()'
    )
    assert await run(runtime, program) == ("", "")


async def test_a_proxy_in_the_environment_does_not_affect_loopback(runtime: Runtime) -> None:
    proxies = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    assert await run(runtime, ASYNC + "asyncio.run(work())", **proxies) == ("(64, 64)\n", "")
    assert await run(runtime, SYNC + "print(client.generate('a', steps=1).image.size)", **proxies) == ("(64, 64)\n", "")


async def test_text_that_is_not_utf8_is_refused_before_it_is_sent(runtime: Runtime, tmp_path: Path) -> None:
    command = str(Path(sys.executable).parent / "latentflow")
    process = await asyncio.create_subprocess_exec(
        command, "generate", b"caf\xe9", "-o", str(tmp_path / "out.png"), stderr=asyncio.subprocess.PIPE, env={}
    )
    _, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    assert b"prompt is not valid Unicode text: 'caf\\udce9'" in err
