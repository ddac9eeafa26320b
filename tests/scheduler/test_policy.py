"""How many replicas the policy decides on for a load, in virtual time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentflow_scheduler.policy import Bounds, Decision, Load, Settings, State, decide, demand

SETTINGS = Settings()
INTERVAL = 10.0
IDLE = Load(arrival_rate=0, service_seconds=0, busy=0, queued=0, held=0)


def steady(rate: float, seconds: float, *, queued: float = 0) -> Load:
    return Load(arrival_rate=rate, service_seconds=seconds, busy=rate * seconds, queued=queued, held=0)


@dataclass
class Model:
    """A model that is scaled as the policy decides, every ten seconds."""

    bounds: Bounds = field(default_factory=lambda: Bounds(minimum=1, maximum=10))
    current: int = 1
    now: float = 1000.0
    state: State = field(default_factory=State)

    def apply(self, load: Load | None, *, seconds: float = INTERVAL) -> Decision:
        """Applies the load for a number of seconds and returns the last decision."""
        for _ in range(math.ceil(seconds / INTERVAL)):
            self.now += INTERVAL
            decision, self.state = decide(
                load, current=self.current, bounds=self.bounds, state=self.state, now=self.now, settings=SETTINGS
            )
            self.current = decision.replicas
        return decision


def test_replicas_are_arrival_rate_times_service_time_over_target_utilization() -> None:
    model = Model()
    assert model.apply(steady(4.0, 0.5)).replicas == math.ceil(2.0 / 0.7)


def test_the_reason_states_the_figures_in_one_line() -> None:
    reason = Model().apply(steady(4.0, 0.5, queued=6)).reason
    assert reason == "up to 4: 4.00/s × 0.50 s, load 2.00, 6 queued, target utilization 70%"


def test_queued_requests_add_their_computing_time_over_the_backlog_seconds() -> None:
    load = steady(1.0, 0.5, queued=40)
    assert demand(load, SETTINGS) == pytest.approx(0.5 + 40 * 0.5 / 20)


def test_replicas_that_clear_a_backlog_do_not_raise_the_demand() -> None:
    draining = Load(arrival_rate=2.0, service_seconds=1.0, busy=4.0, queued=2, held=0)
    assert demand(draining, SETTINGS) == pytest.approx(2.0 + 2 * 1.0 / 20)
    drained = Load(arrival_rate=2.0, service_seconds=1.0, busy=4.0, queued=0, held=0)
    assert demand(drained, SETTINGS) == pytest.approx(2.0)


def test_a_load_above_capacity_raises_the_number_of_replicas_at_once() -> None:
    model = Model()
    assert model.apply(Load(arrival_rate=6.0, service_seconds=0.5, busy=1.0, queued=10, held=0)).replicas == math.ceil(
        3.25 / 0.7
    )


def test_with_an_empty_queue_the_demand_is_at_most_what_is_computed() -> None:
    few_long_requests = Load(arrival_rate=0.2, service_seconds=15.0, busy=1.5, queued=0, held=0)
    assert demand(few_long_requests, SETTINGS) == pytest.approx(1.5)


def test_before_the_first_request_completes_the_demand_is_what_is_computed() -> None:
    assert demand(Load(arrival_rate=0.1, service_seconds=0, busy=0.9, queued=0, held=0), SETTINGS) == pytest.approx(0.9)


def test_replicas_that_compute_requests_longer_than_the_window_are_kept() -> None:
    model = Model(current=3)
    no_recent_arrivals = Load(arrival_rate=0, service_seconds=200.0, busy=3.0, queued=0, held=0, running=3)
    assert model.apply(no_recent_arrivals, seconds=3 * SETTINGS.down_seconds).replicas == 3


def test_replicas_that_still_clear_a_backlog_are_neither_added_nor_removed() -> None:
    model = Model(current=5)
    drained = Load(arrival_rate=2.0, service_seconds=1.0, busy=5.0, queued=0, held=0)
    assert model.apply(drained, seconds=3 * SETTINGS.down_seconds).replicas == 5
    assert model.apply(steady(2.0, 1.0), seconds=2 * SETTINGS.down_seconds).replicas == 3


def test_added_replicas_get_time_to_start_before_more_are_added() -> None:
    model = Model()
    assert model.apply(steady(2.0, 0.5)).replicas == 2
    assert model.apply(steady(8.0, 0.5)).replicas == 2
    assert model.apply(steady(8.0, 0.5), seconds=SETTINGS.up_seconds).replicas == math.ceil(4 / 0.7)


def test_replicas_are_removed_only_after_fewer_were_enough_for_some_time() -> None:
    model = Model(current=5)
    model.apply(steady(1.0, 0.5), seconds=SETTINGS.down_seconds - INTERVAL)
    assert model.current == 5
    model.apply(steady(1.0, 0.5), seconds=2 * INTERVAL)
    assert model.current == 1


def test_a_pause_between_two_bursts_removes_no_replica() -> None:
    model = Model(current=4)
    for _ in range(5):
        model.apply(steady(1.0, 0.5), seconds=SETTINGS.down_seconds - 2 * INTERVAL)
        model.apply(steady(5.0, 0.5))
    assert model.current == 4


def test_a_scale_down_keeps_the_largest_number_wanted_in_the_meantime() -> None:
    model = Model(current=6)
    model.apply(steady(1.0, 0.5), seconds=60)
    model.apply(steady(3.0, 0.5))
    model.apply(steady(1.0, 0.5), seconds=60)
    assert model.current == math.ceil(1.5 / 0.7)


def test_without_signals_the_replicas_stay_and_the_scale_down_period_restarts() -> None:
    model = Model(current=5)
    model.apply(IDLE, seconds=SETTINGS.down_seconds - INTERVAL)
    assert model.apply(None, seconds=1000).reason == "holding: no signals"
    assert model.current == 5
    model.apply(IDLE, seconds=SETTINGS.down_seconds - INTERVAL)
    assert model.current == 5


def test_a_model_with_minimum_zero_loses_its_last_replica_when_idle_for_long() -> None:
    model = Model(bounds=Bounds(minimum=0, maximum=3))
    model.apply(steady(0.1, 0.5))
    model.apply(IDLE, seconds=SETTINGS.idle_seconds - INTERVAL)
    assert model.current == 1
    model.apply(IDLE, seconds=SETTINGS.down_seconds + 2 * INTERVAL)
    assert model.current == 0


def test_a_held_request_wakes_a_model_without_replicas_at_once() -> None:
    model = Model(
        bounds=Bounds(minimum=0, maximum=3), current=0, state=State(last_scale_up_at=999.0, last_request_at=500.0)
    )
    assert model.apply(Load(arrival_rate=0, service_seconds=0, busy=0, queued=0, held=1)).replicas == 1


@st.composite
def loads(draw: st.DrawFn) -> Load | None:
    if draw(st.booleans()):
        number = st.floats(0, 100)
        return Load(
            arrival_rate=draw(number),
            service_seconds=draw(number),
            busy=draw(number),
            queued=draw(number),
            held=draw(number),
        )
    return draw(st.sampled_from([None, IDLE]))


@given(
    st.lists(loads(), min_size=1, max_size=40),
    st.integers(0, 3),
    st.integers(1, 8),
    st.integers(0, 12),
)
def test_under_any_load_the_bounds_hold_and_missing_signals_remove_no_replica(
    observed: list[Load | None], fewest: int, more: int, current: int
) -> None:
    model = Model(bounds=Bounds(minimum=fewest, maximum=fewest + more), current=current)
    for load in observed:
        before = model.current
        decision = model.apply(load)
        assert fewest <= decision.replicas <= fewest + more
        if load is None and fewest <= before <= fewest + more:
            assert decision.replicas == before
        assert decision.reason


@given(st.floats(0.01, 50), st.floats(0.01, 5), st.floats(0, 100))
def test_a_higher_load_never_needs_fewer_replicas(rate: float, seconds: float, queued: float) -> None:
    some, more = steady(rate, seconds, queued=queued), steady(rate * 1.5, seconds, queued=queued)
    bounds = Bounds(minimum=1, maximum=1000)
    assert Model(bounds=bounds).apply(some).replicas <= Model(bounds=bounds).apply(more).replicas


def test_requests_in_their_first_step_do_not_count_as_idle_time() -> None:
    model = Model(bounds=Bounds(minimum=0, maximum=4), current=2)
    long_steps = Load(arrival_rate=0, service_seconds=0, busy=0, queued=0, held=0, running=2)
    assert model.apply(long_steps, seconds=SETTINGS.idle_seconds + SETTINGS.down_seconds).replicas == 2
    assert model.apply(IDLE, seconds=2 * SETTINGS.down_seconds).replicas == 1
