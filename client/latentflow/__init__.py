"""latentflow: a client for text-to-image workflows that are served one model at a time.

from latentflow import Client

with Client() as client:
    client.generate("a large red circle on the left, white background").image.save("circle.png")
"""

from __future__ import annotations

from latentflow.aio import AsyncClient
from latentflow.client import Client
from latentflow.errors import LatentflowError
from latentflow.internal.rpc import Tls
from latentflow.mock import AsyncMockTransport, MockTransport
from latentflow.reasons import Reason
from latentflow.requests import ControlImage
from latentflow.results import Accepted, Done, Event, ImageReady, Progress, Result, Workflow
from latentflow.retries import NO_RETRIES, Retries

__all__ = [
    "NO_RETRIES",
    "Accepted",
    "AsyncClient",
    "AsyncMockTransport",
    "Client",
    "ControlImage",
    "Done",
    "Event",
    "ImageReady",
    "LatentflowError",
    "MockTransport",
    "Progress",
    "Reason",
    "Result",
    "Retries",
    "Tls",
    "Workflow",
]
