"""A replica that is lent to a request of another one, as its guidance peer: lost, or taken back, or kept to the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import structlog
from latentflow.reasons import Reason
from latentflow.v1 import stage_pb2

if TYPE_CHECKING:
    from latentflow_gateway.replicas import Replica

_log = structlog.get_logger()


class Loan:
    """One loan, which counts at the replica until it ends.

    Args:
        is_revocable: It ends when the replica gets a request of its own.

    Attributes:
        over: Set when the loan has ended.
        is_taken_back: It has ended because the replica got a request of its own.
    """

    def __init__(self, replica: Replica, *, is_revocable: bool) -> None:
        self.replica = replica
        self.is_revocable = is_revocable
        self.over = asyncio.Event()
        self.is_taken_back = False
        replica.loans.add(self)

    def take_back(self) -> None:
        self.is_taken_back = True
        self.end()

    def lost(self, reason: str) -> None:
        """The denoiser continues without the replica; only the health of one that did not answer has to be checked."""
        _log.info("guidance peer lost", replica=self.replica.address, reason=reason)
        self.end()
        if reason == Reason.PEER_UNAVAILABLE:
            self.replica.suspect()

    def end(self) -> None:
        self.replica.loans.discard(self)
        self.over.set()


async def denoise_requests(
    opening: stage_pb2.DenoiseOpen, loan: Loan | None
) -> AsyncIterator[stage_pb2.DenoiseRequest]:
    """The messages of a Denoise call: the denoiser gives up the guidance peer that is taken back."""
    yield stage_pb2.DenoiseRequest(open=opening)
    if loan is not None:
        await loan.over.wait()
        if loan.is_taken_back:
            yield stage_pb2.DenoiseRequest(guidance=stage_pb2.DenoiseGuidance())
