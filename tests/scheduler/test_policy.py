"""How many replicas a model's load asks for, in virtual time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentflow_scheduler.policy import Bounds, Decision, Load, Settings, State, decide, demand

SETTINGS = Settings()
INTERVAL = 10.0
QUIET = Load(arrivals=0, service_seconds=0, busy=0, waiting=0, held=0)


def steady(rate: float, seconds: float, *, waiting: float = 0) -> Load:
    return Load(arrivals=rate, service_seconds=seconds, busy=rate * seconds, waiting=waiting, held=0)


@dataclass
class Model:
    """A model that is scaled as decided, asked every ten seconds."""

    bounds: Bounds = field(default_factory=lambda: Bounds(fewest=1, most=10))
    current: int = 1
    now: float = 1000.0
    state: State = field(default_factory=State)

    def see(self, load: Load | None, *, seconds: float = INTERVAL) -> Decision:
        """The last decision after so many seconds of a load."""
        for _ in range(math.ceil(seconds / INTERVAL)):
            self.now += INTERVAL
            decision, self.state = decide(
                load, current=self.current, bounds=self.bounds, state=self.state, now=self.now, settings=SETTINGS
            )
            self.current = decision.replicas
        return decision


def test_replicas_are_rate_times_service_time_over_how_full_one_may_be() -> None:
    model = Model()
    assert model.see(steady(4.0, 0.5)).replicas == math.ceil(2.0 / 0.7)


def test_the_reason_says_the_figures_in_one_line() -> None:
    reason = Model().see(steady(4.0, 0.5, waiting=6)).reason
    assert reason == "up to 4: 4.00/s × 0.50 s, 2.00 replicas' work, 6 waiting, at 70% each"


def test_who_waits_counts_by_the_time_it_may_take_to_work_them_off() -> None:
    load = steady(1.0, 0.5, waiting=40)
    assert demand(load, SETTINGS) == pytest.approx(0.5 + 40 * 0.5 / 20)


def test_replicas_that_work_off_a_backlog_ask_for_no_more_than_the_requests_that_come() -> None:
    draining = Load(arrivals=2.0, service_seconds=1.0, busy=4.0, waiting=2, held=0)
    assert demand(draining, SETTINGS) == pytest.approx(2.0 + 2 * 1.0 / 20)
    drained = Load(arrivals=2.0, service_seconds=1.0, busy=4.0, waiting=0, held=0)
    assert demand(drained, SETTINGS) == pytest.approx(2.0)


def test_more_than_the_replicas_can_do_is_asked_for_at_once() -> None:
    model = Model()
    assert model.see(Load(arrivals=6.0, service_seconds=0.5, busy=1.0, waiting=10, held=0)).replicas == math.ceil(
        3.25 / 0.7
    )


def test_while_nobody_waits_no_more_is_asked_for_than_is_computed() -> None:
    few_long_ones = Load(arrivals=0.2, service_seconds=15.0, busy=1.5, waiting=0, held=0)
    assert demand(few_long_ones, SETTINGS) == pytest.approx(1.5)


def test_before_the_first_request_has_ended_what_is_computed_counts() -> None:
    assert demand(Load(arrivals=0.1, service_seconds=0, busy=0.9, waiting=0, held=0), SETTINGS) == pytest.approx(0.9)


def test_replicas_that_compute_requests_longer_than_the_rates_window_stay() -> None:
    model = Model(current=3)
    none_came_lately = Load(arrivals=0, service_seconds=200.0, busy=3.0, waiting=0, held=0, running=3)
    assert model.see(none_came_lately, seconds=3 * SETTINGS.down_seconds).replicas == 3


def test_replicas_that_still_work_off_a_backlog_neither_grow_nor_go() -> None:
    model = Model(current=5)
    drained = Load(arrivals=2.0, service_seconds=1.0, busy=5.0, waiting=0, held=0)
    assert model.see(drained, seconds=3 * SETTINGS.down_seconds).replicas == 5
    assert model.see(steady(2.0, 1.0), seconds=2 * SETTINGS.down_seconds).replicas == 3


def test_what_was_added_gets_time_to_start_before_more_is_added() -> None:
    model = Model()
    assert model.see(steady(2.0, 0.5)).replicas == 2
    assert model.see(steady(8.0, 0.5)).replicas == 2
    assert model.see(steady(8.0, 0.5), seconds=SETTINGS.up_seconds).replicas == math.ceil(4 / 0.7)


def test_replicas_go_only_when_fewer_have_done_for_a_while() -> None:
    model = Model(current=5)
    model.see(steady(1.0, 0.5), seconds=SETTINGS.down_seconds - INTERVAL)
    assert model.current == 5
    model.see(steady(1.0, 0.5), seconds=2 * INTERVAL)
    assert model.current == 1


def test_a_pause_between_two_bursts_takes_no_replica() -> None:
    model = Model(current=4)
    for _ in range(5):
        model.see(steady(1.0, 0.5), seconds=SETTINGS.down_seconds - 2 * INTERVAL)
        model.see(steady(5.0, 0.5))
    assert model.current == 4


def test_it_goes_down_to_the_most_that_was_wanted_meanwhile() -> None:
    model = Model(current=6)
    model.see(steady(1.0, 0.5), seconds=60)
    model.see(steady(3.0, 0.5))
    model.see(steady(1.0, 0.5), seconds=60)
    assert model.current == math.ceil(1.5 / 0.7)


def test_without_signals_what_is_stays_and_is_counted_anew() -> None:
    model = Model(current=5)
    model.see(QUIET, seconds=SETTINGS.down_seconds - INTERVAL)
    assert model.see(None, seconds=1000).reason == "holding: no signals"
    assert model.current == 5
    model.see(QUIET, seconds=SETTINGS.down_seconds - INTERVAL)
    assert model.current == 5


def test_a_model_that_may_have_none_loses_its_last_replica_when_nobody_has_asked_for_long() -> None:
    model = Model(bounds=Bounds(fewest=0, most=3))
    model.see(steady(0.1, 0.5))
    model.see(QUIET, seconds=SETTINGS.idle_seconds - INTERVAL)
    assert model.current == 1
    model.see(QUIET, seconds=SETTINGS.down_seconds + 2 * INTERVAL)
    assert model.current == 0


def test_a_held_request_wakes_a_model_that_has_none_at_once() -> None:
    model = Model(bounds=Bounds(fewest=0, most=3), current=0, state=State(added=999.0, asked=500.0))
    assert model.see(Load(arrivals=0, service_seconds=0, busy=0, waiting=0, held=1)).replicas == 1


@st.composite
def loads(draw: st.DrawFn) -> Load | None:
    if draw(st.booleans()):
        number = st.floats(0, 100)
        return Load(
            arrivals=draw(number),
            service_seconds=draw(number),
            busy=draw(number),
            waiting=draw(number),
            held=draw(number),
        )
    return draw(st.sampled_from([None, QUIET]))


@given(
    st.lists(loads(), min_size=1, max_size=40),
    st.integers(0, 3),
    st.integers(1, 8),
    st.integers(0, 12),
)
def test_whatever_is_seen_the_bounds_hold_and_missing_signals_take_nothing(
    seen: list[Load | None], fewest: int, more: int, current: int
) -> None:
    model = Model(bounds=Bounds(fewest=fewest, most=fewest + more), current=current)
    for load in seen:
        before = model.current
        decision = model.see(load)
        assert fewest <= decision.replicas <= fewest + more
        if load is None and fewest <= before <= fewest + more:
            assert decision.replicas == before
        assert decision.reason


@given(st.floats(0.01, 50), st.floats(0.01, 5), st.floats(0, 100))
def test_more_work_never_wants_fewer_replicas(rate: float, seconds: float, waiting: float) -> None:
    some, more = steady(rate, seconds, waiting=waiting), steady(rate * 1.5, seconds, waiting=waiting)
    bounds = Bounds(fewest=1, most=1000)
    assert Model(bounds=bounds).see(some).replicas <= Model(bounds=bounds).see(more).replicas


def test_requests_whose_first_step_has_not_ended_are_no_idle_time() -> None:
    model = Model(bounds=Bounds(fewest=0, most=4), current=2)
    long_steps = Load(arrivals=0, service_seconds=0, busy=0, waiting=0, held=0, running=2)
    assert model.see(long_steps, seconds=SETTINGS.idle_seconds + SETTINGS.down_seconds).replicas == 2
    assert model.see(QUIET, seconds=2 * SETTINGS.down_seconds).replicas == 1
