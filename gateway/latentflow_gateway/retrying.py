"""Whether a failed attempt at a stage is repeated, and when. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass

from latentflow.errors import InternalError, LatentflowError, OverloadedError, UnavailableError
from latentflow.reasons import Reason

# Failed attempts after which one stage of one image fails; a full queue does not count as a failure.
MAX_FAILURES = 6
_FIRST_SECONDS = 0.05
_LONGEST_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Repeat the attempt after `seconds`; `failures` is the count of failures from then on."""

    seconds: float
    failures: int


def decide(error: LatentflowError, *, failures: int, draw: float | None = None) -> Retry | None:
    """When to repeat a failed attempt, on any replica that is ready then; None: the stage fails with the error.

    Args:
        failures: Failed attempts before this one.
        draw: Jitter from 0 to 1; random where not given.
    """
    jitter = 0.5 + (random.random() if draw is None else draw) / 2
    pause = min(_LONGEST_SECONDS, _FIRST_SECONDS * 2**failures) * jitter
    if isinstance(error, OverloadedError):
        # The replica returns the delay; the request's deadline bounds the number of attempts.
        return Retry(
            seconds=max(_FIRST_SECONDS, min(error.retry_after or pause, _LONGEST_SECONDS)) * jitter, failures=failures
        )
    if isinstance(error, UnavailableError) and error.reason != Reason.MODEL_NOT_READY and failures < MAX_FAILURES:
        return Retry(seconds=pause, failures=failures + 1)
    if isinstance(error, InternalError) and failures == 0:
        return Retry(seconds=pause, failures=MAX_FAILURES)
    return None
