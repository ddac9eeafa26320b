"""Which requests share the next forward pass: a pure decision over the requests at a step boundary.

The engine calls `choose` before every step. Requests can share a pass when their groups are equal (shape, conditioning,
guidance, adapters, ControlNets). The request that was skipped most often decides the group. A request whose adapters are
not merged at present is skipped at most `patience` times, so that two adapter sets do not alternate at every step.
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
        adapters: The adapter set that it needs merged.
        skipped: Forward passes since it last took part in one, or since it was admitted.
    """

    key: int
    group: Hashable
    adapters: Hashable
    skipped: int


def choose(candidates: Sequence[Candidate], *, merged: Hashable, limit: int, patience: int = 4) -> list[int]:
    """Keys of at most `limit` candidates of one group, the most often skipped first; empty only for no candidates.

    Args:
        candidates: In order of arrival.
        merged: The adapter set merged at present.
        limit: Most requests in one forward pass, at least 1.
        patience: How often a request with another adapter set than `merged` may be skipped.
    """
    if not candidates:
        return []
    ordered = sorted(candidates, key=lambda c: -c.skipped)
    fitting = [c for c in ordered if c.adapters == merged]
    overdue = [c for c in ordered if c.adapters != merged and c.skipped >= patience]
    leader = (overdue or fitting or ordered)[0]
    return [c.key for c in ordered if c.group == leader.group][:limit]
