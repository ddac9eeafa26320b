"""How far servers are that still fetch their weights: read from their metrics while that lasts, for the model's status.

A server's /metrics is up before its model is. Only models are looked at whose weights are downloaded and of which no replica
takes requests yet, so a cluster that serves costs nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlparse

import aiohttp
import structlog
from latentflow.internal import sizes
from prometheus_client.parser import text_string_to_metric_families

from latentflow_operator import conditions
from latentflow_operator.manifests import metrics_port
from latentflow_operator.store import Place, Store, place_of
from latentflow_operator.troubles import is_ready

Body = dict[str, Any]
_DOWNLOADED = ("hf", "s3")
_SECONDS, _ANSWER_SECONDS, _AT_ONCE = 5.0, 2.0, 32
# Of a server's /metrics, which has a few thousand.
_MOST_BYTES = 1 << 20
_log = structlog.get_logger()


class Reading(NamedTuple):
    """Bytes that one server has, and has to have."""

    done: float
    total: float


def watched(uri: str, pods: Iterable[Body]) -> list[str]:
    """Addresses of a model's pods that may be fetching; none where the model is served or its weights are no download."""
    if urlparse(uri).scheme not in _DOWNLOADED:
        return []
    alive = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
    if any(map(is_ready, alive)):
        return []
    statuses = [pod.get("status", {}) for pod in alive]
    return sorted(s["podIP"] for s in statuses if s.get("phase") == "Running" and s.get("podIP"))


def reading(metrics: str) -> Reading:
    """What a server's /metrics says."""
    values = {
        sample.name: sample.value for family in text_string_to_metric_families(metrics) for sample in family.samples
    }
    return Reading(
        done=values.get("latentflow_download_bytes", 0.0), total=values.get("latentflow_download_total_bytes", 0.0)
    )


def sentence(readings: Iterable[Reading]) -> str | None:
    """What to say of a model's servers: how far the one is that will serve first; None where none fetches any more."""
    fetching = [one for one in readings if one.done < one.total]
    if not fetching:
        return None
    first = max(fetching, key=lambda one: one.done / one.total)
    return f"A server fetches the weights: {sizes.progress(first.done, first.total)}."


class Downloads:
    """What is known of all models' downloads.

    Args:
        changed: Called with a model of which there is something else to say.
        port: Of every server's /metrics; None: by the model's index in its pods.
    """

    def __init__(
        self,
        *,
        store: Store,
        changed: Callable[[Place], None],
        seconds: float = _SECONDS,
        port: int | None = None,
    ) -> None:
        self._store = store
        self._changed = changed
        self._seconds = seconds
        self._port = port
        self._said: dict[Place, str] | None = None

    def said(self, place: Place, before: Mapping[str, Body]) -> str | None:
        """What to say of a model's download; None where there is none.

        Args:
            before: The model's conditions until now, which stand until the servers were asked.
        """
        if self._said is not None:
            return self._said.get(place)
        return _told(before)

    async def run(self) -> None:
        """Asks again and again, until cancelled."""
        timeout = aiohttp.ClientTimeout(total=_ANSWER_SECONDS)
        connector = aiohttp.TCPConnector(limit=_AT_ONCE)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            while True:
                try:
                    await self.step(session)
                except Exception:
                    # What is only told must not end what works.
                    _log.exception("could not look at downloads")
                await asyncio.sleep(self._seconds)

    async def step(self, session: aiohttp.ClientSession) -> None:
        """Asks the servers of every model that may be fetching."""
        addresses = {place_of(body): self._addresses(body) for body in self._store.all("DiffusionModel")}
        asked = [(place, address) for place, those in addresses.items() for address in those]
        answers = await asyncio.gather(*(self._read(session, address) for _, address in asked))
        before, now = self._said_before() if self._said is None else self._said, dict[Place, str]()
        for place, those in addresses.items():
            readings = [answer for (of, _), answer in zip(asked, answers, strict=True) if of == place and answer]
            # Of servers that did not answer, nothing new is known.
            told = sentence(readings) if readings or not those else before.get(place)
            if told is not None:
                now[place] = told
        self._said = now
        for place in before.keys() | now.keys():
            if before.get(place) != now.get(place):
                self._changed(place)

    def _said_before(self) -> dict[Place, str]:
        """What statuses say since before this process."""
        told = {place_of(body): _told(conditions.by_type(body)) for body in self._store.all("DiffusionModel")}
        return {place: message for place, message in told.items() if message is not None}

    def _addresses(self, body: Body) -> list[str]:
        namespace, name = place_of(body)
        host = body["spec"].get("host", {"model": name, "index": 0})
        port = self._port or metrics_port(host["index"])
        addresses = watched(body["spec"]["source"]["uri"], self._store.pods(namespace, host["model"]))
        return [f"[{address}]:{port}" if ":" in address else f"{address}:{port}" for address in addresses]

    async def _read(self, session: aiohttp.ClientSession, address: str) -> Reading | None:
        try:
            async with session.get(f"http://{address}/metrics") as response:
                return reading((await response.content.read(_MOST_BYTES)).decode())
        except (aiohttp.ClientError, TimeoutError, ValueError, LookupError):
            return None


def _told(said: Mapping[str, Body]) -> str | None:
    """What conditions, by type, say of a download; None where of none."""
    progressing = said.get("Progressing", {})
    return progressing["message"] if progressing.get("reason") == conditions.DOWNLOADING else None
