"""What a model's load asks for: pure, one model at a time. The operator and the embedded runtime act on it.

A replica that computes all the time is full. What is asked of a model, in replicas, is therefore the time that its requests
cost (arrivals per second × seconds of computing each), and what it takes to work off those that wait. More are added at
once; fewer only when fewer would have done for a while, so that a pause between two bursts costs no restarts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# A rate below this is none, one request in thirty years; dividing by still less would overflow.
_NONE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of one model.

    Attributes:
        arrivals: Requests per second that have come.
        service_seconds: Of computing that one request costs; 0 where none has ended.
        busy: Seconds of computing per second, over all replicas; at most their number.
        waiting: Requests that wait inside the model's servers.
        held: Requests that gateways hold because no replica takes them.
        running: Requests that are being computed.
    """

    arrivals: float
    service_seconds: float
    busy: float
    waiting: float
    held: float
    running: float = 0.0

    @property
    def work(self) -> float:
        """Replicas that those who come ask for: seconds of computing per second.

        Not what is computed: replicas that work off a backlog compute all the time, and would ask for more and more. But while
        nobody waits no more is asked for than is computed, so that a rate taken of few, long requests cannot exaggerate.
        """
        if self.service_seconds <= _NONE:
            return self.busy
        asked = self.arrivals * self.service_seconds
        return asked if self.waiting > 0 or self.held > 0 else min(asked, self.busy)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Fewest and most replicas; fewest 0 lets a model that nobody asks for have none."""

    fewest: int
    most: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a load becomes a number of replicas.

    Attributes:
        full: Share of its time that a replica should compute, 0 to 1; what is left absorbs bursts.
        backlog_seconds: In which time those that wait should be worked off.
        up_seconds: Least time between two additions: what was added has to start before it shows.
        down_seconds: For how long fewer replicas have to do before some go.
        idle_seconds: For how long nobody has asked before the last replica goes, where `fewest` is 0.
    """

    full: float = 0.7
    backlog_seconds: float = 20.0
    up_seconds: float = 30.0
    down_seconds: float = 120.0
    idle_seconds: float = 300.0


@dataclass(frozen=True, kw_only=True)
class State:
    """What is remembered of a model from one decision to the next; times in seconds of any clock.

    Attributes:
        below: Since when fewer replicas would do; None: they would not.
        enough: The most that were wanted since then.
        added: When replicas were added last.
        asked: When somebody asked last; None: not since it is watched.
    """

    below: float | None = None
    enough: int = 0
    added: float = -math.inf
    asked: float | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How many replicas there shall be, and why in one line."""

    replicas: int
    reason: str


def decide(
    load: Load | None, *, current: int, bounds: Bounds, state: State, now: float, settings: Settings
) -> tuple[Decision, State]:
    """The next number of replicas.

    Args:
        load: None where nothing is known: then what is stays, within the bounds.
        current: Replicas there shall be now.
        now: Never before the state's times.
    """
    if load is None:
        # How long fewer would have done is not known either: that is counted anew.
        return (
            Decision(replicas=_within(current, bounds), reason="holding: no signals"),
            State(added=state.added, asked=state.asked),
        )
    asks = load.arrivals > 0 or load.waiting > 0 or load.held > 0 or load.running > 0
    asked = now if asks or state.asked is None else state.asked
    if load.running > 0 and load.busy <= _NONE:
        # Steps are counted when they end: with none that has, the figures say nothing of what those that run cost.
        return (
            Decision(
                replicas=_within(current, bounds), reason=f"{current}: {load.running:.0f} run, and no step has ended"
            ),
            State(added=state.added, asked=asked),
        )
    # Fewer only where those that are left can do what is computed now: of requests longer than the rates' window few come.
    wanted = max(_wanted(load, settings), min(current, _replicas(load.busy, settings)))
    wanted = _within(wanted, bounds)
    if wanted == 0 and current > 0 and now - asked < settings.idle_seconds:
        wanted = 1
    said = _said(load, settings)
    below, enough, added = state.below, max(state.enough, wanted), state.added
    if wanted >= current or below is None:
        below, enough = (None, 0) if wanted >= current else (now, wanted)
    replicas = _within(current, bounds)
    if replicas != current:
        reason = f"{replicas} by the bounds {bounds.fewest} to {bounds.most}"
    elif wanted > current and (current == 0 or now - added >= settings.up_seconds):
        replicas, added = wanted, now
        reason = f"up to {replicas}: {said}"
    elif wanted > current:
        reason = f"{current}, {wanted} when what was added has started: {said}"
    elif below is not None and now - below >= settings.down_seconds:
        replicas, below, enough = enough, None, 0
        reason = f"down to {replicas}: {said}"
    else:
        reason = f"{current}: {said}"
    return Decision(replicas=replicas, reason=reason), State(below=below, enough=enough, added=added, asked=asked)


def demand(load: Load, settings: Settings) -> float:
    """Replicas' worth of work: rate × service time, and the backlog over the time it may take."""
    return load.work + (load.waiting + load.held) * load.service_seconds / settings.backlog_seconds


def _wanted(load: Load, settings: Settings) -> int:
    wanted = _replicas(demand(load, settings), settings)
    if load.held > 0 or load.waiting > 0:
        # Somebody waits, and what a request costs may not be known yet.
        return max(1, wanted)
    return wanted


def _replicas(work: float, settings: Settings) -> int:
    return math.ceil(work / settings.full - 1e-9)


def _within(count: int, bounds: Bounds) -> int:
    return min(max(count, bounds.fewest), bounds.most)


def _said(load: Load, settings: Settings) -> str:
    waits = load.waiting + load.held
    backlog = f", {waits:.0f} waiting" if waits else ""
    return (
        f"{load.arrivals:.2f}/s × {load.service_seconds:.2f} s, {load.work:.2f} replicas' work{backlog}, "
        f"at {settings.full:.0%} each"
    )
