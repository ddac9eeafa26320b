"""The progress of weight downloads, read from the metrics of the servers for the status of their models.

A server serves `/metrics` before its model is loaded. The operator reads only models whose weights are downloaded and
that have no ready replica yet, so that a cluster in which every model is ready costs nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple
from urllib.parse import urlparse

import aiohttp
import structlog
from latentflow.api.conditions import ConditionReason
from latentflow.api.status import ConditionType
from latentflow.internal import hosts, sizes
from prometheus_client.parser import text_string_to_metric_families

from latentflow_operator import manifests
from latentflow_operator.objects import Condition, Model, ObjectKey, Pod
from latentflow_operator.store import Store

_DOWNLOADED = ("hf", "s3")
_INTERVAL_SECONDS, _TIMEOUT_SECONDS, _CONCURRENT_REQUESTS = 5.0, 2.0, 32
# The most that is read of a server's /metrics, which has a few thousand bytes.
_MAX_BYTES = 1 << 20
_log = structlog.get_logger()


class Progress(NamedTuple):
    """The bytes that one server has downloaded, and the bytes of its whole download."""

    done: float
    total: float


def downloading_hosts(uris: Iterable[str], pods: Iterable[Pod]) -> list[str]:
    """IP addresses of a model's pods that may be downloading; none if a replica is ready or all its sources are local."""
    if not any(urlparse(uri).scheme in _DOWNLOADED for uri in uris):
        return []
    alive = [pod for pod in pods if not pod.deleting]
    if any(pod.ready for pod in alive):
        return []
    return sorted(pod.ip for pod in alive if pod.phase == "Running" and pod.ip)


def parse(metrics: str) -> Progress:
    """The progress in a server's `/metrics` text."""
    values = {
        sample.name: sample.value for family in text_string_to_metric_families(metrics) for sample in family.samples
    }
    return Progress(
        done=values.get("latentflow_download_bytes", 0.0), total=values.get("latentflow_download_total_bytes", 0.0)
    )


def message(progress: Iterable[Progress]) -> str | None:
    """The message for a model: the progress of the server that is furthest; None if no server downloads."""
    unfinished = [one for one in progress if one.done < one.total]
    if not unfinished:
        return None
    first = max(unfinished, key=lambda one: one.done / one.total)
    return f"A server downloads the weights: {sizes.progress(first.done, first.total)}."


class Downloads:
    """The download progress of all models.

    Args:
        on_change: Called with a model whose message has changed.
        port: Port of every server's `/metrics`; None: the port for the model's index in its pods.
    """

    def __init__(
        self,
        *,
        store: Store,
        on_change: Callable[[ObjectKey], None],
        seconds: float = _INTERVAL_SECONDS,
        port: int | None = None,
    ) -> None:
        self._store = store
        self._on_change = on_change
        self._seconds = seconds
        self._port = port
        # None before the servers have been read once.
        self._messages: dict[ObjectKey, str] | None = None

    def progress(self, model: ObjectKey, conditions: Mapping[str, Condition]) -> str | None:
        """The message for a model; None if it downloads nothing.

        Args:
            conditions: Its present conditions, by type. Their message is kept until the servers have been read once.
        """
        if self._messages is not None:
            return self._messages.get(model)
        return _reported(conditions)

    async def run(self) -> None:
        """Reads the servers until cancelled."""
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS)
        connector = aiohttp.TCPConnector(limit=_CONCURRENT_REQUESTS)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            while True:
                try:
                    await self.step(session)
                except Exception:
                    # Progress is information only; its failure must not stop the reconciliation.
                    _log.exception("could not read the progress of downloads")
                await asyncio.sleep(self._seconds)

    async def step(self, session: aiohttp.ClientSession) -> None:
        """Reads the servers of every model that may be downloading, once."""
        addresses = {model.key: self._addresses(model) for model in self._store.models()}
        requests = [(key, address) for key, of_model in addresses.items() for address in of_model]
        answers = await asyncio.gather(*(self._read(session, address) for _, address in requests))
        before, now = self._messages_in_status() if self._messages is None else self._messages, dict[ObjectKey, str]()
        for key, of_model in addresses.items():
            progress = [one for (other, _), one in zip(requests, answers, strict=True) if other == key and one]
            # If no server answered, the last message is kept.
            new = message(progress) if progress or not of_model else before.get(key)
            if new is not None:
                now[key] = new
        self._messages = now
        for key in before.keys() | now.keys():
            if before.get(key) != now.get(key):
                self._on_change(key)

    def _messages_in_status(self) -> dict[ObjectKey, str]:
        """The messages that an earlier process of the operator wrote."""
        found = {model.key: _reported(model.conditions) for model in self._store.models()}
        return {key: text for key, text in found.items() if text is not None}

    def _addresses(self, model: Model) -> list[str]:
        if model.spec is None:
            return []
        host, uris = model.spec.host, [source.uri for source in model.spec.sources().values()]
        port = self._port or manifests.metrics_port(host.index if host is not None else 0)
        pods = self._store.pods(model.namespace, manifests.pods_of(model.name, model.spec))
        return [hosts.join(ip, port) for ip in downloading_hosts(uris, pods)]

    async def _read(self, session: aiohttp.ClientSession, address: str) -> Progress | None:
        try:
            async with session.get(f"http://{address}/metrics") as response:
                return parse((await response.content.read(_MAX_BYTES)).decode())
        except (aiohttp.ClientError, TimeoutError, ValueError, LookupError):
            return None


def _reported(conditions: Mapping[str, Condition]) -> str | None:
    """The download message in conditions, by type; None if they have none."""
    progressing = conditions.get(ConditionType.PROGRESSING)
    if progressing is None or progressing.reason != ConditionReason.DOWNLOADING:
        return None
    return progressing.message
