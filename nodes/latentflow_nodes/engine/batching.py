"""Which requests share the next forward pass: a pure decision over the requests at a step boundary.

The engine calls `choose` before every step. Requests can share a pass when their groups are equal (shapes and adapters).
The request that received the least time (see `shares`) decides the group. To merge another adapter set takes time in which nothing is denoised,
so a merged set stays, while its requests have steps to do, until requests with other sets have waited for a multiple of
the time that a merge takes: merging then takes a small share of the time, however many sets there are.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

# Merging takes at most one part in so many of the time, unless a merged set has no steps left to do.
_MERGES = 50


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A request at a step boundary.

    Attributes:
        key: Which request.
        group: Equal for requests that may share a forward pass.
        adapters: The adapter set that it needs merged.
        waited: Seconds since it last took part in a pass, or since it was admitted.
        received: Seconds of passes that it took part in, on the scale of `shares.Shares`.
    """

    key: int
    group: Hashable
    adapters: Hashable
    waited: float
    received: float


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The adapter set that is merged at present.

    Attributes:
        adapters: The set.
        age: Seconds since it was merged.
        merge_seconds: How long it takes to merge a set; 0 before the first measurement.
    """

    adapters: Hashable = ()
    age: float = 0.0
    merge_seconds: float = 0.0


def choose(candidates: Sequence[Candidate], *, merged: Merged, limit: int) -> list[int]:
    """Keys of at most `limit` candidates of one group, the one that received least first; empty only for no candidates.

    Args:
        candidates: In order of arrival.
        limit: Most requests in one forward pass, at least 1.
    """
    if not candidates:
        return []
    stays = _MERGES * merged.merge_seconds
    ordered = sorted(candidates, key=lambda c: (c.received, -c.waited))
    fitting = [c for c in ordered if c.adapters == merged.adapters]
    overdue = [c for c in ordered if c.adapters != merged.adapters and min(c.waited, merged.age) >= stays]
    leader = (overdue or fitting or ordered)[0]
    return [c.key for c in ordered if c.group == leader.group][:limit]
