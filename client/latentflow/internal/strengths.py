"""How strong LoRAs and ControlNets may be: the bounds that client, gateway and model servers check. Pure.

The bounds are far outside what gives an image, so that they refuse only mistakes.
"""

from __future__ import annotations

from latentflow.errors import InvalidRequestError

_MOST = 100.0


def lora_weight(value: float, *, name: str) -> float:
    """A LoRA's weight: from -100 to 100 and not 0. InvalidRequestError for others."""
    weight = _bounded(value, f"The weight of the LoRA {name!r}")
    if weight == 0:
        raise InvalidRequestError(f"The weight of the LoRA {name!r} is 0, which has no effect; leave the LoRA out.")
    return weight


def control_scale(value: float, *, name: str) -> float:
    """A ControlNet's conditioning scale: from -100 to 100. InvalidRequestError for others."""
    return _bounded(value, f"The scale of the ControlNet {name!r}")


def _bounded(value: object, what: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # A comparison with NaN is false.
    if not (is_number and -_MOST <= value <= _MOST):  # type: ignore[operator]
        raise InvalidRequestError(f"{what} must be from {-_MOST:g} to {_MOST:g}, not {value!r}.")
    return float(value)  # type: ignore[arg-type]
