"""What every role provides: the calls that it serves, its description, warm-up, sleep and close.

Each role derives from `Role` and overrides its own calls; those of other roles are refused here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import ClassVar

from latentflow.errors import FailedPreconditionError, UnavailableError, UnimplementedError
from latentflow.reasons import Reason
from latentflow.v1 import control_pb2, stage_pb2, tensors_pb2

from latentflow_nodes.families.base import Shape
from latentflow_nodes.settings import NodeSettings

# What loading a model raises that is damaged, incomplete or of another kind.
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError)


class Role(ABC):
    """A loaded model and the calls that it serves.

    Attributes:
        calls: The methods of the Stage service that the role serves.
        family: Name of the model's family; empty where it has none.
        content_digest: SHA-256 of its weights, hexadecimal.
        weights_bytes: Size of the weights on the device while the server is awake.
    """

    calls: ClassVar[tuple[str, ...]]
    family: str
    content_digest: str
    weights_bytes: int

    @abstractmethod
    def describe(self, response: control_pb2.DescribeResponse) -> None:
        """Fills in the role's own part of a description."""

    @abstractmethod
    async def warm_up(self) -> None:
        """Runs the model once, so that the first request pays no one-time cost."""

    @abstractmethod
    async def sleep(self) -> None:
        """Frees the memory of the weights, while no call runs. Has no effect on a role that sleeps already."""

    @abstractmethod
    async def wake(self) -> None:
        """Restores the weights, and runs the model once. Whatever it raises, the role sleeps then.

        Raises:
            OverloadedError: Reason DEVICE_FULL; the device has too little free memory.
            FailedPreconditionError: The files of the weights are missing or have changed.
        """

    async def stop_calls(self) -> None:
        """Ends the running calls that can be resumed, with the error of `asleep`; returns when these have ended."""
        return

    @abstractmethod
    def close(self) -> None:
        """Ends the role's threads."""

    async def encode(self, request: stage_pb2.EncodeRequest) -> stage_pb2.EncodeResponse:
        raise self._refusal("Encode")

    def denoise(
        self, opening: stage_pb2.DenoiseOpen, later: AsyncIterator[stage_pb2.DenoiseRequest]
    ) -> AsyncIterator[stage_pb2.DenoiseResponse]:
        """The events of one image.

        Args:
            later: The messages of the stream after the opening one.
        """
        raise self._refusal("Denoise")

    async def decode(self, request: stage_pb2.DecodeRequest) -> stage_pb2.DecodeResponse:
        raise self._refusal("Decode")

    async def adapter(self, request: stage_pb2.AdapterRequest) -> Iterator[tensors_pb2.TensorChunk]:
        """The chunks of one component's part of an adapter; a bundle of no tensor where it has none."""
        raise self._refusal("Adapter")

    def residuals(
        self, requests: AsyncIterator[stage_pb2.ResidualsRequest]
    ) -> AsyncIterator[stage_pb2.ResidualsResponse]:
        """Answers a request's steps in their order."""
        raise self._refusal("Residuals")

    def predict_noise(
        self, requests: AsyncIterator[stage_pb2.PredictNoiseRequest]
    ) -> AsyncIterator[stage_pb2.PredictNoiseResponse]:
        """Answers the steps of one guidance half in their order."""
        raise self._refusal("PredictNoise")

    @staticmethod
    def _named(shapes: Mapping[str, Shape]) -> list[control_pb2.NamedShape]:
        """Shapes as a description has them."""
        return [
            control_pb2.NamedShape(name=name, shape=[size or 0 for size in shape]) for name, shape in shapes.items()
        ]

    def _refusal(self, call: str) -> UnimplementedError:
        return UnimplementedError(
            f"This server is a {type(self).__name__} and does not serve {call}. The caller's directory is wrong."
        )


def asleep() -> UnavailableError:
    """The error of a call to a server that sleeps or falls asleep."""
    return UnavailableError(
        "This server is asleep, or falls asleep; try another replica.", reason=Reason.ASLEEP, retry_after=0.2
    )


def does_not_load(settings: NodeSettings, error: Exception) -> FailedPreconditionError:
    """The error of a model whose files cannot be loaded."""
    why = " ".join(str(error).split()).rstrip(". ")
    return FailedPreconditionError(
        f"{settings.role} {settings.uri}{'/' + settings.subfolder if settings.subfolder else ''} does not load: "
        f"{type(error).__name__}: {why}. Check that the folder is complete and holds a {settings.role}.",
        reason=Reason.WEIGHTS_UNAVAILABLE,
    )
