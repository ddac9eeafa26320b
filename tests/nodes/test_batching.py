"""Who shares the next forward pass."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentflow_nodes.engine.batching import Candidate, Merged, choose

candidates = st.lists(
    st.builds(
        lambda group, adapters, waited: (f"{group}{adapters}", adapters, waited),
        st.sampled_from("ab"),
        st.sampled_from("xyz"),
        st.floats(0, 9),
    ),
    max_size=8,
).map(lambda rows: [Candidate(key=i, group=g, adapters=a, waited=w) for i, (g, a, w) in enumerate(rows)])
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
    """Requests that take part in passes of equal length, in virtual time.

    Attributes:
        merges: How often an adapter set was merged.
        seconds: Since the start.
    """

    def __init__(self, rows: list[Candidate], *, limit: int, pass_seconds: float, merge_seconds: float) -> None:
        self._rows = {row.key: row for row in rows}
        self._limit = limit
        self._pass_seconds = pass_seconds
        self._merge_seconds = merge_seconds
        self._served_at = dict.fromkeys(self._rows, 0.0)
        self._merged: object = None
        self._merged_at = 0.0
        self.merges = 0
        self.seconds = 0.0

    def step(self) -> list[int]:
        """The keys of the requests in the next pass."""
        candidates = [
            Candidate(
                key=row.key, group=row.group, adapters=row.adapters, waited=self.seconds - self._served_at[row.key]
            )
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
        self.seconds += self._pass_seconds
        return chosen

    def longest_wait(self) -> float:
        return max(self.seconds - served for served in self._served_at.values())

    def finish(self, key: int) -> None:
        del self._rows[key], self._served_at[key]


@given(candidates.filter(bool), st.integers(1, 4), seconds, st.floats(0, 0.1))
def test_every_candidate_is_chosen_within_a_bounded_time(
    rows: list[Candidate], limit: int, pass_seconds: float, merge_seconds: float
) -> None:
    """Steps that never end."""
    run = Run(rows, limit=limit, pass_seconds=pass_seconds, merge_seconds=merge_seconds)
    # A turn of a set lasts 50 merges, or until each of its requests has had one pass.
    turn = 51 * merge_seconds + (len(rows) + 1) * pass_seconds
    for _ in range(200):
        run.step()
        assert run.longest_wait() <= (len({row.adapters for row in rows}) + 1) * turn


@given(candidates.filter(bool), seconds, st.floats(0.001, 1))
def test_merging_takes_a_small_share_of_the_time_however_many_sets_there_are(
    rows: list[Candidate], pass_seconds: float, merge_seconds: float
) -> None:
    run = Run(rows, limit=4, pass_seconds=pass_seconds, merge_seconds=merge_seconds)
    for _ in range(300):
        run.step()
    assert (run.merges - 1) * merge_seconds * 50 <= run.seconds


@pytest.mark.parametrize("merge_seconds", [0.25, 0.5, 1.0])
def test_four_requests_with_a_set_each_need_few_merges(merge_seconds: float) -> None:
    rows = [Candidate(key=key, group=key, adapters=key, waited=0.0) for key in range(4)]
    run = Run(rows, limit=8, pass_seconds=1.0, merge_seconds=merge_seconds)
    left = dict.fromkeys(range(4), 20)
    while left:
        (key,) = run.step()
        left[key] -= 1
        if not left[key]:
            del left[key]
            run.finish(key)
    assert run.merges <= 8


def test_a_merged_set_stays_until_another_request_has_waited_for_fifty_merges() -> None:
    mine = Candidate(key=1, group="g", adapters="merged", waited=0.1)
    for waited, age, expected in ((4.9, 9.0, 1), (9.0, 4.9, 1), (5.0, 5.0, 2)):
        other = Candidate(key=2, group="h", adapters="other", waited=waited)
        merged = Merged(adapters="merged", age=age, merge_seconds=0.1)
        assert choose([mine, other], merged=merged, limit=4) == [expected]


def test_another_set_is_merged_at_once_where_the_merged_one_has_no_request() -> None:
    other = Candidate(key=1, group="g", adapters="other", waited=0.0)
    assert choose([other], merged=Merged(adapters="merged", merge_seconds=1.0), limit=4) == [1]
