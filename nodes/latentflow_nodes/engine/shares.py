"""How much of the time each running request has received, so that requests that cannot share passes share the time.

Passes of a large image take many times as long as those of a small one. If they alternated, each step of the small image
would wait for a step of the large one; with equal shares of the time the small one waits for about one.
"""

from __future__ import annotations

from collections.abc import Iterable


class Shares:
    """Seconds of passes by request, on one scale.

    A request starts at the value of the one that was served last, and a request that was not served for a while, such
    as one with late residuals, is raised to it: nobody makes up for time before its admission or for time that it did not need.
    """

    def __init__(self) -> None:
        self._received: dict[int, float] = {}
        self._served = 0.0

    def admit(self, key: int) -> None:
        self._received[key] = self._served

    def retire(self, key: int) -> None:
        self._received.pop(key, None)

    def of(self, key: int) -> float:
        """The value of an admitted request, in seconds. The one with the least is the next to be served."""
        return max(self._received[key], self._served)

    def serve(self, keys: Iterable[int], *, seconds: float) -> None:
        """Adds a pass, in full, to each request that took part in it. Retired ones are ignored."""
        found = {key: self.of(key) for key in keys if key in self._received}
        if found:
            self._served = min(found.values())
            self._received.update({key: received + seconds for key, received in found.items()})
