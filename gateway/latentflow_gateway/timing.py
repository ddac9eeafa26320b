"""The timing of one stage of one image, from its first attempt to its last one."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from latentflow.v1 import generation_pb2


@dataclass(kw_only=True)
class Timing:
    """The timing of one stage of one image, and how many of its steps ran without the request's LoRAs.

    Attributes:
        started, ended: Of the first attempt and of the last one, by `time.perf_counter`.
        replica: Address of the replica of the last attempt.
        forward_ns, wait_ns: As in StageTiming, in nanoseconds.
    """

    stage: str
    image: int
    started: float = field(default_factory=time.perf_counter)
    ended: float = 0.0
    attempts: int = 0
    replica: str = ""
    forward_ns: int = 0
    wait_ns: int = 0
    steps_without_loras: int = 0

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    def message(self) -> generation_pb2.StageTiming:
        """As clients get it."""
        message = generation_pb2.StageTiming(
            stage=self.stage, image=self.image, replica=self.replica, attempts=self.attempts
        )
        message.wall.FromNanoseconds(int(self.seconds * 1e9))
        message.forward.FromNanoseconds(self.forward_ns)
        message.wait.FromNanoseconds(self.wait_ns)
        return message
