"""Which requests share the next forward pass: a pure decision over what waits at a step boundary.

The engine asks `choose` before every step. Requests can share a pass when their groups are equal (shape, conditioning,
guidance, adapters, ControlNets). The longest-waiting request decides the group; a group that needs other adapters than
those merged now has to wait `patience` passes, so that two adapter sets do not swap weights at every step.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A request at a step boundary.

    Attributes:
        key: Which request.
        group: Equal for requests that may share a forward pass.
        adapters: The adapter set it needs merged.
        waited: Forward passes since it last took part, or since it came.
    """

    key: int
    group: Hashable
    adapters: Hashable
    waited: int


def choose(candidates: Sequence[Candidate], *, merged: Hashable, limit: int, patience: int = 4) -> list[int]:
    """Keys of at most `limit` candidates of one group, longest wait first; empty only for no candidates.

    Args:
        candidates: In order of arrival.
        merged: The adapter set merged now.
        limit: Most requests in one forward pass, at least 1.
        patience: Passes that a request with another adapter set than `merged` waits before it is given way.
    """
    if not candidates:
        return []
    oldest_first = sorted(candidates, key=lambda c: -c.waited)
    fitting = [c for c in oldest_first if c.adapters == merged]
    overdue = [c for c in oldest_first if c.adapters != merged and c.waited >= patience]
    leader = (overdue or fitting or oldest_first)[0]
    return [c.key for c in oldest_first if c.group == leader.group][:limit]
