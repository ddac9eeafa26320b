"""Running out of the device's memory: how it is recognised, and what the request that caused it is answered."""

from __future__ import annotations

import torch
from latentflow.errors import FailedPreconditionError, LatentflowError
from latentflow.reasons import Reason


def is_out_of_memory(error: Exception) -> bool:
    """Whether a forward pass failed because its device has no memory left."""
    # On the CPU torch raises a RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def out_of_memory() -> LatentflowError:
    """The error of a request that does not fit even alone."""
    return FailedPreconditionError(
        "The memory of the server's device does not suffice for this request alone. Request a smaller image, or give the "
        "model a device with more memory or a half-precision dtype.",
        reason=Reason.OUT_OF_MEMORY,
    )
