"""The load of all models from a Prometheus server and from the gateways: PromQL results in, `policy.Load` out.

Held requests are also read from the gateways directly, so that a model without replicas is woken while Prometheus is
unavailable, and before its next scrape.
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
from latentflow.internal import hosts

from latentflow_scheduler import scrapes
from latentflow_scheduler.policy import Load

# Namespace and name of a model.
ModelKey = tuple[str, str]
_log = structlog.get_logger()
_TIMEOUT_SECONDS = 5.0
# Short: gateways are in the same cluster, and a held request waits for the answer.
_GATEWAY_TIMEOUT_SECONDS = 2.0
_CALLS = "|".join(scrapes.CALLS)


@dataclass(frozen=True, kw_only=True)
class Signals:
    """The signals of all models at one time.

    Attributes:
        replicas: How many replicas each load covers.
        held: Requests that gateways hold, for models without replicas too.
    """

    loads: dict[ModelKey, Load]
    replicas: dict[ModelKey, int]
    held: dict[ModelKey, float]


def load(
    signals: Signals | None, held: Mapping[ModelKey, float], model: ModelKey, *, ready: int, current: int
) -> Load | None:
    """The load of a model; None if it is unknown, or if it does not cover every ready replica.

    Args:
        signals: None if Prometheus is unavailable.
        held: Held requests as the gateways report them.
        ready: Ready replicas.
        current: Replicas that the model should have. If it should have none, the held requests are its whole load.
    """
    held_requests = max(held.get(model, 0.0), signals.held.get(model, 0.0) if signals else 0.0)
    if signals is None or model not in signals.loads:
        if current == 0 and (held_requests or signals is not None):
            return Load(arrival_rate=0.0, service_seconds=0.0, busy=0.0, queued=0.0, held=held_requests)
        return None
    if signals.replicas.get(model, 0) < ready:
        return None
    return replace(signals.loads[model], held=held_requests)


def held_by_host(held: Mapping[ModelKey, float], hosts: Mapping[ModelKey, ModelKey]) -> dict[ModelKey, float]:
    """Held requests with those of colocated models added to their hosts, because only a host can be scaled.

    Args:
        hosts: The model in whose pods a colocated model runs.
    """
    total: dict[ModelKey, float] = {}
    for model, count in held.items():
        host = hosts.get(model, model)
        total[host] = total.get(host, 0.0) + count
    return total


async def read(session: aiohttp.ClientSession, url: str, *, window: int) -> Signals:
    """Reads the present signals. UnavailableError if the Prometheus server does not answer, or answers with an error.

    Args:
        url: The Prometheus server. The namespace of a target is its label `namespace`, which Prometheus' service
            discovery and the Prometheus operator set.
        window: Seconds over which rates are computed; at least four times the scrape interval.
    """
    by_model = "sum by (namespace, model)"
    calls, by_replica = f'call=~"{_CALLS}"', "sum by (namespace, model, instance)"
    started = await _query(session, url, f"{by_model}(rate(latentflow_requests_started_total{{{calls}}}[{window}s]))")
    refused = f'{by_model}(rate(latentflow_requests_total{{{calls},code="{scrapes.REFUSED}"}}[{window}s]))'
    refusals = _by_model(await _query(session, url, refused))
    # A step is counted when it completes. One that is longer than the window would show as more than 100% of the time.
    computing = f"clamp_max({by_replica}(rate(latentflow_step_seconds_sum[{window}s])), 1)"
    busy = await _query(session, url, f"{by_model}({computing})")
    # A replica that has not completed a request yet has already computed for some. It is left out of the cost per
    # request.
    completed = f'({by_replica}(rate(latentflow_requests_total{{{calls},code!="{scrapes.REFUSED}"}}[{window}s])) > 0)'
    service = await _query(session, url, f"{by_model}({computing} and {completed}) / {by_model}({completed})")
    queued = await _query(session, url, f"{by_model}(latentflow_queue_depth)")
    running = await _query(session, url, f"{by_model}(latentflow_in_flight)")
    replicas = await _query(session, url, "count by (namespace, model)(latentflow_ready == 1)")
    holding = await _query(session, url, "sum by (model)(latentflow_gateway_held)")
    # A gateway names a model namespace/name.
    held = {_split(labels.get("model", "")): value for labels, value in holding}
    arrivals, cost, computed = _by_model(started), _by_model(service), _by_model(busy)
    in_queue, in_flight, counted = _by_model(queued), _by_model(running), _by_model(replicas)
    loads = {
        model: Load(
            arrival_rate=max(0.0, arrivals.get(model, 0.0) - refusals.get(model, 0.0)),
            service_seconds=cost.get(model, 0.0),
            busy=computed.get(model, 0.0),
            queued=in_queue.get(model, 0.0),
            # `load` adds the held requests, which it takes from two sources.
            held=0.0,
            running=in_flight.get(model, 0.0),
        )
        for model in counted
    }
    return Signals(loads=loads, replicas={model: int(count) for model, count in counted.items()}, held=held)


async def held(session: aiohttp.ClientSession, gateways: str) -> dict[ModelKey, float]:
    """Reads the held requests from the gateways, for models that have any.

    A gateway that does not answer counts as none.

    Args:
        gateways: host:port of their `/metrics`; every address that the host name resolves to is read.
    """
    host, port = hosts.split(gateways)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        _log.warning("gateways not found; held requests are read from Prometheus only", host=host, error=str(error))
        return {}
    addresses = sorted({str(address[0]) for *_, address in found})
    total: dict[ModelKey, float] = {}
    for counts in await asyncio.gather(*(_held_by(session, hosts.join(one, port)) for one in addresses)):
        for name, count in counts.items():
            if count > 0:
                model = _split(name)
                total[model] = total.get(model, 0.0) + count
    return total


async def _held_by(session: aiohttp.ClientSession, address: str) -> dict[str, float]:
    try:
        timeout = aiohttp.ClientTimeout(total=_GATEWAY_TIMEOUT_SECONDS)
        async with session.get(f"http://{address}/metrics", timeout=timeout) as response:
            return scrapes.parse_held(await response.text())
    except (aiohttp.ClientError, TimeoutError, ValueError, LookupError) as error:
        _log.warning(
            "a gateway's held requests could not be read", address=address, error=str(error) or type(error).__name__
        )
        return {}


def _by_model(samples: list[tuple[dict[str, str], float]]) -> dict[ModelKey, float]:
    return {(labels.get("namespace", ""), labels.get("model", "")): value for labels, value in samples}


def _split(model: str) -> ModelKey:
    namespace, _, name = model.rpartition("/")
    return namespace, name


async def _query(session: aiohttp.ClientSession, url: str, promql: str) -> list[tuple[dict[str, str], float]]:
    try:
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS)
        async with session.get(f"{url}/api/v1/query", params={"query": promql}, timeout=timeout) as response:
            answer: Any = await response.json(content_type=None)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise UnavailableError(f"Prometheus at {url} does not answer: {error or type(error).__name__}.") from None
    try:
        if answer["status"] != "success":
            raise UnavailableError(f"Prometheus at {url} refused a query: {answer.get('error', answer)}.")
        return [(sample["metric"], float(sample["value"][1])) for sample in answer["data"]["result"]]
    except (LookupError, TypeError, AttributeError, ValueError):
        raise UnavailableError(f"The server at {url} is not a Prometheus server: {str(answer)[:200]}.") from None
