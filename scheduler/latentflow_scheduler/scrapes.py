"""A model's load from the `/metrics` texts of its processes: pure, from text to `policy.Load`.

It serves where no Prometheus server keeps history: it remembers the counters of each replica over a window and computes
rates from them. The embedded runtime reads its processes this way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from latentflow_scheduler.policy import Load

# The calls that are requests to the model. The other calls manage the server.
CALLS = ("Encode", "Denoise", "Decode", "Residuals", "Adapter")
# The code of a call that a full queue refused. Such a call is repeated, and it costs no computing.
REFUSED = "RESOURCE_EXHAUSTED"


@dataclass(frozen=True, kw_only=True)
class Scrape:
    """The counters and gauges of one replica at one time.

    Attributes:
        time: In seconds of any monotonic clock.
        started: Requests that have arrived since the process started.
        refused: Those of them that a full queue refused.
        completed: Those of them that ended in any other way.
        computed: Seconds of computing since the process started.
        queued: Requests in its queue.
        running: Requests that it computes.
    """

    time: float
    started: float
    refused: float
    completed: float
    computed: float
    queued: float
    running: float = 0.0


# The scrapes of one replica, oldest first.
History = tuple[Scrape, ...]


def parse_replica(text: str, *, time: float) -> Scrape:
    """Parses the `/metrics` text of a model server. ValueError if it is not in the metrics format."""
    samples = list(_samples(text))
    ended = [s for s in samples if s.name == "latentflow_requests_total" and s.labels["call"] in CALLS]
    refused = sum(s.value for s in ended if s.labels["code"] == REFUSED)
    started = (s for s in samples if s.name == "latentflow_requests_started_total" and s.labels["call"] in CALLS)
    return Scrape(
        time=time,
        started=sum(s.value for s in started),
        refused=refused,
        completed=sum(s.value for s in ended) - refused,
        computed=sum(s.value for s in samples if s.name == "latentflow_step_seconds_sum"),
        queued=sum(s.value for s in samples if s.name == "latentflow_queue_depth"),
        running=sum(s.value for s in samples if s.name == "latentflow_in_flight"),
    )


def parse_held(text: str) -> dict[str, float]:
    """Held requests from a gateway's `/metrics` text, by the gateway's name of the model.

    ValueError as `parse_replica`.
    """
    found: dict[str, float] = {}
    for sample in _samples(text):
        if sample.name == "latentflow_gateway_held":
            model = sample.labels.get("model", "")
            found[model] = found.get(model, 0.0) + sample.value
    return found


def extended(history: History, scrape: Scrape, *, window: float) -> History:
    """The history with one more scrape and without those that rates over `window` seconds no longer need.

    Args:
        scrape: Later than every scrape of the history.
    """
    start = scrape.time - window
    before = [one for one in history if one.time <= start]
    return (*before[-1:], *(one for one in history if one.time > start), scrape)


def load(histories: Mapping[str, History], *, ready: Collection[str], now: float, held: float) -> Load | None:
    """A model's load; None if a ready replica has no scrape of this time.

    Args:
        histories: By replica.
        ready: The ready replicas. Of a model that has none, only `held` is known.
        now: The time of the present scrapes.
        held: Requests that gateways hold.
    """
    known = [histories.get(name, ()) for name in ready]
    if not all(history and history[-1].time == now for history in known):
        return None
    completed = [_rate(history, [one.completed for one in history]) for history in known]
    # A step is counted when it completes. One that is longer than the history would show as more than 100% of the time.
    busy = [min(1.0, _rate(history, [one.computed for one in history])) for history in known]
    # A replica that has not completed a request yet has already computed for some. It is left out of the cost per
    # request.
    costs = [computed for computed, count in zip(busy, completed, strict=True) if count > 0]
    return Load(
        arrival_rate=sum(_arrival_rate(history) for history in known),
        service_seconds=sum(costs) / sum(completed) if costs else 0.0,
        busy=sum(busy),
        queued=sum(history[-1].queued for history in known),
        running=sum(history[-1].running for history in known),
        held=held,
    )


def _arrival_rate(history: History) -> float:
    # Each counter by itself: their difference decreases with every refusal, which would look like a restart.
    started, refused = [one.started for one in history], [one.refused for one in history]
    return max(0.0, _rate(history, started) - _rate(history, refused))


def _rate(history: History, counter: list[float]) -> float:
    """Increase of a counter per second; 0 for a single scrape."""
    seconds = history[-1].time - history[0].time
    # A counter that decreased was reset by a restart: its whole value has accumulated since then.
    increase = sum(after - before if after >= before else after for before, after in pairwise(counter))
    return increase / seconds if seconds > 0 else 0.0


def _samples(text: str) -> Iterator[Sample]:
    for family in text_string_to_metric_families(text):
        yield from family.samples
