"""What processes say of themselves at /metrics: their text in, `policy.Load` out. Pure.

For where no Prometheus keeps what was: the counters of each replica are remembered over a window, and rates come out of
them. The embedded runtime reads its processes this way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from latentflow_scheduler.policy import Load

# The calls that are somebody's request of the model; the others are about it.
CALLS = ("Encode", "Denoise", "Decode", "Residuals", "Adapter")
# How a call ends that a full queue has refused: it comes again, and costs nothing.
REFUSED = "RESOURCE_EXHAUSTED"


@dataclass(frozen=True, kw_only=True)
class Scrape:
    """What one replica said at one time.

    Attributes:
        time: In seconds of any clock.
        started: Requests that have come since the process started.
        refused: Those of them that its full queue refused.
        ended: The others of them that have ended.
        computed: Seconds of computing since then.
        waiting: Requests that wait inside it.
        running: Requests that it computes.
    """

    time: float
    started: float
    refused: float
    ended: float
    computed: float
    waiting: float
    running: float = 0.0


# What one replica said, oldest first.
Track = tuple[Scrape, ...]


def replica(text: str, *, time: float) -> Scrape:
    """What a model server's /metrics says. ValueError where that is no text of metrics."""
    samples = list(_samples(text))
    ended = [s for s in samples if s.name == "latentflow_requests_total" and s.labels["call"] in CALLS]
    refused = sum(s.value for s in ended if s.labels["code"] == REFUSED)
    started = (s for s in samples if s.name == "latentflow_requests_started_total" and s.labels["call"] in CALLS)
    return Scrape(
        time=time,
        started=sum(s.value for s in started),
        refused=refused,
        ended=sum(s.value for s in ended) - refused,
        computed=sum(s.value for s in samples if s.name == "latentflow_step_seconds_sum"),
        waiting=sum(s.value for s in samples if s.name == "latentflow_queue_depth"),
        running=sum(s.value for s in samples if s.name == "latentflow_in_flight"),
    )


def held(text: str) -> dict[str, float]:
    """Requests that a gateway's /metrics says it holds, by model as the gateway names it. ValueError as above."""
    found: dict[str, float] = {}
    for sample in _samples(text):
        if sample.name == "latentflow_gateway_held":
            model = sample.labels.get("model", "")
            found[model] = found.get(model, 0.0) + sample.value
    return found


def longer(track: Track, scrape: Scrape, *, window: float) -> Track:
    """The track with what was said last, and without what is not needed for rates over `window` seconds.

    Args:
        scrape: Later than all of the track.
    """
    start = scrape.time - window
    before = [one for one in track if one.time <= start]
    return (*before[-1:], *(one for one in track if one.time > start), scrape)


def load(tracks: Mapping[str, Track], *, ready: Collection[str], now: float, held: float) -> Load | None:
    """A model's load; None where the figures do not cover the replicas that are ready.

    Args:
        tracks: By replica.
        ready: The replicas that are; of a model without any, what gateways hold is all there is to know.
        now: When the scrapes were made that count as this time's.
        held: Requests that gateways hold.
    """
    known = [tracks.get(name, ()) for name in ready]
    if not all(track and track[-1].time == now for track in known):
        return None
    ended = [_rate(track, [one.ended for one in track]) for track in known]
    # A step counts when it ends: one longer than the track is would show as more than all of a replica's time.
    busy = [min(1.0, _rate(track, [one.computed for one in track])) for track in known]
    # A replica that has ended none yet has computed for some already.
    ended_by = [computed for computed, count in zip(busy, ended, strict=True) if count > 0]
    return Load(
        arrivals=sum(_arrivals(track) for track in known),
        service_seconds=sum(ended_by) / sum(ended) if ended_by else 0.0,
        busy=sum(busy),
        waiting=sum(track[-1].waiting for track in known),
        running=sum(track[-1].running for track in known),
        held=held,
    )


def _arrivals(track: Track) -> float:
    # Each counter by itself: their difference goes back with every refusal, which would look like a restart.
    come, refused = [one.started for one in track], [one.refused for one in track]
    return max(0.0, _rate(track, come) - _rate(track, refused))


def _rate(track: Track, counter: list[float]) -> float:
    """A counter's growth per second; 0 where there is nothing to compare with."""
    seconds = track[-1].time - track[0].time
    # A counter that went back was set to nothing by a restart: what it says since then has come since then.
    grown = sum(after - before if after >= before else after for before, after in pairwise(counter))
    return grown / seconds if seconds > 0 else 0.0


def _samples(text: str) -> Iterator[Sample]:
    for family in text_string_to_metric_families(text):
        yield from family.samples
