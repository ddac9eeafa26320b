"""Who shares the next forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentflow_nodes.engine.batching import Candidate, Merged, choose
from latentflow_nodes.engine.shares import Shares

candidates = st.lists(
    st.builds(
        lambda group, adapters, waited: (f"{group}{adapters}", adapters, waited),
        st.sampled_from("ab"),
        st.sampled_from("xyz"),
        st.floats(0, 9),
    ),
    max_size=8,
).map(lambda rows: [Candidate(key=i, group=g, adapters=a, waited=w, received=0.0) for i, (g, a, w) in enumerate(rows)])
merges = st.builds(
    Merged, adapters=st.sampled_from(["x", "y", "z", None]), age=st.floats(0, 9), merge_seconds=st.floats(0, 0.2)
)
seconds = st.floats(0.01, 1)


@given(candidates, merges, st.integers(1, 4))
def test_a_batch_has_one_group_and_stays_within_the_limit(rows: list[Candidate], merged: Merged, limit: int) -> None:
    chosen = choose(rows, merged=merged, limit=limit)
    by_key = {row.key: row for row in rows}
    assert len({by_key[key].group for key in chosen}) <= 1
    assert len(chosen) == len(set(chosen)) <= limit
    assert bool(chosen) == bool(rows)


@given(candidates, merges, st.integers(1, 4))
def test_a_batch_is_full_while_its_group_has_more_candidates(rows: list[Candidate], merged: Merged, limit: int) -> None:
    chosen = choose(rows, merged=merged, limit=limit)
    if chosen:
        group = next(row.group for row in rows if row.key == chosen[0])
        assert len(chosen) == min(limit, Counter(row.group for row in rows)[group])


class Run:
    """Requests that take part in passes, in virtual time. The duration of a pass depends on its group.

    Attributes:
        merges: How often an adapter set was merged.
        seconds: Since the start.
    """

    def __init__(
        self, rows: list[Candidate], *, limit: int, pass_seconds: Callable[[Hashable], float], merge_seconds: float
    ) -> None:
        self._rows = {row.key: row for row in rows}
        self._limit = limit
        self._pass_seconds = pass_seconds
        self._merge_seconds = merge_seconds
        self._served_at = dict.fromkeys(self._rows, 0.0)
        self._shares = Shares()
        for key in self._rows:
            self._shares.admit(key)
        self._merged: object = None
        self._merged_at = 0.0
        self.merges = 0
        self.seconds = 0.0

    def step(self) -> list[int]:
        """The keys of the requests in the next pass."""
        candidates = [
            replace(row, waited=self.seconds - self._served_at[row.key], received=self._shares.of(row.key))
            for row in self._rows.values()
        ]
        merged = Merged(
            adapters=self._merged,
            age=self.seconds - self._merged_at,
            merge_seconds=self._merge_seconds if self.merges else 0.0,
        )
        chosen = choose(candidates, merged=merged, limit=self._limit)
        self._served_at.update(dict.fromkeys(chosen, self.seconds))
        adapters = self._rows[chosen[0]].adapters
        if adapters != self._merged:
            self.seconds += self._merge_seconds
            self.merges += 1
            self._merged, self._merged_at = adapters, self.seconds
        took = self._pass_seconds(self._rows[chosen[0]].group)
        self.seconds += took
        self._shares.serve(chosen, seconds=took)
        return chosen

    def longest_wait(self) -> float:
        return max(self.seconds - served for served in self._served_at.values())

    def finish(self, key: int) -> None:
        del self._rows[key], self._served_at[key]
        self._shares.retire(key)

    def admit(self, row: Candidate) -> None:
        self._rows[row.key] = row
        self._served_at[row.key] = self.seconds
        self._shares.admit(row.key)


@given(candidates.filter(bool), st.integers(1, 4), seconds, st.floats(0, 0.1))
def test_every_candidate_is_chosen_within_a_bounded_time(
    rows: list[Candidate], limit: int, pass_seconds: float, merge_seconds: float
) -> None:
    """Steps that never end."""
    run = Run(rows, limit=limit, pass_seconds=lambda _: pass_seconds, merge_seconds=merge_seconds)
    # A turn of a set lasts 50 merges, or until each of its requests has had one pass.
    turn = 51 * merge_seconds + (len(rows) + 1) * pass_seconds
    for _ in range(200):
        run.step()
        assert run.longest_wait() <= (len({row.adapters for row in rows}) + 1) * turn


@given(candidates.filter(bool), seconds, st.floats(0.001, 1))
def test_merging_takes_a_small_share_of_the_time_however_many_sets_there_are(
    rows: list[Candidate], pass_seconds: float, merge_seconds: float
) -> None:
    run = Run(rows, limit=4, pass_seconds=lambda _: pass_seconds, merge_seconds=merge_seconds)
    for _ in range(300):
        run.step()
    assert (run.merges - 1) * merge_seconds * 50 <= run.seconds


@pytest.mark.parametrize("merge_seconds", [0.25, 0.5, 1.0])
def test_four_requests_with_a_set_each_need_few_merges(merge_seconds: float) -> None:
    rows = [Candidate(key=key, group=key, adapters=key, waited=0.0, received=0.0) for key in range(4)]
    run = Run(rows, limit=8, pass_seconds=lambda _: 1.0, merge_seconds=merge_seconds)
    left = dict.fromkeys(range(4), 20)
    while left:
        (key,) = run.step()
        left[key] -= 1
        if not left[key]:
            del left[key]
            run.finish(key)
    assert run.merges <= 8


def test_a_merged_set_stays_until_another_request_has_waited_for_fifty_merges() -> None:
    mine = Candidate(key=1, group="g", adapters="merged", waited=0.1, received=0.0)
    for waited, age, expected in ((4.9, 9.0, 1), (9.0, 4.9, 1), (5.0, 5.0, 2)):
        other = Candidate(key=2, group="h", adapters="other", waited=waited, received=0.0)
        merged = Merged(adapters="merged", age=age, merge_seconds=0.1)
        assert choose([mine, other], merged=merged, limit=4) == [expected]


def test_another_set_is_merged_at_once_where_the_merged_one_has_no_request() -> None:
    other = Candidate(key=1, group="g", adapters="other", waited=0.0, received=0.0)
    assert choose([other], merged=Merged(adapters="merged", merge_seconds=1.0), limit=4) == [1]


def of_groups(*groups: str) -> list[Candidate]:
    return [Candidate(key=key, group=group, adapters="", waited=0.0, received=0.0) for key, group in enumerate(groups)]


@given(st.floats(0.01, 1), st.floats(1, 100), st.integers(1, 30), st.integers(0, 5))
def test_a_small_image_waits_for_few_passes_of_a_large_one(short: float, times: float, steps: int, ahead: int) -> None:
    long = short * times
    large, small = of_groups("large", "small")
    run = Run([large], limit=4, pass_seconds=lambda group: long if group == "large" else short, merge_seconds=0)
    for _ in range(ahead):
        run.step()
    run.admit(small)
    admitted, left = run.seconds, steps
    while left:
        left -= run.step() == [small.key]
    # Equal shares, rounded up to whole passes of the large image at both ends.
    assert run.seconds - admitted <= 2 * (steps * short + long)


@given(st.floats(0.01, 10), st.floats(0.01, 10))
def test_two_groups_share_the_time_whatever_their_passes_take(first: float, second: float) -> None:
    passes = {"a": first, "b": second}
    run = Run(of_groups("a", "b"), limit=4, pass_seconds=lambda group: passes[str(group)], merge_seconds=0)
    used = [0.0, 0.0]
    while run.seconds < 100 * max(passes.values()):
        (key,) = run.step()
        used[key] += passes["ab"[key]]
    assert used[0] / run.seconds == pytest.approx(0.5, abs=0.02)


def test_a_request_that_was_not_there_makes_up_for_no_time() -> None:
    run = Run(of_groups("a"), limit=4, pass_seconds=lambda _: 1.0, merge_seconds=0)
    for _ in range(50):
        run.step()
    run.admit(Candidate(key=7, group="b", adapters="", waited=0.0, received=0.0))
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
