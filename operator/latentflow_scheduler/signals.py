"""What a Prometheus server knows of the models' load: PromQL in, `policy.Load` out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import aiohttp
from latentflow.errors import UnavailableError

from latentflow_scheduler.policy import Load
from latentflow_scheduler.scrapes import CALLS

Place = tuple[str, str]
_SECONDS = 5.0
_CALLS = "|".join(CALLS)


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

    def of(self, place: Place, *, ready: int) -> Load | None:
        """A model's load; None where the figures do not cover the replicas that are ready.

        Args:
            ready: How many are; of a model without any, what gateways hold is all there is to know.
        """
        held = self.held.get(place, 0.0)
        if ready == 0 and place not in self.loads:
            return Load(arrivals=0.0, busy=0.0, waiting=0.0, held=held)
        if place not in self.loads or self.replicas.get(place, 0) < ready:
            return None
        return self.loads[place]


async def read(session: aiohttp.ClientSession, url: str, *, window: int) -> Signals:
    """The signals now. UnavailableError where Prometheus cannot be asked, or knows none of what it should scrape.

    Args:
        url: Of the Prometheus server. Its targets' namespace is the label `namespace`, as its own service discovery and the
            Prometheus operator have it.
        window: Seconds over which rates are taken; at least four times the scrape interval.
    """
    by_model = "sum by (namespace, model)"
    arrivals = await _query(session, url, f'{by_model}(rate(latentflow_requests_total{{call=~"{_CALLS}"}}[{window}s]))')
    busy = await _query(session, url, f"{by_model}(rate(latentflow_step_seconds_sum[{window}s]))")
    waiting = await _query(session, url, f"{by_model}(latentflow_queue_depth)")
    replicas = await _query(session, url, "count by (namespace, model)(latentflow_ready == 1)")
    holding = await _query(session, url, "sum by (model)(latentflow_gateway_held)")
    # A gateway knows a model as namespace/name.
    held = {_split(labels.get("model", "")): value for labels, value in holding}
    arrived, computed, queued, counted = _placed(arrivals), _placed(busy), _placed(waiting), _placed(replicas)
    loads = {
        place: Load(
            arrivals=arrived.get(place, 0.0),
            busy=computed.get(place, 0.0),
            waiting=queued.get(place, 0.0),
            held=held.get(place, 0.0),
        )
        for place in counted
    }
    return Signals(loads=loads, replicas={place: int(count) for place, count in counted.items()}, held=held)


def _placed(samples: list[tuple[dict[str, str], float]]) -> dict[Place, float]:
    return {(labels.get("namespace", ""), labels.get("model", "")): value for labels, value in samples}


def _split(model: str) -> Place:
    namespace, _, name = model.rpartition("/")
    return namespace, name


async def _query(session: aiohttp.ClientSession, url: str, promql: str) -> list[tuple[dict[str, str], float]]:
    try:
        timeout = aiohttp.ClientTimeout(total=_SECONDS)
        async with session.get(f"{url}/api/v1/query", params={"query": promql}, timeout=timeout) as response:
            answer: dict[str, Any] = await response.json(content_type=None)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise UnavailableError(f"Prometheus at {url} does not answer: {error or type(error).__name__}.") from None
    if answer.get("status") != "success":
        raise UnavailableError(f"Prometheus at {url} refuses a query: {answer.get('error', answer)}.")
    return [(sample["metric"], float(sample["value"][1])) for sample in answer["data"]["result"]]
