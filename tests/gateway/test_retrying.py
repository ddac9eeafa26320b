"""Which failed attempts are repeated, and when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentflow.errors import (
    DeadlineError,
    FailedPreconditionError,
    InternalError,
    InvalidRequestError,
    LatentflowError,
    NotFoundError,
    OverloadedError,
    OwnerLostError,
    UnavailableError,
)
from latentflow.reasons import Reason
from latentflow_gateway.retrying import MAX_FAILURES, decide


@pytest.mark.parametrize("kind", [InvalidRequestError, NotFoundError, FailedPreconditionError, DeadlineError])
def test_errors_that_would_occur_again_are_not_repeated(kind: type[LatentflowError]) -> None:
    assert decide(kind("no"), failures=0) is None


def test_a_lost_tensor_does_not_repeat_the_stage_that_reads_it() -> None:
    assert decide(OwnerLostError("lost"), failures=0) is None


def test_a_stage_whose_replica_is_lost_is_repeated_a_bounded_number_of_times() -> None:
    failures = 0
    while (retry := decide(UnavailableError("gone", reason=Reason.STAGE_BROKEN_OFF), failures=failures)) is not None:
        failures = retry.failures
    assert failures == MAX_FAILURES


def test_an_internal_error_is_repeated_once() -> None:
    first = decide(InternalError("oops"), failures=0)
    assert first is not None
    assert decide(InternalError("oops"), failures=first.failures) is None


@given(st.integers(0, 100), st.floats(0, 100))
def test_a_full_queue_does_not_count_as_a_failure_and_its_delay_is_bounded(failures: int, delay: float) -> None:
    retry = decide(OverloadedError("full", retry_after=delay), failures=failures)
    assert retry is not None
    assert retry.failures == failures
    assert 0 < retry.seconds <= 2.0
