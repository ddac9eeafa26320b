"""What is known of a model's load, and what counts as not known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentflow.internal.metrics import GATEWAY, Instruments
from latentflow_scheduler import scrapes
from latentflow_scheduler.policy import Load
from latentflow_scheduler.signals import Place, Signals, gathered, load
from prometheus_client import generate_latest

PLACE = ("art", "denoiser-1")
BUSY = Load(arrivals=2.0, service_seconds=0.5, busy=1.0, waiting=3.0, held=0.0)


def known(*, replicas: int = 2, held: float = 0.0) -> Signals:
    return Signals(loads={PLACE: BUSY}, replicas={PLACE: replicas}, held={PLACE: held})


def test_figures_that_do_not_cover_every_ready_replica_are_no_figures() -> None:
    assert load(known(replicas=2), {}, PLACE, ready=2, current=3) == BUSY
    assert load(known(replicas=1), {}, PLACE, ready=2, current=3) is None


@pytest.mark.parametrize(("by_prometheus", "by_gateways"), [(4.0, 1.0), (1.0, 4.0)])
def test_of_what_gateways_and_prometheus_say_is_held_the_larger_counts(
    by_prometheus: float, by_gateways: float
) -> None:
    found = load(known(held=by_prometheus), {PLACE: by_gateways}, PLACE, ready=2, current=2)
    assert found is not None
    assert found.held == 4.0


def test_of_a_model_without_replicas_what_gateways_hold_is_known_without_prometheus() -> None:
    found = load(None, {PLACE: 1.0}, PLACE, ready=0, current=0)
    assert found == Load(arrivals=0.0, service_seconds=0.0, busy=0.0, waiting=0.0, held=1.0)


def test_without_prometheus_nothing_is_known_of_a_model_that_has_replicas() -> None:
    assert load(None, {PLACE: 1.0}, PLACE, ready=1, current=1) is None
    assert load(None, {}, PLACE, ready=0, current=0) is None


def test_replicas_that_have_not_been_scraped_yet_are_no_idle_ones() -> None:
    nothing = Signals(loads={}, replicas={}, held={})
    assert load(nothing, {}, PLACE, ready=0, current=3) is None
    assert load(nothing, {}, PLACE, ready=0, current=0) == Load(
        arrivals=0.0, service_seconds=0.0, busy=0.0, waiting=0.0, held=0.0
    )


def test_what_a_gateway_holds_is_read_from_its_metrics() -> None:
    gateway = Instruments(GATEWAY)
    gateway.of("latentflow_gateway_held", model="art/denoiser-1").set(2)
    gateway.of("latentflow_gateway_held", model="art/vae-1").set(0)
    gateway.of("latentflow_gateway_in_flight", workflow="art/shapes").set(7)
    assert scrapes.held(generate_latest(gateway.registry).decode()) == {"art/denoiser-1": 2.0, "art/vae-1": 0.0}


places = st.tuples(st.just("art"), st.sampled_from("abcdef"))


@given(st.dictionaries(places, st.integers(1, 9).map(float)), st.sets(places))
def test_what_is_held_for_models_in_another_s_pods_is_counted_to_that_other(
    held: dict[Place, float], companions: set[Place]
) -> None:
    found = gathered(held, dict.fromkeys(companions, PLACE))
    assert found.get(PLACE, 0.0) == sum(held.get(companion, 0.0) for companion in companions)
    assert found.keys() - {PLACE} == held.keys() - companions
    assert all(found[place] == held[place] for place in held.keys() - companions)
