"""Who shares the next forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from hypothesis import given
from hypothesis import strategies as st
from latentflow_nodes.engine.batching import Candidate, choose

candidates = st.lists(
    st.builds(
        lambda group, adapters, waited: (f"{group}{adapters}", adapters, waited),
        st.sampled_from("ab"),
        st.sampled_from("xy"),
        st.integers(0, 9),
    ),
    max_size=8,
).map(lambda rows: [Candidate(key=i, group=g, adapters=a, skipped=w) for i, (g, a, w) in enumerate(rows)])


@given(candidates, st.sampled_from("xyz"), st.integers(1, 4))
def test_a_batch_has_one_group_and_stays_within_the_limit(rows: list[Candidate], merged: str, limit: int) -> None:
    chosen = choose(rows, merged=merged, limit=limit)
    by_key = {row.key: row for row in rows}
    assert len({by_key[key].group for key in chosen}) <= 1
    assert len(chosen) == len(set(chosen)) <= limit
    assert bool(chosen) == bool(rows)


@given(candidates, st.integers(1, 4))
def test_a_batch_is_full_while_its_group_has_more_candidates(rows: list[Candidate], limit: int) -> None:
    chosen = choose(rows, merged="x", limit=limit)
    if chosen:
        group = next(row.group for row in rows if row.key == chosen[0])
        assert len(chosen) == min(limit, Counter(row.group for row in rows)[group])


@given(candidates, st.integers(1, 4))
def test_every_candidate_is_chosen_eventually(rows: list[Candidate], limit: int) -> None:
    """Steps that never end: every candidate takes part within a bounded number of passes."""
    merged: Hashable = "x"
    waited = {row.key: 0 for row in rows}
    bound = 6 * (len(rows) + 1)
    for _ in range(bound * 2):
        current = [Candidate(key=r.key, group=r.group, adapters=r.adapters, skipped=waited[r.key]) for r in rows]
        chosen = choose(current, merged=merged, limit=limit)
        merged = next((r.adapters for r in rows if r.key in chosen), merged)
        waited = {key: 0 if key in chosen else passes + 1 for key, passes in waited.items()}
        assert all(passes <= bound for passes in waited.values())


def test_merged_adapters_stay_until_another_request_is_overdue() -> None:
    mine = Candidate(key=1, group="g", adapters="merged", skipped=0)
    other = Candidate(key=2, group="h", adapters="other", skipped=3)
    assert choose([mine, other], merged="merged", limit=4, patience=4) == [1]
    overdue = Candidate(key=2, group="h", adapters="other", skipped=4)
    assert choose([mine, overdue], merged="merged", limit=4, patience=4) == [2]
