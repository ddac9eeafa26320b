"""The step loop: requests join and leave at step boundaries, and one request's failure affects no other."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch
from latentflow.errors import OverloadedError
from latentflow.internal.metrics import NODE, Instruments
from latentflow.reasons import Reason
from latentflow_nodes.engine import engine as engine_module
from latentflow_nodes.engine.compute_lock import ComputeLock
from latentflow_nodes.engine.engine import Engine
from latentflow_nodes.engine.forward_time import ForwardTime
from latentflow_nodes.engine.member import Control, Member
from latentflow_nodes.engine.runner import EagerRunner, Prediction
from latentflow_nodes.families.base import Residuals
from support.step_loop import FAMILY, NETWORK, Broken, Edges, Recording, alone, engine_of, finish, sample


@pytest.fixture
def engine() -> Engine:
    return engine_of(EagerRunner(network=NETWORK, family=FAMILY, device=torch.device("cpu"), lock=ComputeLock(None)))


class Clock:
    """Virtual time for the engine."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds

    perf_counter = monotonic

    def monotonic_ns(self) -> int:
        return int(self.seconds * 1e9)

    perf_counter_ns = monotonic_ns


class Slow(Recording):
    """Takes a virtual second for a pass of 8 x 8, and a hundred for a larger one."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def run(self, batch: Sequence[Member], *, patience: float) -> Prediction:
        self._clock.seconds += 1 if batch[0].latents.shape[-1] == 8 else 100
        return super().run(batch, patience=patience)


def test_a_small_image_is_finished_before_the_second_step_of_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(engine_module, "time", clock)
    runner = Slow(clock)
    engine = engine_of(runner)
    large, large_received = sample(1, steps=3, side=16)
    engine.submit(large)
    engine.step()
    small, small_received = sample(2, steps=4)
    engine.submit(small)
    finish(engine)
    assert runner.passes == [[1], [2], [2], [2], [2], [1], [1]]
    assert large_received.latents is not None
    assert small_received.latents is not None


def test_a_later_request_joins_at_the_next_step(engine: Engine) -> None:
    (first, received_first), (second, received_second) = sample(1), sample(2)
    engine.submit(first)
    assert engine.step()
    engine.submit(second)
    assert engine.step()
    assert (received_first.steps, received_second.steps) == ([1, 2], [1])


def test_requests_that_share_forward_passes_equal_those_alone(engine: Engine) -> None:
    alone, received_alone = sample(1)
    engine.submit(alone)
    while engine.step():
        pass
    (first, received), (second, _) = sample(1), sample(2)
    engine.submit(first)
    engine.step()
    engine.submit(second)
    while engine.step():
        pass
    assert received.latents is not None
    assert received_alone.latents is not None
    assert (received.latents - received_alone.latents).abs().max() < 1e-4


def test_a_cancelled_request_takes_part_in_no_further_step(engine: Engine) -> None:
    (first, received_first), (second, received_second) = sample(1), sample(2)
    engine.submit(first)
    engine.submit(second)
    engine.step()
    engine.cancel(first.key)
    engine.step()
    assert received_first.steps == [1]
    assert received_second.steps == [1, 2]


def test_a_request_whose_controlnet_died_fails_alone(engine: Engine) -> None:
    broken, received_broken = sample(1, controls=(Control(source=Broken(), scale=1.0),))
    whole, received_whole = sample(2)
    engine.submit(broken)
    engine.submit(whole)
    while engine.step():
        pass
    assert received_broken.error is not None
    assert received_broken.error.reason == Reason.PEER_UNAVAILABLE
    assert received_whole.latents is not None


def test_only_the_defective_request_of_a_batch_fails(engine: Engine) -> None:
    (bad, received_bad), (good, received_good) = sample(1), sample(2)
    bad.latents = bad.latents.to(torch.float64)
    engine.submit(bad)
    engine.submit(good)
    while engine.step():
        pass
    assert received_bad.error is not None
    assert received_good.latents is not None


MIXED: list[dict[str, Any]] = [
    {"guidance": 3.0},
    {"guidance": 1.0, "sampler": "euler"},
    {"guidance": 5.0, "controls": (Control(source=Edges(), scale=1.0),)},
    {"guidance": 1.0, "controls": (Control(source=Edges(), scale=1.0, start=0.3),), "steps": 4},
]


def test_requests_of_equal_shape_share_passes_and_equal_those_alone() -> None:
    runner = Recording()
    engine = engine_of(runner, max_running=4)
    received = []
    for key, arguments in enumerate(MIXED):
        one, listener = sample(key, **arguments)
        received.append(listener)
        engine.submit(one)
    finish(engine)
    assert runner.passes == [[0, 1, 2, 3]] * 3 + [[3]]
    for key, (arguments, listener) in enumerate(zip(MIXED, received, strict=True)):
        assert listener.latents is not None
        assert (listener.latents - alone(key, **arguments)).abs().max() < 1e-4


def test_a_deterministic_request_shares_no_pass_and_is_bit_identical() -> None:
    runner = Recording()
    engine = engine_of(runner, max_running=3)
    one, received = sample(1, deterministic=True)
    for other in (sample(2)[0], one, sample(3, deterministic=True)[0]):
        engine.submit(other)
    finish(engine)
    assert all(len(keys) == 1 for keys in runner.passes)
    assert received.latents is not None
    assert torch.equal(received.latents, alone(1))


class Defective:
    """A ControlNet that cannot even be called."""

    def request(self, **_: Any) -> Future[Residuals]:
        raise RuntimeError("device lost")


def test_a_request_whose_controlnet_cannot_be_called_fails_alone(engine: Engine) -> None:
    bad, received_bad = sample(1, controls=(Control(source=Defective(), scale=1.0),))
    good, received_good = sample(2)
    engine.submit(bad)
    engine.submit(good)
    finish(engine)
    assert received_bad.error is not None
    assert "device lost" in received_bad.error.message
    assert received_good.latents is not None
    assert received_good.error is None


def test_a_request_whose_residuals_are_late_sits_out_until_they_are_there() -> None:
    metrics = Instruments(NODE, model="m", role="Denoiser")
    engine = engine_of(Recording(), metrics=metrics)
    net = Edges(hold=True)
    late, received_late = sample(1, controls=(Control(source=net, scale=1.0),))
    other, received_other = sample(2)
    engine.submit(late)
    engine.submit(other)
    finish(engine)
    assert received_other.steps == [1, 2]
    assert received_other.latents is not None
    assert received_late.steps == []
    for _ in range(3):
        net.send()
        finish(engine)
    assert received_late.latents is not None
    expected = alone(1, controls=(Control(source=Edges(), scale=1.0),))
    assert (received_late.latents - expected).abs().max() < 1e-4
    # Each of its three steps is put off once, not once for each step of the other request.
    labels = {"model": "m", "role": "Denoiser"}
    assert metrics.registry.get_sample_value("latentflow_late_residuals_total", labels) == 3


def test_requests_that_sit_out_do_not_keep_others_from_starting() -> None:
    engine = engine_of(Recording(), max_running=1, max_waiting=3)
    for key in range(2):
        engine.submit(sample(key, controls=(Control(source=Edges(hold=True), scale=1.0),))[0])
    other, received = sample(2)
    engine.submit(other)
    finish(engine)
    assert received.latents is not None


def test_a_request_whose_residuals_never_arrive_fails_alone() -> None:
    engine = engine_of(Recording())
    late, received = sample(1, controls=(Control(source=Edges(hold=True), scale=1.0),))
    engine.submit(late)
    finish(engine)
    assert received.error is None
    late.requested_at -= 60
    finish(engine)
    assert received.error is not None
    assert received.error.reason == Reason.PEER_UNAVAILABLE
    other, received_other = sample(2)
    engine.submit(other)
    finish(engine)
    assert received_other.latents is not None


def test_the_step_loop_wakes_up_when_late_residuals_arrive() -> None:
    engine = engine_of(Recording())
    net = Edges(hold=True)
    late, received = sample(1, steps=1, controls=(Control(source=net, scale=1.0),))
    engine.submit(late)
    finish(engine)
    engine.start()
    assert not received.done.wait(0.1)
    net.send()
    assert received.done.wait(30)
    engine.stop()


def test_a_batch_that_runs_out_of_memory_is_halved_and_loses_nothing() -> None:
    runner = Recording(room=2)
    engine = engine_of(runner, max_running=4)
    received = []
    for key in range(4):
        one, listener = sample(key)
        received.append(listener)
        engine.submit(one)
    finish(engine)
    assert all(listener.latents is not None for listener in received)
    assert max(len(keys) for keys in runner.passes) == 2


class Timed(Recording):
    """Reports durations of passes: a fixed part, and one for each row."""

    def __init__(self, *, fixed: int, each: int) -> None:
        super().__init__()
        self._fixed, self._each = fixed, each

    def run(self, batch: Sequence[Member], *, patience: float) -> Prediction:
        prediction = super().run(batch, patience=patience)
        rows = sum(one.rows for one in batch)
        return replace(prediction, time=ForwardTime(((0, self._fixed + self._each * rows),)))


@pytest.mark.parametrize(
    ("fixed", "each", "passes"),
    # Requests share passes until the durations of three such passes are known.
    [(0, 1000, {3: 3, 2: 3, 1: 45}), (1000, 1000, {3: 20})],
)
def test_requests_share_passes_as_far_as_passes_were_seen_to_save_time(
    fixed: int, each: int, passes: dict[int, int]
) -> None:
    runner = Timed(fixed=fixed, each=each)
    engine = engine_of(runner, max_running=3)
    first, _ = sample(0, steps=5)
    engine.submit(first)
    finish(engine)
    received = []
    for key in range(1, 4):
        one, listener = sample(key, steps=20)
        received.append(listener)
        engine.submit(one)
    finish(engine)
    assert Counter(len(keys) for keys in runner.passes[5:]) == passes
    for key, listener in enumerate(received, start=1):
        assert listener.latents is not None
        assert (listener.latents - alone(key, steps=20)).abs().max() < 1e-4


def test_a_request_too_large_for_the_memory_is_refused_alone() -> None:
    engine = engine_of(Recording(room=0))
    one, received = sample(1)
    engine.submit(one)
    finish(engine)
    assert received.error is not None
    assert received.error.reason == Reason.OUT_OF_MEMORY


def test_a_full_queue_refuses_with_a_retry_delay(engine: Engine) -> None:
    for key in range(1, 4):
        engine.submit(sample(key)[0])
    with pytest.raises(OverloadedError, match="queue is full") as caught:
        engine.submit(sample(4)[0])
    assert caught.value.retry_after is not None


def test_a_stopping_engine_fails_every_sample(engine: Engine) -> None:
    one, received = sample(1, steps=1000)
    engine.start()
    engine.submit(one)
    engine.stop()
    assert received.error is not None
    assert received.error.reason == Reason.DRAINING


def test_an_idle_engine_steps_nothing(engine: Engine) -> None:
    assert not engine.step()


def test_a_pass_without_residuals_neither_synchronises_nor_branches_on_data() -> None:
    one, _ = sample(1)
    runner = EagerRunner(network=NETWORK, family=FAMILY, device=torch.device("cpu"), lock=ComputeLock(None))

    class Synchronising(torch.overrides.TorchFunctionMode):
        """Refuses to turn a tensor into a Python number, which waits for the device and cannot be captured."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert getattr(function, "__name__", "") not in {"item", "__bool__", "__int__", "__float__", "tolist"}
            return function(*args, **(kwargs or {}))

    with torch.inference_mode(), Synchronising():
        prediction = runner.run([one], patience=0.0)
    assert prediction.noise[0] is not None
    assert prediction.noise[0].shape == (2, 4, 8, 8)
    assert prediction.time.nanoseconds() > 0


def test_an_engine_that_was_never_started_can_be_stopped(engine: Engine) -> None:
    before = threading.active_count()
    engine.stop()
    assert threading.active_count() == before
