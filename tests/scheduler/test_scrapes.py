"""A model's load from what its replicas say of themselves, in virtual time."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentflow.internal.metrics import GATEWAY, NODE, Instruments
from latentflow_scheduler import scrapes
from latentflow_scheduler.scrapes import Scrape, Track
from prometheus_client import generate_latest

WINDOW = 10.0


def said(
    time: float,
    *,
    requests: float = 0,
    refused: float = 0,
    ended: float | None = None,
    computed: float = 0,
    waiting: float = 0,
) -> Scrape:
    """What a replica says to which so many requests have come, all of which have ended unless told."""
    ended = requests - refused if ended is None else ended
    return Scrape(time=time, started=requests, refused=refused, ended=ended, computed=computed, waiting=waiting)


def track(seen: Iterable[Scrape]) -> Track:
    """What is remembered of a replica that said all this."""
    remembered: Track = ()
    for scrape in seen:
        remembered = scrapes.longer(remembered, scrape, window=WINDOW)
    return remembered


def steady(*, rate: float, seconds: float, until: int = 30) -> Track:
    """A replica that is asked every second."""
    return track(said(t, requests=rate * t, computed=rate * seconds * t) for t in range(until + 1))


def text(instruments: Instruments) -> str:
    return generate_latest(instruments.registry).decode()


def test_a_replica_is_read_from_the_text_of_its_metrics() -> None:
    node = Instruments(NODE, model="denoiser-1", role="Denoiser")
    for call, code, count in (
        ("Denoise", "OK", 3),
        ("Denoise", "CANCELLED", 1),
        ("Denoise", "RESOURCE_EXHAUSTED", 90),
        ("Describe", "OK", 7),
    ):
        node.of("latentflow_requests_started_total", call=call).inc(count)
        node.of("latentflow_requests_total", call=call, code=code).inc(count)
    # Two are under way.
    node.of("latentflow_requests_started_total", call="Denoise").inc(2)
    node.of("latentflow_step_seconds").observe(0.25)
    node.of("latentflow_step_seconds").observe(0.5)
    node.of("latentflow_queue_depth").set(2)
    assert scrapes.replica(text(node), time=5.0) == said(
        5.0, requests=96, refused=90, ended=4, computed=0.75, waiting=2
    )


def test_what_a_gateway_holds_is_read_by_model_as_it_names_them() -> None:
    gateway = Instruments(GATEWAY)
    gateway.of("latentflow_gateway_held", model="team/denoiser-1").set(3)
    gateway.of("latentflow_gateway_held", model="vae-2").set(0)
    assert scrapes.held(text(gateway)) == {"team/denoiser-1": 3.0, "vae-2": 0.0}


def test_what_is_no_text_of_metrics_is_refused() -> None:
    with pytest.raises(ValueError, match="could not convert"):
        scrapes.held("latentflow_gateway_held this is no number\n")


def test_the_replicas_of_a_model_add_up() -> None:
    tracks = {"one": steady(rate=2.0, seconds=0.25), "two": steady(rate=1.0, seconds=0.5)}
    load = scrapes.load(tracks, ready=["one", "two"], now=30, held=4)
    assert load is not None
    assert (load.arrivals, load.busy, load.held) == pytest.approx((3.0, 1.0, 4))


def test_rates_are_those_of_the_window() -> None:
    quiet_then_busy = [said(t) for t in range(21)] + [said(20 + t, requests=2 * t) for t in range(1, 11)]
    load = scrapes.load({"one": track(quiet_then_busy)}, ready=["one"], now=30, held=0)
    assert load is not None
    assert load.arrivals == pytest.approx(2.0)


def test_requests_count_as_they_come_and_as_they_end() -> None:
    growing = track(said(t, requests=3 * t, ended=t, computed=0.5 * t) for t in range(11))
    load = scrapes.load({"one": growing}, ready=["one"], now=10, held=0)
    assert load is not None
    assert (load.arrivals, load.service_seconds) == pytest.approx((3.0, 0.5))


def test_a_request_that_has_come_and_is_refused_later_is_no_restart_of_its_server() -> None:
    seen = [said(0, requests=1000), said(1, requests=1001, ended=1000), said(2, requests=1001, refused=1, ended=1000)]
    load = scrapes.load({"one": track(seen)}, ready=["one"], now=2, held=0)
    assert load is not None
    assert load.arrivals == 0


def test_a_replica_that_computes_its_first_request_makes_requests_no_dearer() -> None:
    tracks = {
        "old": track(said(t, requests=t, ended=t, computed=0.5 * t) for t in range(11)),
        "new": track(said(t, requests=2, ended=0, computed=t) for t in range(11)),
    }
    load = scrapes.load(tracks, ready=list(tracks), now=10, held=0)
    assert load is not None
    assert load.service_seconds == pytest.approx(0.5)
    assert load.busy == pytest.approx(1.5)


def test_what_waits_is_what_was_said_last() -> None:
    seen = [said(0, waiting=9), said(1, waiting=2)]
    load = scrapes.load({"one": track(seen)}, ready=["one"], now=1, held=0)
    assert load is not None
    assert load.waiting == 2


def test_a_ready_replica_that_did_not_answer_leaves_no_figures() -> None:
    tracks = {"one": steady(rate=2.0, seconds=0.25), "two": steady(rate=2.0, seconds=0.25, until=29)}
    assert scrapes.load(tracks, ready=["one", "two"], now=30, held=0) is None
    assert scrapes.load(tracks, ready=["one", "three"], now=30, held=0) is None


def test_a_replica_that_is_not_ready_does_not_count() -> None:
    tracks = {"one": steady(rate=2.0, seconds=0.25), "two": steady(rate=2.0, seconds=0.25)}
    load = scrapes.load(tracks, ready=["one"], now=30, held=0)
    assert load is not None
    assert load.arrivals == pytest.approx(2.0)


def test_of_a_model_without_replicas_what_gateways_hold_is_known() -> None:
    load = scrapes.load({}, ready=[], now=30, held=1)
    assert load is not None
    assert (load.arrivals, load.busy, load.waiting, load.held) == (0, 0, 0, 1)


def test_a_replica_that_has_just_become_ready_is_known_to_have_done_nothing() -> None:
    load = scrapes.load({"one": (said(30, requests=100, computed=50),)}, ready=["one"], now=30, held=0)
    assert load is not None
    assert (load.arrivals, load.busy) == (0, 0)


def test_a_restart_between_two_scrapes_counts_what_has_come_since() -> None:
    seen = [said(0, requests=50), said(1, requests=52), said(2, requests=1), said(4, requests=3)]
    load = scrapes.load({"one": track(seen)}, ready=["one"], now=4, held=0)
    assert load is not None
    assert load.arrivals == pytest.approx((2 + 1 + 2) / 4)


END = 1000.0


@st.composite
def replicas(draw: st.DrawFn) -> tuple[Track, float]:
    """A replica that is asked until `END` and restarts now and then; its true requests over what is remembered."""
    seen: list[Scrape] = []
    time, requests, computed, total = 0.0, 0.0, 0.0, 0.0
    totals = {}
    for pause in (*draw(st.lists(st.sampled_from([0.25, 1.0, 3.0, 20.0]), max_size=30)), None):
        time = END if pause is None else time + pause
        came = draw(st.integers(0, 5))
        if draw(st.integers(0, 5)) == 0:
            requests = computed = 0.0
        requests, computed, total = requests + came, computed + draw(st.floats(0, 50)), total + came
        seen.append(said(time, requests=requests, computed=computed, waiting=draw(st.integers(0, 9))))
        totals[time] = total
    remembered = track(seen)
    return remembered, total - totals[remembered[0].time]


@given(st.lists(replicas(), min_size=1, max_size=4))
def test_whatever_replicas_go_through_rates_are_never_negative_nor_more_than_what_was(
    given_replicas: list[tuple[Track, float]],
) -> None:
    tracks = {str(number): one for number, (one, _) in enumerate(given_replicas)}
    load = scrapes.load(tracks, ready=list(tracks), now=END, held=0)
    assert load is not None
    assert 0 <= load.busy <= len(tracks)
    true = sum(came / (END - one[0].time) for one, came in given_replicas if came)
    assert 0 <= load.arrivals <= true + 1e-9


@given(st.lists(st.integers(1, 9), min_size=1, max_size=50), st.integers(1, 20))
def test_what_is_remembered_covers_the_window_and_has_one_scrape_before_it_at_most(
    pauses: list[int], window: int
) -> None:
    remembered: Track = ()
    time = 0
    for pause in pauses:
        time += pause
        remembered = scrapes.longer(remembered, said(time), window=window)
        assert remembered[-1].time == time
        assert sum(one.time <= time - window for one in remembered) <= 1
        if time - pauses[0] >= window:
            assert time - remembered[0].time >= window
