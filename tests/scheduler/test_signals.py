"""What of the signals is counted to whom."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from latentflow_scheduler.policy import Load
from latentflow_scheduler.signals import Place, Signals

places = st.tuples(st.just("art"), st.sampled_from("abcdef"))
HOST: Place = ("art", "denoiser")


@given(st.dictionaries(places, st.integers(1, 9).map(float)), st.sets(places), st.booleans())
def test_what_is_held_for_models_in_another_s_pods_wakes_and_scales_that_other(
    held: dict[Place, float], companions: set[Place], awake: bool
) -> None:
    load = Load(arrivals=1.0, busy=0.5, waiting=0.0, held=0.0)
    signals = Signals(loads={HOST: load} if awake else {}, replicas={HOST: 1} if awake else {}, held=held)
    gathered = signals.gathered(dict.fromkeys(companions, HOST))
    found = gathered.of(HOST, ready=int(awake))
    assert found is not None
    assert found.held == sum(held.get(companion, 0.0) for companion in companions)
    for place in held.keys() - companions:
        alone = gathered.of(place, ready=0)
        assert alone is not None
        assert alone.held == held[place]
