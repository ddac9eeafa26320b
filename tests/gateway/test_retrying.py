"""What is tried again, and when."""

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
def test_what_would_fail_again_is_not_tried_again(kind: type[LatentflowError]) -> None:
    assert decide(kind("no"), failures=0) is None


def test_a_lost_tensor_is_for_the_stage_that_made_it() -> None:
    assert decide(OwnerLostError("lost"), failures=0) is None


def test_a_replica_that_went_away_is_tried_elsewhere_a_bounded_number_of_times() -> None:
    failures = 0
    while (retry := decide(UnavailableError("gone", reason=Reason.STAGE_BROKEN_OFF), failures=failures)) is not None:
        failures = retry.failures
    assert failures == MAX_FAILURES


def test_an_unexpected_failure_is_tried_once_more() -> None:
    first = decide(InternalError("oops"), failures=0)
    assert first is not None
    assert decide(InternalError("oops"), failures=first.failures) is None


@given(st.integers(0, 100), st.floats(0, 100))
def test_a_full_queue_is_no_failure_and_its_delay_is_kept_within_bounds(failures: int, delay: float) -> None:
    retry = decide(OverloadedError("full", retry_after=delay), failures=failures)
    assert retry is not None
    assert retry.failures == failures
    assert 0 < retry.seconds <= 2.0
