"""The scaling policy: a pure function from a model's load to its number of replicas, one model at a time.

The operator and the embedded runtime both act on it. The offered load of a model, in replicas, is its arrival rate
times the computing time of a request, plus what it takes to clear the backlog in a given time. The policy adds replicas
at once and removes them only after fewer have been enough for some time, so that a pause between two bursts causes no
restarts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Rates below this count as zero: one request in thirty years. Dividing by a smaller number could overflow.
_ZERO = 1e-9


@dataclass(frozen=True, kw_only=True)
class Load:
    """The measured load of one model.

    Attributes:
        arrival_rate: Requests per second that arrive.
        service_seconds: Seconds of computing per request; 0 if no request has completed.
        busy: Seconds of computing per second, summed over all replicas; at most the number of replicas.
        queued: Requests queued inside the model's servers.
        held: Requests that gateways hold because no replica accepts them.
        running: Requests being computed.
    """

    arrival_rate: float
    service_seconds: float
    busy: float
    queued: float
    held: float
    running: float = 0.0

    @property
    def offered(self) -> float:
        """Replicas that the arriving requests keep busy: seconds of computing per second.

        This is not `busy`: replicas that clear a backlog compute all the time, so `busy` would demand ever more
        replicas. But with an empty queue the offered load is at most `busy`, so that a rate measured from a few long
        requests cannot exaggerate it.
        """
        if self.service_seconds <= _ZERO:
            return self.busy
        offered = self.arrival_rate * self.service_seconds
        return offered if self.queued > 0 or self.held > 0 else min(offered, self.busy)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The least and the largest number of replicas. With `minimum` 0 an idle model has no replica."""

    minimum: int
    maximum: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Parameters of the policy.

    Attributes:
        target_utilization: Share of its time that a replica should compute, 0 to 1; the remainder absorbs bursts.
        backlog_seconds: Time in which queued requests should be completed.
        up_seconds: Least time between two scale-ups, because an added replica has to start before it shows in the load.
        down_seconds: How long fewer replicas have to be enough before some are removed.
        idle_seconds: How long a model has to be idle before its last replica is removed, if the minimum is 0.
    """

    target_utilization: float = 0.7
    backlog_seconds: float = 20.0
    up_seconds: float = 30.0
    down_seconds: float = 120.0
    idle_seconds: float = 300.0


@dataclass(frozen=True, kw_only=True)
class State:
    """What the policy remembers of a model between two decisions; times are seconds of any monotonic clock.

    Attributes:
        scale_down_since: Since when fewer replicas are enough; None if they are not.
        highest_wanted: The largest number of replicas wanted since then.
        last_scale_up_at: When replicas were last added.
        last_request_at: When the model last had a request; None before the first decision with signals.
    """

    scale_down_since: float | None = None
    highest_wanted: int = 0
    last_scale_up_at: float = -math.inf
    last_request_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The number of replicas that a model should have, and the reason in one line."""

    replicas: int
    reason: str


def decide(
    load: Load | None, *, current: int, bounds: Bounds, state: State, now: float, settings: Settings
) -> tuple[Decision, State]:
    """Decides the next number of replicas.

    Args:
        load: None if the load is unknown; the number of replicas then stays the same, within the bounds.
        current: The number of replicas that the model should have at present.
        now: Not before any time in `state`.
    """
    if load is None:
        # Whether fewer replicas are enough is unknown as well, so that period starts again.
        return (
            Decision(replicas=_clamp(current, bounds), reason="holding: no signals"),
            State(last_scale_up_at=state.last_scale_up_at, last_request_at=state.last_request_at),
        )
    has_requests = load.arrival_rate > 0 or load.queued > 0 or load.held > 0 or load.running > 0
    last_request_at = now if has_requests or state.last_request_at is None else state.last_request_at
    if load.running > 0 and load.busy <= _ZERO:
        # A step is counted when it completes. Before the first one the figures do not show the cost of running
        # requests.
        return (
            Decision(
                replicas=_clamp(current, bounds),
                reason=f"{current}: {load.running:.0f} requests run and no step has completed",
            ),
            State(last_scale_up_at=state.last_scale_up_at, last_request_at=last_request_at),
        )
    # Scale down only if the remaining replicas can do what is computed now: requests longer than the window of the
    # rates arrive too seldom to show in the arrival rate.
    wanted = max(_wanted(load, settings), min(current, _replicas(load.busy, settings)))
    wanted = _clamp(wanted, bounds)
    if wanted == 0 and current > 0 and now - last_request_at < settings.idle_seconds:
        wanted = 1
    figures = _describe(load, settings)
    since, last_scale_up_at = state.scale_down_since, state.last_scale_up_at
    highest_wanted = max(state.highest_wanted, wanted)
    if wanted >= current or since is None:
        since, highest_wanted = (None, 0) if wanted >= current else (now, wanted)
    replicas = _clamp(current, bounds)
    if replicas != current:
        reason = f"{replicas}, by the bounds {bounds.minimum} to {bounds.maximum}"
    elif wanted > current and (current == 0 or now - last_scale_up_at >= settings.up_seconds):
        replicas, last_scale_up_at = wanted, now
        reason = f"up to {replicas}: {figures}"
    elif wanted > current:
        reason = f"{current}, {wanted} wanted once the replicas added last have started: {figures}"
    elif since is not None and now - since >= settings.down_seconds:
        replicas, since, highest_wanted = highest_wanted, None, 0
        reason = f"down to {replicas}: {figures}"
    else:
        reason = f"{current}: {figures}"
    return Decision(replicas=replicas, reason=reason), State(
        scale_down_since=since,
        highest_wanted=highest_wanted,
        last_scale_up_at=last_scale_up_at,
        last_request_at=last_request_at,
    )


def demand(load: Load, settings: Settings) -> float:
    """The offered load plus the backlog's computing time over the time allowed for it, in fully busy replicas."""
    return load.offered + (load.queued + load.held) * load.service_seconds / settings.backlog_seconds


def _wanted(load: Load, settings: Settings) -> int:
    wanted = _replicas(demand(load, settings), settings)
    if load.held > 0 or load.queued > 0:
        # Requests wait although their cost may still be unknown.
        return max(1, wanted)
    return wanted


def _replicas(load: float, settings: Settings) -> int:
    return math.ceil(load / settings.target_utilization - 1e-9)


def _clamp(count: int, bounds: Bounds) -> int:
    return min(max(count, bounds.minimum), bounds.maximum)


def _describe(load: Load, settings: Settings) -> str:
    backlog = load.queued + load.held
    queued = f", {backlog:.0f} queued" if backlog else ""
    return (
        f"{load.arrival_rate:.2f}/s × {load.service_seconds:.2f} s, load {load.offered:.2f}{queued}, "
        f"target utilization {settings.target_utilization:.0%}"
    )
