"""When a model's load is known from the signals, and when it is unknown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentflow.internal.metrics import GATEWAY, Instruments
from latentflow_scheduler import scrapes
from latentflow_scheduler.policy import Load
from latentflow_scheduler.signals import ModelKey, Signals, held_by_host, load
from prometheus_client import generate_latest

MODEL = ("art", "denoiser-1")
BUSY = Load(arrival_rate=2.0, service_seconds=0.5, busy=1.0, queued=3.0, held=0.0)


def signals(*, replicas: int = 2, held: float = 0.0) -> Signals:
    return Signals(loads={MODEL: BUSY}, replicas={MODEL: replicas}, held={MODEL: held})


def test_signals_that_do_not_cover_every_ready_replica_leave_the_load_unknown() -> None:
    assert load(signals(replicas=2), {}, MODEL, ready=2, current=3) == BUSY
    assert load(signals(replicas=1), {}, MODEL, ready=2, current=3) is None


@pytest.mark.parametrize(("from_prometheus", "from_gateways"), [(4.0, 1.0), (1.0, 4.0)])
def test_of_prometheus_and_gateways_the_larger_number_of_held_requests_counts(
    from_prometheus: float, from_gateways: float
) -> None:
    found = load(signals(held=from_prometheus), {MODEL: from_gateways}, MODEL, ready=2, current=2)
    assert found is not None
    assert found.held == 4.0


def test_held_requests_of_a_model_without_replicas_are_known_without_prometheus() -> None:
    found = load(None, {MODEL: 1.0}, MODEL, ready=0, current=0)
    assert found == Load(arrival_rate=0.0, service_seconds=0.0, busy=0.0, queued=0.0, held=1.0)


def test_without_prometheus_the_load_of_a_model_with_replicas_is_unknown() -> None:
    assert load(None, {MODEL: 1.0}, MODEL, ready=1, current=1) is None
    assert load(None, {}, MODEL, ready=0, current=0) is None


def test_replicas_that_have_not_been_scraped_yet_do_not_count_as_idle() -> None:
    nothing = Signals(loads={}, replicas={}, held={})
    assert load(nothing, {}, MODEL, ready=0, current=3) is None
    assert load(nothing, {}, MODEL, ready=0, current=0) == Load(
        arrival_rate=0.0, service_seconds=0.0, busy=0.0, queued=0.0, held=0.0
    )


def test_held_requests_are_read_from_a_gateway_s_metrics() -> None:
    gateway = Instruments(GATEWAY)
    gateway.of("latentflow_gateway_held", model="art/denoiser-1").set(2)
    gateway.of("latentflow_gateway_held", model="art/vae-1").set(0)
    gateway.of("latentflow_gateway_in_flight", workflow="art/shapes").set(7)
    assert scrapes.parse_held(generate_latest(gateway.registry).decode()) == {"art/denoiser-1": 2.0, "art/vae-1": 0.0}


keys = st.tuples(st.just("art"), st.sampled_from("abcdef"))


@given(st.dictionaries(keys, st.integers(1, 9).map(float)), st.sets(keys))
def test_held_requests_of_colocated_models_count_for_their_host(
    held: dict[ModelKey, float], colocated: set[ModelKey]
) -> None:
    found = held_by_host(held, dict.fromkeys(colocated, MODEL))
    assert found.get(MODEL, 0.0) == sum(held.get(colocated_model, 0.0) for colocated_model in colocated)
    assert found.keys() - {MODEL} == held.keys() - colocated
    assert all(found[key] == held[key] for key in held.keys() - colocated)
