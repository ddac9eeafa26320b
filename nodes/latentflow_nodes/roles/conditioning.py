"""The check that a request's conditioning fits a denoiser or a ControlNet."""

from __future__ import annotations

from latentflow.errors import FailedPreconditionError, InvalidRequestError
from latentflow.internal.guidance import Guidance
from latentflow.reasons import Reason

from latentflow_nodes.families.base import NEGATIVE, Conditioning, Shape


def check_conditioning(conditioning: Conditioning, shapes: dict[str, Shape], guidance: Guidance) -> None:
    """Raises where a tensor is missing or of another shape than the network takes.

    Args:
        shapes: The conditioning that the network takes, of one half.
    """
    expected = shapes | ({NEGATIVE + name: shape for name, shape in shapes.items()} if guidance.has_halves else {})
    if missing := sorted(expected.keys() - conditioning.keys()):
        raise InvalidRequestError(f"The conditioning lacks {', '.join(missing)}.")
    for name, shape in expected.items():
        found = tuple(conditioning[name].shape)
        if len(found) != len(shape) or any(b is not None and a != b for a, b in zip(found, shape, strict=True)):
            raise FailedPreconditionError(
                f"The text encoder's {name} is of shape {_written(found)}, this model takes {_written(shape)}; "
                "they belong to different base models.",
                reason=Reason.TEXT_ENCODER_MISMATCH,
            )


def _written(shape: Shape) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"
