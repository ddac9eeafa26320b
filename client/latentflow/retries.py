"""When a client sends a failed request again. Pure.

This is safe because a request carries its seed and an idempotency key: the gateway returns the events of the request that
runs already, or generates the same images again.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from latentflow.errors import LatentflowError


@dataclass(frozen=True, kw_only=True)
class Retries:
    """Exponential backoff with jitter.

    Attributes:
        attempts: Attempts in all, at least 1; 1 means no retries.
        first: Longest pause before the second attempt, in seconds; it doubles from attempt to attempt.
        longest: Longest pause between two attempts, in seconds.
    """

    attempts: int = 8
    first: float = 0.2
    longest: float = 5.0

    def pause(self, error: LatentflowError, *, failures: int, remaining: float | None) -> float | None:
        """Seconds until the next attempt; None: the request fails with the error.

        Args:
            failures: Failed attempts, including the last.
            remaining: Seconds until the caller's deadline; None: no deadline.
        """
        if not error.retryable or failures >= self.attempts:
            return None
        pause = min(self.longest, self.first * 2 ** (failures - 1)) * (0.5 + random.random() / 2)
        if error.retry_after is not None:
            pause = max(pause, min(error.retry_after, self.longest))
        return None if remaining is not None and pause >= remaining else pause


NO_RETRIES = Retries(attempts=1)
