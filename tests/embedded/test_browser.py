"""A web page of another origin uses the HTTP API with `fetch`, in a real browser."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from latentflow_local.runtime import Runtime
from support import browser

PAGE = Path(browser.__file__).with_name("page.html")


@pytest.mark.skipif(browser.program() is None, reason="no browser is installed; on Debian: tools/debian")
@pytest.mark.asyncio(loop_scope="session")
async def test_a_page_of_another_origin_makes_images_and_reads_errors(runtime: Runtime, tmp_path: Path) -> None:
    found = await asyncio.to_thread(browser.report, PAGE, tmp_path, api=f"http://{runtime.http}")
    assert found.get("failed") is None
    assert found["models"] == ["default/shapes"]
    assert (found["status"], found["size"], found["seed"]) == (200, [64, 64], 5)
    assert found["requestId"]
    assert (found["refused"], found["error"]["param"]) == (400, "step")
    assert "did you mean 'steps'?" in found["error"]["message"]
