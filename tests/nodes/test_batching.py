"""Who shares the next forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentflow_nodes.engine.batching import BY_ROW, Candidate, Choice, Limits, Merged, choose
from latentflow_nodes.engine.shares import Shares

MANY = 10**6


def candidate(key: int, *, steps: int = MANY, waited: float = 0.0, **values: Any) -> Candidate:
    return Candidate(key=key, steps_left=steps, waited=waited, received=0.0, **({"group": "", "adapters": ""} | values))


candidates = st.lists(
    st.builds(
        lambda group, adapters, waited: (group, adapters, waited),
        st.sampled_from("ab"),
        st.sampled_from(["x", "y", ()]),
        st.floats(0, 9),
    ),
    max_size=8,
).map(lambda rows: [candidate(i, group=g, adapters=a, waited=w) for i, (g, a, w) in enumerate(rows)])
merges = st.builds(
    Merged, adapters=st.sampled_from(["x", "y", (), None]), age=st.floats(0, 9), merge_seconds=st.floats(0, 0.2)
)
seconds = st.floats(0.01, 1)


def both(limit: int) -> Limits:
    return Limits(merged=limit, by_row=limit)


@given(candidates, merges, st.integers(1, 4), st.dictionaries(st.integers(1, 8), st.floats(0.001, 1)))
def test_a_batch_has_one_group_and_stays_within_the_limit(
    rows: list[Candidate], merged: Merged, limit: int, profile: dict[int, float]
) -> None:
    rows = [replace(row, pass_seconds=profile) for row in rows]
    choice = choose(rows, merged=merged, limits=both(limit))
    chosen = [row for row in rows if row.key in choice.keys]
    assert len({row.group for row in chosen}) <= 1
    assert choice.by_row or {row.adapters for row in chosen} <= {choice.adapters}
    assert len(choice.keys) == len(chosen) <= limit
    assert bool(chosen) == bool(rows)


@given(candidates, merges, st.integers(1, 4))
def test_without_a_profile_a_batch_is_full_while_its_group_has_more_candidates(
    rows: list[Candidate], merged: Merged, limit: int
) -> None:
    chosen = choose(rows, merged=merged, limits=both(limit)).keys
    if chosen:
        group = {row.key: (row.group, row.adapters) for row in rows}
        assert len(chosen) == min(limit, Counter(group.values())[group[chosen[0]]])


class Run:
    """Requests that take part in passes, in virtual time.

    Args:
        rows: With the steps that they have left, after which they are gone.
        pass_seconds: The duration of a pass by the group and the number of its requests. With adapters by row it is longer.

    Attributes:
        merges: How often an adapter set was merged.
        seconds: Since the start.
    """

    def __init__(
        self,
        rows: list[Candidate],
        *,
        limits: Limits,
        pass_seconds: Callable[[Hashable, int], float],
        merge_seconds: float,
    ) -> None:
        self._rows = {row.key: row for row in rows}
        self._limits = limits
        self._pass_seconds = pass_seconds
        self._merge_seconds = merge_seconds
        self._served_at = dict.fromkeys(self._rows, 0.0)
        self._admitted_at = dict.fromkeys(self._rows, 0.0)
        self._shares = Shares()
        for key in self._rows:
            self._shares.admit(key)
        self._merged: object = None
        self._merged_at = 0.0
        self.merges = 0
        self.seconds = 0.0

    def step(self) -> tuple[int, ...]:
        """The keys of the requests in the next pass."""
        candidates = [
            replace(
                row,
                waited=self.seconds - self._served_at[row.key],
                received=self._shares.of(row.key),
                age=self.seconds - self._admitted_at[row.key],
            )
            for row in self._rows.values()
        ]
        merged = Merged(
            adapters=self._merged,
            age=self.seconds - self._merged_at,
            merge_seconds=self._merge_seconds if self.merges else 0.0,
        )
        choice = choose(candidates, merged=merged, limits=self._limits)
        chosen = choice.keys
        self._served_at.update(dict.fromkeys(chosen, self.seconds))
        if choice.adapters != self._merged:
            self.seconds += self._merge_seconds
            self.merges += 1
            self._merged, self._merged_at = choice.adapters, self.seconds
        took = self._pass_seconds(self._rows[chosen[0]].group, len(chosen)) * (BY_ROW if choice.by_row else 1.0)
        self.seconds += took
        self._shares.serve(chosen, seconds=took)
        for key in chosen:
            left = self._rows[key].steps_left - 1
            self._rows[key] = replace(self._rows[key], steps_left=left)
            if not left:
                self._finish(key)
        return chosen

    @property
    def is_done(self) -> bool:
        return not self._rows

    def _finish(self, key: int) -> None:
        del self._rows[key], self._served_at[key], self._admitted_at[key]
        self._shares.retire(key)

    def admit(self, row: Candidate) -> None:
        self._rows[row.key] = row
        self._served_at[row.key] = self._admitted_at[row.key] = self.seconds
        self._shares.admit(row.key)


@given(candidates.filter(bool), st.integers(1, 4), seconds, st.floats(0, 0.1))
def test_all_requests_end_within_the_time_of_their_passes_and_few_merges(
    rows: list[Candidate], limit: int, pass_seconds: float, merge_seconds: float
) -> None:
    steps = 10
    run = Run(
        [replace(row, steps_left=steps) for row in rows],
        limits=both(limit),
        pass_seconds=lambda *_: pass_seconds,
        merge_seconds=merge_seconds,
    )
    while not run.is_done:
        run.step()
    sets = len({row.adapters for row in rows})
    assert run.seconds <= (1 + 1 / 50) * steps * len(rows) * pass_seconds + (sets + 1) * merge_seconds


@given(candidates.filter(bool), seconds, st.floats(0.001, 1))
def test_merging_takes_a_small_share_of_the_time_however_many_sets_there_are(
    rows: list[Candidate], pass_seconds: float, merge_seconds: float
) -> None:
    run = Run(rows, limits=both(4), pass_seconds=lambda *_: pass_seconds, merge_seconds=merge_seconds)
    for _ in range(300):
        run.step()
    assert (run.merges - 1) * merge_seconds * 50 <= run.seconds


@pytest.mark.parametrize("merge_seconds", [0.25, 0.5, 1.0])
def test_four_requests_with_a_set_each_need_few_merges(merge_seconds: float) -> None:
    rows = [candidate(key, group=key, adapters=key, steps=20) for key in range(4)]
    run = Run(rows, limits=both(8), pass_seconds=lambda *_: 1.0, merge_seconds=merge_seconds)
    while not run.is_done:
        run.step()
    assert run.merges <= 8


def test_a_merged_set_stays_until_another_request_has_waited_for_fifty_merges() -> None:
    mine = candidate(1, group="g", adapters="merged", waited=0.1)
    for waited, age, expected in ((4.9, 9.0, 1), (9.0, 4.9, 1), (5.0, 5.0, 2)):
        other = candidate(2, group="h", adapters="other", waited=waited)
        merged = Merged(adapters="merged", age=age, merge_seconds=0.1)
        assert choose([mine, other], merged=merged, limits=both(4)).keys == (expected,)


def test_another_set_is_merged_at_once_where_the_merged_one_has_no_request() -> None:
    other = candidate(1, group="g", adapters="other")
    assert choose([other], merged=Merged(adapters="merged", merge_seconds=1.0), limits=both(4)).keys == (1,)


def of_groups(*groups: str) -> list[Candidate]:
    return [candidate(key, group=group) for key, group in enumerate(groups)]


@given(st.floats(0.01, 1), st.floats(1, 100), st.integers(1, 30), st.integers(0, 5))
def test_a_small_image_waits_for_few_passes_of_a_large_one(short: float, times: float, steps: int, ahead: int) -> None:
    long = short * times
    large, small = of_groups("large", "small")
    run = Run(
        [large], limits=both(4), pass_seconds=lambda group, _: long if group == "large" else short, merge_seconds=0
    )
    for _ in range(ahead):
        run.step()
    run.admit(small)
    admitted, left = run.seconds, steps
    while left:
        left -= run.step() == (small.key,)
    # Equal shares, rounded up to whole passes of the large image at both ends.
    assert run.seconds - admitted <= 2 * (steps * short + long)


@given(st.floats(0.1, 10), st.floats(0.1, 10))
def test_two_groups_share_the_time_whatever_their_passes_take(first: float, second: float) -> None:
    passes = {"a": first, "b": second}
    run = Run(of_groups("a", "b"), limits=both(4), pass_seconds=lambda group, _: passes[str(group)], merge_seconds=0)
    used = [0.0, 0.0]
    while run.seconds < 100 * max(passes.values()):
        (key,) = run.step()
        used[key] += passes["ab"[key]]
    assert used[0] / run.seconds == pytest.approx(0.5, abs=0.02)


def test_a_request_that_was_not_there_makes_up_for_no_time() -> None:
    run = Run(of_groups("a"), limits=both(4), pass_seconds=lambda *_: 1.0, merge_seconds=0)
    for _ in range(50):
        run.step()
    run.admit(candidate(7, group="b"))
    assert Counter(key for _ in range(20) for key in run.step()) == {0: 10, 7: 10}


def test_a_request_that_sat_out_makes_up_for_no_time() -> None:
    shares = Shares()
    for key in (1, 2):
        shares.admit(key)
    for _ in range(50):
        shares.serve([1], seconds=1.0)
    assert shares.of(1) - shares.of(2) == pytest.approx(1.0)


def test_a_request_that_ended_during_its_pass_receives_nothing() -> None:
    shares = Shares()
    shares.admit(1)
    shares.retire(1)
    shares.serve([1], seconds=1.0)
    shares.admit(1)
    assert shares.of(1) == 0.0


def linear(fixed: float, each: float) -> dict[int, float]:
    """Seconds of passes of one to eight rows."""
    return {rows: fixed + each * rows for rows in range(1, 9)}


profiles = st.builds(linear, st.floats(0, 1), st.floats(0.001, 1))


def run_of(steps: list[int], profile: dict[int, float], *, known: bool) -> Run:
    rows = [candidate(key, steps=left, pass_seconds=profile if known else {}) for key, left in enumerate(steps)]
    return Run(rows, limits=both(8), pass_seconds=lambda _, count: profile[count], merge_seconds=0)


@given(profiles, st.integers(1, 8), st.integers(1, 20))
def test_equal_requests_end_at_most_a_twentieth_later_than_with_all_in_a_pass(
    profile: dict[int, float], count: int, steps: int
) -> None:
    ends = []
    for known in (True, False):
        run = run_of([steps] * count, profile, known=known)
        while not run.is_done:
            run.step()
        ends.append(run.seconds)
    assert ends[0] <= ends[1] * 1.05 + 1e-6


def test_requests_run_one_after_the_other_where_a_shared_pass_saves_no_time() -> None:
    run = run_of([3, 3, 3], linear(0.0, 1.0), known=True)
    passes = []
    while not run.is_done:
        passes.append(run.step())
    assert passes == [(key,) for key in range(3) for _ in range(3)]


def test_requests_share_passes_where_that_saves_time() -> None:
    run = run_of([3, 3, 3], linear(1.0, 0.5), known=True)
    assert run.step() == (0, 1, 2)


def test_a_short_request_overtakes_a_long_one() -> None:
    run = run_of([100], linear(0.0, 1.0), known=True)
    for _ in range(10):
        run.step()
    run.admit(candidate(7, steps=2, pass_seconds=linear(0.0, 1.0)))
    assert next(index for index in range(20) if run.step() == (7,)) < 5


def test_a_long_request_ends_however_many_short_ones_arrive() -> None:
    profile = linear(0.0, 1.0)
    run = run_of([20], profile, known=True)
    served = Counter[int]()
    for passes in range(400):
        # As much work as the server does.
        if passes % 2 == 0:
            run.admit(candidate(passes + 1, steps=2, pass_seconds=profile))
        served.update(run.step())
    assert served[0] == 20


def of_sets(*adapters: Hashable, profile: dict[int, float], **values: Any) -> list[Candidate]:
    return [candidate(key, steps=20, adapters=one, pass_seconds=profile, **values) for key, one in enumerate(adapters)]


# Two rows take as long as one after the other, and a fixed part of four rows.
NO_FIXED, MUCH_FIXED = linear(0.0, 1.0), linear(4.0, 1.0)


def test_adapter_sets_share_a_pass_by_row_where_passes_have_a_fixed_part() -> None:
    rows = of_sets("x", "x", "y", "z", (), profile=MUCH_FIXED)
    assert choose(rows, merged=Merged(), limits=both(8)) == Choice(keys=(0, 1, 2, 3, 4), by_row=True)


def test_adapter_sets_share_a_pass_by_row_until_its_duration_is_known() -> None:
    rows = of_sets("x", "y", "z", profile={1: 1.0})
    assert choose(rows, merged=Merged(), limits=both(8)) == Choice(keys=(0, 1, 2), by_row=True)


def test_adapter_sets_take_turns_where_a_shared_pass_saves_no_time() -> None:
    choice = choose(of_sets("x", "y", "x", profile=NO_FIXED), merged=Merged(), limits=both(8))
    assert (choice.by_row, choice.adapters) == (False, "x")


def test_one_adapter_set_is_merged_however_long_that_takes() -> None:
    rows = of_sets("x", "x", profile=MUCH_FIXED)
    choice = choose(rows, merged=Merged(merge_seconds=1e9), limits=both(8))
    assert choice == Choice(keys=(0, 1), adapters="x")


def test_sets_that_take_longer_to_merge_than_turns_save_are_applied_by_row() -> None:
    # Twenty steps take 40 seconds in turn, with two merges, and 48 seconds by row.
    for merge_seconds, expected in ((3.0, False), (5.0, True)):
        rows = of_sets("x", "y", profile=NO_FIXED)
        assert choose(rows, merged=Merged(merge_seconds=merge_seconds), limits=both(8)).by_row is expected


def test_a_request_that_must_merge_its_set_keeps_its_group_from_adapters_by_row() -> None:
    first, second = of_sets("x", "y", profile=MUCH_FIXED)
    choice = choose([first, replace(second, must_merge=True)], merged=Merged(), limits=both(8))
    assert choice == Choice(keys=(0,), adapters="x")


def test_a_device_without_memory_for_adapters_by_row_merges_sets_in_turn() -> None:
    choice = choose(of_sets("x", "y", profile=MUCH_FIXED), merged=Merged(), limits=Limits(merged=8, by_row=0))
    assert choice == Choice(keys=(0,), adapters="x")


@given(
    st.lists(st.tuples(st.sampled_from(["x", "y", "z", ()]), st.integers(1, 20)), min_size=1, max_size=8),
    profiles,
    st.floats(0, 2),
    st.integers(1, 8),
)
def test_adapters_by_row_end_requests_hardly_later_than_sets_in_turn(
    sets: list[tuple[Hashable, int]], profile: dict[int, float], merge_seconds: float, limit: int
) -> None:
    rows = [candidate(key, steps=steps, adapters=one, pass_seconds=profile) for key, (one, steps) in enumerate(sets)]
    took = []
    for limits in (both(limit), Limits(merged=limit, by_row=0)):
        run = Run(rows, limits=limits, pass_seconds=lambda _, count: profile[count], merge_seconds=merge_seconds)
        while not run.is_done:
            run.step()
        took.append(run.seconds)
    assert took[0] <= 1.3 * took[1] + 8 * merge_seconds
