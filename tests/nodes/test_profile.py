"""Durations of passes are learned from the passes of requests, and forgotten when they are old."""

from __future__ import annotations

from typing import Any

from latentflow_nodes.engine.forward_time import ForwardTime
from latentflow_nodes.engine.load import PassSize
from latentflow_nodes.engine.profile import Profile

MILLISECOND = 1_000_000


def add(profile: Profile, rows: int, *milliseconds: int, side: int = 8) -> None:
    for each in milliseconds:
        profile.add(PassSize(rows=rows, height=side, width=side), ForwardTime(((0, each * MILLISECOND),)))


def test_a_duration_is_known_after_three_passes() -> None:
    profile = Profile()
    add(profile, 2, 10, 10)
    assert profile.seconds(8, 8) == {}
    add(profile, 2, 10)
    assert profile.seconds(8, 8) == {2: 0.01}


def test_sizes_of_latents_have_durations_of_their_own() -> None:
    profile = Profile()
    add(profile, 2, 10, 10, 10)
    add(profile, 2, 40, 40, 40, side=16)
    assert (profile.seconds(8, 8), profile.seconds(16, 16)) == ({2: 0.01}, {2: 0.04})
    assert profile.seconds(8, 16) == {}


def test_a_disturbed_pass_changes_no_duration() -> None:
    profile = Profile()
    add(profile, 1, 500, 10, 11, 900)
    assert profile.seconds(8, 8) == {1: 0.01}


def test_a_duration_follows_a_machine_that_became_slower() -> None:
    profile = Profile()
    add(profile, 1, 10, 10, 10, *[20] * 8)
    assert profile.seconds(8, 8) == {1: 0.02}


def test_rows_without_a_pass_for_long_are_unknown_until_the_next_one() -> None:
    profile = Profile()
    add(profile, 4, 30, 30, 30)
    add(profile, 1, *[10] * 63)
    assert profile.seconds(8, 8) == {1: 0.01, 4: 0.03}
    add(profile, 1, 10)
    assert profile.seconds(8, 8) == {1: 0.01}
    add(profile, 4, 30)
    assert profile.seconds(8, 8) == {1: 0.01, 4: 0.03}


class Event:
    """A mark in the stream of a device that a test lets it reach."""

    def __init__(self, milliseconds: float) -> None:
        self.milliseconds = milliseconds
        self.is_reached = False

    def query(self) -> bool:
        return self.is_reached

    def synchronize(self) -> None:
        raise AssertionError("the step loop waited for the device")

    def elapsed_time(self, end: Event) -> float:
        return end.milliseconds - self.milliseconds


def test_a_pass_counts_when_the_device_has_ended_it() -> None:
    profile = Profile()
    ends: list[Any] = [Event(10.0) for _ in range(3)]
    for end in ends:
        start: Any = Event(0.0)
        profile.add(PassSize(rows=1, height=8, width=8), ForwardTime(((start, end),)))
    assert profile.seconds(8, 8) == {}
    for end in ends:
        end.is_reached = True
        end.synchronize = lambda: None
    assert profile.seconds(8, 8) == {1: 0.01}
