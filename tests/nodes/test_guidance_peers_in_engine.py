"""A sample's negative half on another replica: exact with the peer, without it, and wherever it is given or lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import product
from typing import Any

import pytest
import torch
from latentflow.errors import InvalidRequestError, LatentflowError, OverloadedError, UnavailableError
from latentflow.internal.metrics import NODE, Instruments
from latentflow.reasons import Reason
from latentflow_nodes.engine import engine as engine_module
from latentflow_nodes.engine.guest import Guest
from latentflow_nodes.engine.load import Load
from latentflow_nodes.engine.member import Control
from latentflow_nodes.engine.sample import Assignment, GuidancePeer, LateAdapters, Sample
from support.step_loop import Edges, Listener, Recording, alone, engine_of, finish, inputs, sample

STEPS = 4


class Replica:
    """Another replica that computes a negative half: a guest in a step loop of its own.

    Attributes:
        given_up: Why the sample has given it up.
    """

    def __init__(self, *, controls: tuple[Control, ...] = (), hold: bool = False, max_running: int = 4) -> None:
        self.runner = Recording()
        self.engine = engine_of(self.runner, max_running=max_running)
        negative = {"encoder_hidden_states": inputs(2)["encoder_hidden_states"][:1]}
        self.guest = Guest(
            key=100, request_id="guest", inputs=negative, latents=torch.zeros(1, 4, 1, 1), steps=9, controls=controls
        )
        self.engine.submit(self.guest)
        self._hold = hold
        self.given_up: LatentflowError | None = None
        self.with_adapters: list[bool] = []

    def request(
        self, *, step: int, timestep: float, sample: torch.Tensor, with_adapters: bool = True
    ) -> Future[torch.Tensor]:
        self.with_adapters.append(with_adapters)
        future = self.guest.begin(step=step, timestep=timestep, sample=sample, adapters=(), adapter_key=())
        if not self._hold:
            finish(self.engine)
        return future

    def give_up(self, error: LatentflowError) -> None:
        self.given_up = error


class Answering:
    """A peer whose answer to every step is a tensor or an error."""

    def __init__(self, answer: torch.Tensor | LatentflowError) -> None:
        self._answer = answer
        self.given_up: LatentflowError | None = None

    def request(self, **_: Any) -> Future[torch.Tensor]:
        future: Future[torch.Tensor] = Future()
        if isinstance(self._answer, LatentflowError):
            future.set_exception(self._answer)
        else:
            future.set_result(self._answer)
        return future

    def give_up(self, error: LatentflowError) -> None:
        self.given_up = error


class Changing(Listener):
    """Gives the sample a peer for the steps of a pattern, and takes it back before the others."""

    def __init__(self, assignment: Assignment, peer: GuidancePeer, pattern: Iterator[bool]) -> None:
        super().__init__()
        self._assignment = assignment
        self._peer = peer
        self._pattern = pattern
        self.change()

    def change(self) -> None:
        self._assignment.peer = self._peer if next(self._pattern) else None

    def stepped(self, sample: Sample) -> None:
        super().stepped(sample)
        self.change()


def with_peer(peer: Any, key: int = 1, **arguments: Any) -> tuple[Sample, Listener]:
    """A sample that has a peer from its first step on."""
    return sample(key, steps=STEPS, assignment=Assignment(peer=GuidancePeer(source=peer)), **arguments)


def assert_as_alone(received: Listener, key: int = 1, **arguments: Any) -> None:
    assert received.error is None
    assert received.latents is not None
    assert (received.latents - alone(key, steps=STEPS, **arguments)).abs().max() < 1e-4


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "dpmpp_2m"])
def test_a_sample_whose_peer_changes_at_any_step_is_as_one_alone(sampler: str) -> None:
    for pattern in product((True, False), repeat=STEPS):
        peer, assignment, runner = Replica(), Assignment(), Recording()
        engine = engine_of(runner)
        one, _ = sample(1, steps=STEPS, sampler=sampler, assignment=assignment)
        received = Changing(assignment, GuidancePeer(source=peer), iter(pattern))
        one.listener = received
        engine.submit(one)
        finish(engine)
        assert_as_alone(received, sampler=sampler)
        assert len(peer.runner.passes) == sum(pattern)
        assert len(runner.passes) == STEPS


def test_each_half_has_the_residuals_of_its_own_controlnets() -> None:
    def nets() -> tuple[Control, ...]:
        return (Control(source=Edges(), scale=1.0, end=0.5),)

    peer = Replica(controls=(Control(source=Edges(negative=True), scale=1.0, end=0.5),))
    peer.guest.steps = STEPS
    one, received = sample(
        1,
        steps=STEPS,
        controls=nets(),
        assignment=Assignment(peer=GuidancePeer(source=peer, controls=nets())),
    )
    engine = engine_of(Recording())
    engine.submit(one)
    finish(engine)
    assert_as_alone(received, controls=nets())
    assert len(peer.runner.passes) == STEPS


def test_a_guest_shares_the_passes_of_the_host() -> None:
    peer = Replica(hold=True)
    own, received_own = sample(2, steps=STEPS)
    peer.engine.submit(own)
    one, received = with_peer(peer)
    engine = engine_of(Recording())
    engine.submit(one)
    for _ in range(STEPS):
        engine.step()
        peer.engine.step()
    engine.step()
    assert peer.runner.passes == [[100, 2]] * STEPS
    assert_as_alone(received)
    assert_as_alone(received_own, key=2)


def test_a_guest_whose_caller_leaves_during_a_step_harms_no_other() -> None:
    peer = Replica(hold=True)
    own, received = sample(2, steps=STEPS)
    peer.engine.submit(own)
    peer.request(step=0, timestep=1.0, sample=torch.zeros(1, 4, 8, 8)).cancel()
    finish(peer.engine)
    assert peer.runner.passes[0] == [100, 2]
    assert_as_alone(received, key=2)


def test_a_guest_without_a_step_takes_no_slot() -> None:
    peer = Replica(hold=True, max_running=1)
    own, received = sample(2, steps=STEPS)
    peer.engine.submit(own)
    finish(peer.engine)
    assert received.latents is not None
    assert peer.runner.passes == [[2]] * STEPS


def guest(key: int) -> Guest:
    return Guest(key=key, request_id="guest", inputs=inputs(1), latents=torch.zeros(1, 4, 1, 1), steps=STEPS)


def test_a_guest_is_refused_where_all_slots_are_taken() -> None:
    engine = engine_of(Recording(), max_running=2, max_waiting=3)
    engine.submit(guest(100))
    engine.submit(sample(1)[0])
    with pytest.raises(OverloadedError):
        engine.submit(guest(101))


def test_guests_take_no_place_in_the_queue() -> None:
    engine = engine_of(Recording(), max_running=2, max_waiting=1)
    for key in (100, 101):
        engine.submit(guest(key))
    for key in (1, 2, 3):
        engine.submit(sample(key)[0])
    with pytest.raises(OverloadedError):
        engine.submit(sample(4)[0])


def test_a_guest_repeats_no_step() -> None:
    peer = Replica()
    peer.request(step=3, timestep=1.0, sample=torch.zeros(1, 4, 8, 8))
    with pytest.raises(InvalidRequestError):
        peer.request(step=3, timestep=1.0, sample=torch.zeros(1, 4, 8, 8))


def test_a_pass_of_one_half_counts_as_one_row() -> None:
    load = Load(Instruments(NODE, model="m", role="Denoiser"))
    one, received = with_peer(Replica())
    engine = engine_of(Recording(), load=load)
    engine.submit(one)
    finish(engine)
    assert received.latents is not None
    assert {size.rows for size in load.state().pass_seconds} == {1}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (UnavailableError("gone", reason=Reason.PEER_UNAVAILABLE), Reason.PEER_UNAVAILABLE),
        (torch.full((1, 4, 8, 8), torch.nan), Reason.NOT_FINITE),
        (torch.zeros(1, 4, 4, 4), Reason.PEER_UNAVAILABLE),
    ],
)
def test_a_sample_whose_peer_fails_computes_the_same_step_alone(
    answer: torch.Tensor | LatentflowError, reason: str
) -> None:
    peer = Answering(answer)
    one, received = with_peer(peer)
    engine = engine_of(Recording())
    engine.submit(one)
    finish(engine)
    assert_as_alone(received)
    assert peer.given_up is not None
    assert peer.given_up.reason == reason


def test_a_sample_whose_peer_is_late_sits_out_and_then_continues_alone() -> None:
    peer, runner = Replica(hold=True), Recording()
    engine = engine_of(runner)
    late, received = with_peer(peer)
    other, received_other = sample(2, steps=STEPS)
    engine.submit(late)
    engine.submit(other)
    finish(engine)
    assert received.steps == []
    assert_as_alone(received_other, key=2)
    late.requested_at -= 60
    finish(engine)
    assert_as_alone(received)
    assert peer.given_up is not None
    assert "did not answer step 1" in peer.given_up.message


@pytest.mark.parametrize("is_lost", [False, True], ids=["late", "lost"])
def test_a_peer_that_fails_after_late_residuals_is_given_up(is_lost: bool) -> None:
    gone = UnavailableError("gone", reason=Reason.PEER_UNAVAILABLE)
    peer = Answering(gone) if is_lost else Replica(hold=True)
    edges, own = Edges(hold=True), (Control(source=Edges(), scale=1.0),)
    engine = engine_of(Recording())
    assignment = Assignment(peer=GuidancePeer(source=peer, controls=(Control(source=edges, scale=1.0),)))
    one, received = sample(1, steps=STEPS, controls=own, assignment=assignment)
    engine.submit(one)
    engine.step()
    assert one.is_late
    edges.send()
    engine.step()
    one.requested_at -= 60
    for _ in range(STEPS + 1):
        engine.step()
    assert_as_alone(received, controls=own)
    assert peer.given_up is not None


def test_the_wait_for_a_half_ends_when_another_request_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    # Days, if nothing ends the wait.
    monkeypatch.setattr(engine_module, "_HALF_PASSES", 1e9)
    peer = Replica(hold=True)
    engine = engine_of(Recording())
    first, received = with_peer(peer)
    engine.submit(first)
    arrive = threading.Timer(0.0, lambda: engine.submit(sample(2, steps=STEPS)[0]))
    arrive.start()
    engine.step()
    arrive.join()
    assert (first.index, received.error) == (0, None)
    assert first.own_half is not None


def test_a_late_half_ends_the_step_without_another_pass() -> None:
    peer, runner = Replica(hold=True), Recording()
    engine = engine_of(runner)
    one, received = with_peer(peer)
    engine.submit(one)
    for _ in range(STEPS):
        finish(engine)
        finish(peer.engine)
    finish(engine)
    assert runner.passes == [[1]] * STEPS
    assert_as_alone(received)


def test_a_guest_of_a_stopping_server_fails_the_step_and_every_later_one() -> None:
    peer = Replica(hold=True)
    answer = peer.request(step=0, timestep=1.0, sample=torch.zeros(1, 4, 8, 8))
    peer.engine.start()
    peer.engine.stop()
    later = peer.request(step=1, timestep=1.0, sample=torch.zeros(1, 4, 8, 8))
    with pytest.raises(UnavailableError):
        later.result(timeout=0)
    assert answer.done()


@pytest.mark.parametrize(("step", "shape"), [(9, (1, 4, 8, 8)), (0, (2, 4, 8, 8)), (0, (1, 3, 8, 8)), (0, (4, 8, 8))])
def test_a_step_of_another_request_is_refused(step: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequestError):
        Replica().request(step=step, timestep=1.0, sample=torch.zeros(shape))


def test_both_halves_use_late_adapters_from_the_same_step_on() -> None:
    peer = Replica()
    peer.guest.steps = STEPS
    loaded: Future[Any] = Future()
    one, received = sample(1, steps=STEPS, assignment=Assignment(peer=GuidancePeer(source=peer)))
    one.late_adapters = LateAdapters(loaded=loaded, key="neon", steps=STEPS)
    engine = engine_of(Recording())
    engine.submit(one)
    engine.step()
    loaded.set_result(())
    finish(engine)
    assert received.done.is_set()
    assert one.steps_without_adapters == 1
    assert peer.with_adapters == [False] + [True] * (STEPS - 1)
