"""Which requests share the next forward pass: a pure decision over the requests at a step boundary.

The engine calls `choose` before every step. Requests can share a pass when their groups are equal (shapes), and their
adapters are either one set, which is merged, or applied by row, which makes a pass longer. The cost decides between them
(`is_by_row_cheaper`). The group of the request that received the least time (see `shares`) is next. To merge another adapter set takes time in
which nothing is denoised, so a merged set stays, while its requests have steps to do, until requests with other sets have
waited for a multiple of the time that a merge takes: merging then takes a small share of the time, however many sets there
are.

Sharing a pass is worth it while the device has room left in it. A pass that takes twice as long for twice the rows ends
nothing sooner, but all requests of it end late. So of a group run the fewest requests at a time that end all of them about
as soon as running all does. Those with the highest response ratio come first (Brinch Hansen, "An analysis of response
ratio scheduling", 1971): short ones overtake long ones, and nobody is overtaken for ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

# Merging takes at most one part in so many of the time, unless a merged set has no steps left to do.
_MERGES = 50
# How many times as long a pass takes with adapters by row. Measured on one core of a busy machine: 1.15 to 1.3, with four LoRAs
# that change 84 of the 119 layers of the shapes pack's UNet.
BY_ROW = 1.2
# A pass of unknown rows is estimated from known ones by a fixed part, which takes as long as so many rows. Measured on
# two cores of a busy machine: 2.4 to 3.6 rows for the UNet of the shapes pack.
_FIXED_ROWS = 2.0
# By how much the requests of a group may end later than if all of them shared each pass. Simulated with random arrivals
# and passes of a + b * requests: with 5 %, mean and 95th percentile of the latency are nowhere worse, and up to 25 %
# better; with 10 %, the latter is worse for some.
_LATER = 0.05


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A request at a step boundary.

    Attributes:
        key: Which request.
        group: Equal for requests that may share a forward pass, if their adapters allow it.
        adapters: The adapter set that it needs; (): none.
        must_merge: Its adapters are never applied by row.
        waited: Seconds since it last took part in a pass, or since it was admitted.
        received: Seconds of passes that it took part in, on the scale of `shares.Shares`.
        age: Seconds since it was admitted.
        steps_left: At least 1.
        rows: Its rows in a pass.
        pass_seconds: Seconds of a pass at its size of latents by rows, as far as they are known.
    """

    key: int
    group: Hashable
    adapters: Hashable
    waited: float
    received: float
    must_merge: bool = False
    age: float = 0.0
    steps_left: int = 1
    rows: int = 1
    pass_seconds: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The adapter set that is merged at present.

    Attributes:
        adapters: The set; (): none, as passes with adapters by row need it.
        age: Seconds since it was merged.
        merge_seconds: How long it takes to merge a set; 0 before the first measurement.
    """

    adapters: Hashable = ()
    age: float = 0.0
    merge_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Most requests in one forward pass.

    Attributes:
        merged: With one adapter set for all, or without adapters; at least 1.
        by_row: With adapters by row; 0: no pass has them.
    """

    merged: int
    by_row: int


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The next pass.

    Attributes:
        keys: Its requests.
        by_row: Each row has its own adapters, and none is merged. Otherwise all requests have one set, which is merged.
        adapters: The set that has to be merged.
    """

    keys: tuple[int, ...] = ()
    by_row: bool = False
    adapters: Hashable = ()


def choose(candidates: Sequence[Candidate], *, merged: Merged, limits: Limits) -> Choice:
    """Candidates of one group; no keys only for no candidates.

    Args:
        candidates: In order of arrival.
    """
    if not candidates:
        return Choice()
    # Each candidate that may take part in the next pass, with the pass that it is in.
    passes: list[tuple[Candidate, Choice]] = []
    for members in _split(candidates, lambda c: c.group).values():
        if is_by_row_cheaper(members, merged=merged, limits=limits):
            passes += _batch(members, limits.by_row, by_row=True)
        else:
            for its in _split(members, lambda c: c.adapters).values():
                passes += _batch(its, limits.merged, by_row=False)
    stays = _MERGES * merged.merge_seconds
    passes.sort(key=lambda one: (one[0].received, -one[0].waited))
    fitting = [choice for _, choice in passes if choice.adapters == merged.adapters]
    overdue = [c for one, c in passes if c.adapters != merged.adapters and min(one.waited, merged.age) >= stays]
    return (overdue or fitting or [choice for _, choice in passes])[0]


def is_by_row_cheaper(group: Sequence[Candidate], *, merged: Merged, limits: Limits) -> bool:
    """Whether the next steps of a group take less time with adapters by row than with its sets merged in turn.

    It compares the passes of the steps that the candidates have left on average, and the changes of the merged set that they
    need. False for a single set, which is merged, and before the duration of any pass is known.
    """
    sets = _split(group, lambda c: c.adapters)
    if len(sets) < 2 or not limits.by_row or any(candidate.must_merge for candidate in group):
        return False
    together = BY_ROW * _step_seconds(group, limit=limits.by_row)
    if not together:
        return False
    steps = sum(candidate.steps_left for candidate in group) / len(group)
    by_row = steps * together + merged.merge_seconds * (merged.adapters != ())
    in_turn = steps * sum(_step_seconds(its, limit=limits.merged) for its in sets.values())
    in_turn += merged.merge_seconds * len(sets.keys() - {merged.adapters})
    return by_row < in_turn


def _step_seconds(sharing: Sequence[Candidate], *, limit: int) -> float:
    """Seconds of the passes in which candidates that share passes do one step each; 0 where no pass is known."""
    passes = math.ceil(len(sharing) / limit)
    return passes * _estimated(sum(c.rows for c in sharing) / passes, known=sharing[0].pass_seconds)


def _estimated(rows: float, *, known: Mapping[int, float]) -> float:
    """Seconds of a pass of so many rows, by the known pass with the nearest number of rows; 0 where none is known."""
    if not known:
        return 0.0
    nearest = min(known, key=lambda one: abs(one - rows))
    return known[nearest] * (_FIXED_ROWS + rows) / (_FIXED_ROWS + nearest)


def _split(candidates: Sequence[Candidate], key: Callable[[Candidate], Hashable]) -> dict[Hashable, list[Candidate]]:
    found: dict[Hashable, list[Candidate]] = {}
    for candidate in candidates:
        found.setdefault(key(candidate), []).append(candidate)
    return found


def _batch(members: Sequence[Candidate], limit: int, *, by_row: bool) -> list[tuple[Candidate, Choice]]:
    """Who of candidates that can share a pass takes part in the next one."""
    batch = sorted(members, key=lambda c: -c.age / c.steps_left)[:limit]
    known = batch[0].pass_seconds
    rows = list(accumulate(c.rows for c in batch))
    whole = known.get(rows[-1], 0.0)
    for count, few in enumerate(rows, start=1):
        if few in known and math.ceil(rows[-1] / few) * known[few] <= whole * (1 + _LATER):
            batch = batch[:count]
            break
    keys = tuple(c.key for c in batch)
    choice = Choice(keys=keys, by_row=by_row, adapters=() if by_row else batch[0].adapters)
    return [(candidate, choice) for candidate in batch]
