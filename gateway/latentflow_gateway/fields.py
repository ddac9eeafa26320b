"""Errors that name the field of a request: the HTTP API reports it as the parameter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from latentflow.errors import InvalidRequestError

# The key of an error's details for the field of the request that is wrong.
FIELD = "field"


@contextlib.contextmanager
def naming(field: str) -> Iterator[None]:
    """Adds the field of the request to an InvalidRequestError of a check that client and model servers share."""
    try:
        yield
    except InvalidRequestError as error:
        raise wrong(field, error.message) from None


def wrong(field: str, message: str) -> InvalidRequestError:
    return InvalidRequestError(message, details={FIELD: field})
