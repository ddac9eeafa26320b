"""The server of /metrics ends at once."""

from __future__ import annotations

import time
from socketserver import BaseServer

import pytest
from latentflow.internal.metrics import LOCAL, Instruments


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_metrics_end_without_waiting_for_the_next_poll(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setattr(BaseServer.serve_forever, "__defaults__", (60.0,))
    metrics = Instruments(LOCAL)
    metrics.serve(host=host, port=0)
    started = time.monotonic()
    metrics.close()
    assert time.monotonic() - started < 30
