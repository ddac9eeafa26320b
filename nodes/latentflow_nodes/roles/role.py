"""What every role provides: the calls that it serves, its description, warm-up and close.

Each role derives from `Role` and overrides its own calls; those of other roles are refused here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import ClassVar

from latentflow.errors import UnimplementedError
from latentflow.v1 import control_pb2, stage_pb2, tensors_pb2

from latentflow_nodes.families.base import Shape


class Role(ABC):
    """A loaded model and the calls that it serves.

    Attributes:
        calls: The methods of the Stage service that the role serves.
        family: Name of the model's family; empty where it has none.
        content_digest: SHA-256 of its weights, hexadecimal.
    """

    calls: ClassVar[tuple[str, ...]]
    family: str
    content_digest: str

    @abstractmethod
    def describe(self, response: control_pb2.DescribeResponse) -> None:
        """Fills in the role's own part of a description."""

    @abstractmethod
    async def warm_up(self) -> None:
        """Runs the model once, so that the first request pays no one-time cost."""

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
