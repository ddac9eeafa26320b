"""What a Prometheus server knows of the models' load, and what gateways say themselves: PromQL in, `policy.Load` out.

Requests that gateways hold are also read from the gateways directly, so that a model without replicas is woken while
Prometheus is away, and before it has scraped.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import structlog
from latentflow.errors import UnavailableError

from latentflow_scheduler import scrapes
from latentflow_scheduler.policy import Load

Place = tuple[str, str]
_log = structlog.get_logger()
_SECONDS = 5.0
# Gateways are near, and a request waits.
_GATEWAY_SECONDS = 2.0
# The calls that are somebody's request of the model; the others are about it.
_CALLS = "|".join(scrapes.CALLS)


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What was known at one time, by namespace and name of the model.

    Attributes:
        replicas: How many replicas the figures are of.
        held: Requests that gateways hold; of models that have no replica too.
    """

    loads: dict[Place, Load]
    replicas: dict[Place, int]
    held: dict[Place, float]


def load(known: Signals | None, held: Mapping[Place, float], place: Place, *, ready: int, current: int) -> Load | None:
    """A model's load; None where the figures do not cover the replicas that are ready, or nothing is known.

    Args:
        held: What gateways say themselves.
        ready: Replicas that take requests.
        current: Replicas there shall be; of a model that shall have none, what gateways hold is all there is to know.
    """
    holds = max(held.get(place, 0.0), known.held.get(place, 0.0) if known else 0.0)
    if known is None or place not in known.loads:
        if current == 0 and (holds or known is not None):
            return Load(arrivals=0.0, service_seconds=0.0, busy=0.0, waiting=0.0, held=holds)
        return None
    if known.replicas.get(place, 0) < ready:
        return None
    return replace(known.loads[place], held=holds)


def gathered(held: Mapping[Place, float], inside: Mapping[Place, Place]) -> dict[Place, float]:
    """What gateways hold, with that for models inside others' pods counted to those others, which alone can be scaled.

    Args:
        inside: In whose pods a model runs.
    """
    counted: dict[Place, float] = {}
    for place, count in held.items():
        host = inside.get(place, place)
        counted[host] = counted.get(host, 0.0) + count
    return counted


async def read(session: aiohttp.ClientSession, url: str, *, window: int) -> Signals:
    """The signals now. UnavailableError where Prometheus cannot be asked, or knows none of what it should scrape.

    Args:
        url: Of the Prometheus server. Its targets' namespace is the label `namespace`, as its own service discovery and the
            Prometheus operator have it.
        window: Seconds over which rates are taken; at least four times the scrape interval.
    """
    by_model = "sum by (namespace, model)"
    calls, by_replica = f'call=~"{_CALLS}"', "sum by (namespace, model, instance)"
    started = await _query(session, url, f"{by_model}(rate(latentflow_requests_started_total{{{calls}}}[{window}s]))")
    refused = f'{by_model}(rate(latentflow_requests_total{{{calls},code="{scrapes.REFUSED}"}}[{window}s]))'
    refusals = _placed(await _query(session, url, refused))
    # A step counts when it ends: one longer than the window would show as more than all of a replica's time.
    computing = f"clamp_max({by_replica}(rate(latentflow_step_seconds_sum[{window}s])), 1)"
    busy = await _query(session, url, f"{by_model}({computing})")
    # A replica that has ended none yet has computed for some already.
    ended = f'({by_replica}(rate(latentflow_requests_total{{{calls},code!="{scrapes.REFUSED}"}}[{window}s])) > 0)'
    service = await _query(session, url, f"{by_model}({computing} and {ended}) / {by_model}({ended})")
    waiting = await _query(session, url, f"{by_model}(latentflow_queue_depth)")
    running = await _query(session, url, f"{by_model}(latentflow_in_flight)")
    replicas = await _query(session, url, "count by (namespace, model)(latentflow_ready == 1)")
    holding = await _query(session, url, "sum by (model)(latentflow_gateway_held)")
    # A gateway knows a model as namespace/name.
    held = {_split(labels.get("model", "")): value for labels, value in holding}
    arrived, cost, computed = _placed(started), _placed(service), _placed(busy)
    queued, under_way, counted = _placed(waiting), _placed(running), _placed(replicas)
    loads = {
        place: Load(
            arrivals=max(0.0, arrived.get(place, 0.0) - refusals.get(place, 0.0)),
            service_seconds=cost.get(place, 0.0),
            busy=computed.get(place, 0.0),
            waiting=queued.get(place, 0.0),
            # What gateways hold stands apart, as `load` takes it from two sides.
            held=0.0,
            running=under_way.get(place, 0.0),
        )
        for place in counted
    }
    return Signals(loads=loads, replicas={place: int(count) for place, count in counted.items()}, held=held)


async def held(session: aiohttp.ClientSession, gateways: str) -> dict[Place, float]:
    """Requests that gateways hold, of models that have any, as the gateways say themselves. One that does not answer counts as none.

    Args:
        gateways: host:port of their /metrics; every address that the host has is asked.
    """
    host, _, port = gateways.rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        _log.warning("gateways are not found; only Prometheus knows what they hold", host=host, error=str(error))
        return {}
    addresses = sorted({str(address[0]) for *_, address in found})
    total: dict[Place, float] = {}
    for said in await asyncio.gather(*(_said(session, address, port) for address in addresses)):
        for model, count in said.items():
            if count > 0:
                place = _split(model)
                total[place] = total.get(place, 0.0) + count
    return total


async def _said(session: aiohttp.ClientSession, address: str, port: str) -> dict[str, float]:
    host = f"[{address}]" if ":" in address else address
    try:
        timeout = aiohttp.ClientTimeout(total=_GATEWAY_SECONDS)
        async with session.get(f"http://{host}:{port}/metrics", timeout=timeout) as response:
            return scrapes.held(await response.text())
    except (aiohttp.ClientError, TimeoutError, ValueError, LookupError) as error:
        _log.warning("a gateway does not say what it holds", at=host, error=str(error) or type(error).__name__)
        return {}


def _placed(samples: list[tuple[dict[str, str], float]]) -> dict[Place, float]:
    return {(labels.get("namespace", ""), labels.get("model", "")): value for labels, value in samples}


def _split(model: str) -> Place:
    namespace, _, name = model.rpartition("/")
    return namespace, name


async def _query(session: aiohttp.ClientSession, url: str, promql: str) -> list[tuple[dict[str, str], float]]:
    try:
        timeout = aiohttp.ClientTimeout(total=_SECONDS)
        async with session.get(f"{url}/api/v1/query", params={"query": promql}, timeout=timeout) as response:
            answer: Any = await response.json(content_type=None)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise UnavailableError(f"Prometheus at {url} does not answer: {error or type(error).__name__}.") from None
    try:
        if answer["status"] != "success":
            raise UnavailableError(f"Prometheus at {url} refuses a query: {answer.get('error', answer)}.")
        return [(sample["metric"], float(sample["value"][1])) for sample in answer["data"]["result"]]
    except (LookupError, TypeError, AttributeError, ValueError):
        raise UnavailableError(f"What answers at {url} is no Prometheus: {str(answer)[:200]}.") from None
