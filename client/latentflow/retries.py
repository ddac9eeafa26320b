"""When a failed request is sent again: pure.

Sending it again is safe because a request carries its seed and an idempotency key: the gateway joins a second delivery
to the first, or makes the same images anew.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from latentflow.errors import LatentflowError


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How often and how patiently.

    Attributes:
        attempts: Deliveries in all, at least 1; 1 means no retries.
        first, longest: Seconds before the second delivery, and the most between any two; doubling in between.
    """

    attempts: int = 8
    first: float = 0.2
    longest: float = 5.0

    def pause(self, error: LatentflowError, *, failures: int, remaining: float | None) -> float | None:
        """Seconds to wait before sending again; None: the error is the answer.

        Args:
            failures: Failed deliveries, this one included.
            remaining: Seconds to the caller's deadline; None: no deadline.
        """
        if not error.retryable or failures >= self.attempts:
            return None
        pause = min(self.longest, self.first * 2 ** (failures - 1)) * (0.5 + random.random() / 2)
        if error.retry_after is not None:
            pause = max(pause, min(error.retry_after, self.longest))
        return None if remaining is not None and pause >= remaining else pause


NO_RETRIES = Retries(attempts=1)
