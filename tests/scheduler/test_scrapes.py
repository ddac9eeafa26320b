"""A model's load from the metrics of its replicas, in virtual time."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentflow.internal.metrics import GATEWAY, NODE, Instruments
from latentflow_scheduler import scrapes
from latentflow_scheduler.scrapes import History, Scrape
from prometheus_client import generate_latest

WINDOW = 10.0


def scrape(
    time: float,
    *,
    requests: float = 0,
    refused: float = 0,
    completed: float | None = None,
    computed: float = 0,
    queued: float = 0,
) -> Scrape:
    """The scrape of a replica; all its requests have completed unless given otherwise."""
    completed = requests - refused if completed is None else completed
    return Scrape(time=time, started=requests, refused=refused, completed=completed, computed=computed, queued=queued)


def history(seen: Iterable[Scrape]) -> History:
    """What is remembered of a replica with these scrapes."""
    remembered: History = ()
    for one in seen:
        remembered = scrapes.extended(remembered, one, window=WINDOW)
    return remembered


def steady(*, rate: float, seconds: float, until: int = 30) -> History:
    """A replica that is scraped every second."""
    return history(scrape(t, requests=rate * t, computed=rate * seconds * t) for t in range(until + 1))


def text(instruments: Instruments) -> str:
    return generate_latest(instruments.registry).decode()


def test_a_replica_s_scrape_is_parsed_from_the_text_of_its_metrics() -> None:
    node = Instruments(NODE, model="denoiser-1", role="Denoiser")
    for call, code, count in (
        ("Denoise", "OK", 3),
        ("Denoise", "CANCELLED", 1),
        ("Denoise", "RESOURCE_EXHAUSTED", 90),
        ("Describe", "OK", 7),
    ):
        node.of("latentflow_requests_started_total", call=call).inc(count)
        node.of("latentflow_requests_total", call=call, code=code).inc(count)
    # Two requests run.
    node.of("latentflow_requests_started_total", call="Denoise").inc(2)
    node.of("latentflow_step_seconds").observe(0.25)
    node.of("latentflow_step_seconds").observe(0.5)
    node.of("latentflow_queue_depth").set(2)
    assert scrapes.parse_replica(text(node), time=5.0) == scrape(
        5.0, requests=96, refused=90, completed=4, computed=0.75, queued=2
    )


def test_held_requests_are_parsed_by_the_gateway_s_name_of_the_model() -> None:
    gateway = Instruments(GATEWAY)
    gateway.of("latentflow_gateway_held", model="team/denoiser-1").set(3)
    gateway.of("latentflow_gateway_held", model="vae-2").set(0)
    assert scrapes.parse_held(text(gateway)) == {"team/denoiser-1": 3.0, "vae-2": 0.0}


def test_text_that_is_not_in_the_metrics_format_is_refused() -> None:
    with pytest.raises(ValueError, match="could not convert"):
        scrapes.parse_held("latentflow_gateway_held this is no number\n")


def test_the_loads_of_a_model_s_replicas_add_up() -> None:
    histories = {"one": steady(rate=2.0, seconds=0.25), "two": steady(rate=1.0, seconds=0.5)}
    load = scrapes.load(histories, ready=["one", "two"], now=30, held=4)
    assert load is not None
    assert (load.arrival_rate, load.busy, load.held) == pytest.approx((3.0, 1.0, 4))


def test_rates_cover_the_window_only() -> None:
    quiet_then_busy = [scrape(t) for t in range(21)] + [scrape(20 + t, requests=2 * t) for t in range(1, 11)]
    load = scrapes.load({"one": history(quiet_then_busy)}, ready=["one"], now=30, held=0)
    assert load is not None
    assert load.arrival_rate == pytest.approx(2.0)


def test_arrivals_and_completed_requests_are_counted_separately() -> None:
    growing = history(scrape(t, requests=3 * t, completed=t, computed=0.5 * t) for t in range(11))
    load = scrapes.load({"one": growing}, ready=["one"], now=10, held=0)
    assert load is not None
    assert (load.arrival_rate, load.service_seconds) == pytest.approx((3.0, 0.5))


def test_a_request_that_arrives_and_is_refused_later_is_not_taken_for_a_restart() -> None:
    seen = [
        scrape(0, requests=1000),
        scrape(1, requests=1001, completed=1000),
        scrape(2, requests=1001, refused=1, completed=1000),
    ]
    load = scrapes.load({"one": history(seen)}, ready=["one"], now=2, held=0)
    assert load is not None
    assert load.arrival_rate == 0


def test_a_replica_that_computes_its_first_request_does_not_raise_service_time() -> None:
    histories = {
        "old": history(scrape(t, requests=t, completed=t, computed=0.5 * t) for t in range(11)),
        "new": history(scrape(t, requests=2, completed=0, computed=t) for t in range(11)),
    }
    load = scrapes.load(histories, ready=list(histories), now=10, held=0)
    assert load is not None
    assert load.service_seconds == pytest.approx(0.5)
    assert load.busy == pytest.approx(1.5)


def test_the_queue_is_that_of_the_last_scrape() -> None:
    seen = [scrape(0, queued=9), scrape(1, queued=2)]
    load = scrapes.load({"one": history(seen)}, ready=["one"], now=1, held=0)
    assert load is not None
    assert load.queued == 2


def test_a_ready_replica_that_did_not_answer_makes_the_load_unknown() -> None:
    histories = {"one": steady(rate=2.0, seconds=0.25), "two": steady(rate=2.0, seconds=0.25, until=29)}
    assert scrapes.load(histories, ready=["one", "two"], now=30, held=0) is None
    assert scrapes.load(histories, ready=["one", "three"], now=30, held=0) is None


def test_a_replica_that_is_not_ready_does_not_count() -> None:
    histories = {"one": steady(rate=2.0, seconds=0.25), "two": steady(rate=2.0, seconds=0.25)}
    load = scrapes.load(histories, ready=["one"], now=30, held=0)
    assert load is not None
    assert load.arrival_rate == pytest.approx(2.0)


def test_the_load_of_a_model_without_replicas_is_its_held_requests() -> None:
    load = scrapes.load({}, ready=[], now=30, held=1)
    assert load is not None
    assert (load.arrival_rate, load.busy, load.queued, load.held) == (0, 0, 0, 1)


def test_a_replica_with_a_single_scrape_has_no_arrivals_and_is_not_busy() -> None:
    load = scrapes.load({"one": (scrape(30, requests=100, computed=50),)}, ready=["one"], now=30, held=0)
    assert load is not None
    assert (load.arrival_rate, load.busy) == (0, 0)


def test_after_a_restart_between_two_scrapes_the_new_counter_counts_in_full() -> None:
    seen = [scrape(0, requests=50), scrape(1, requests=52), scrape(2, requests=1), scrape(4, requests=3)]
    load = scrapes.load({"one": history(seen)}, ready=["one"], now=4, held=0)
    assert load is not None
    assert load.arrival_rate == pytest.approx((2 + 1 + 2) / 4)


END = 1000.0


@st.composite
def replicas(draw: st.DrawFn) -> tuple[History, float]:
    """A replica that is scraped until `END` and restarts at times, and its true requests within its history."""
    seen: list[Scrape] = []
    time, requests, computed, total = 0.0, 0.0, 0.0, 0.0
    totals = {}
    for pause in (*draw(st.lists(st.sampled_from([0.25, 1.0, 3.0, 20.0]), max_size=30)), None):
        time = END if pause is None else time + pause
        came = draw(st.integers(0, 5))
        if draw(st.integers(0, 5)) == 0:
            requests = computed = 0.0
        requests, computed, total = requests + came, computed + draw(st.floats(0, 50)), total + came
        seen.append(scrape(time, requests=requests, computed=computed, queued=draw(st.integers(0, 9))))
        totals[time] = total
    remembered = history(seen)
    return remembered, total - totals[remembered[0].time]


@given(st.lists(replicas(), min_size=1, max_size=4))
def test_rates_are_never_negative_nor_higher_than_the_true_rates(
    given_replicas: list[tuple[History, float]],
) -> None:
    histories = {str(number): one for number, (one, _) in enumerate(given_replicas)}
    load = scrapes.load(histories, ready=list(histories), now=END, held=0)
    assert load is not None
    assert 0 <= load.busy <= len(histories)
    true = sum(came / (END - one[0].time) for one, came in given_replicas if came)
    assert 0 <= load.arrival_rate <= true + 1e-9


@given(st.lists(st.integers(1, 9), min_size=1, max_size=50), st.integers(1, 20))
def test_the_history_covers_the_window_with_at_most_one_earlier_scrape(pauses: list[int], window: int) -> None:
    remembered: History = ()
    time = 0
    for pause in pauses:
        time += pause
        remembered = scrapes.extended(remembered, scrape(time), window=window)
        assert remembered[-1].time == time
        assert sum(one.time <= time - window for one in remembered) <= 1
        if time - pauses[0] >= window:
            assert time - remembered[0].time >= window
