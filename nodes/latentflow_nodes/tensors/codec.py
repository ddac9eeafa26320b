"""Tensors to bytes and back: wire messages and chunk streams.

Pure functions over torch tensors; the tensor store, the peers and the roles send and receive with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from latentflow.errors import DataLossError, InvalidRequestError
from latentflow.internal.rpc import CHUNK_BYTES
from latentflow.v1 import tensors_pb2

_DTYPES: dict[Any, torch.dtype] = {
    tensors_pb2.DTYPE_FLOAT32: torch.float32,
    tensors_pb2.DTYPE_FLOAT16: torch.float16,
    tensors_pb2.DTYPE_BFLOAT16: torch.bfloat16,
    tensors_pb2.DTYPE_INT64: torch.int64,
    tensors_pb2.DTYPE_UINT8: torch.uint8,
    tensors_pb2.DTYPE_BOOL: torch.bool,
}
_WIRE = {dtype: wire for wire, dtype in _DTYPES.items()}
_MAX_DIMENSIONS = 8
# No tensor of an image workflow is nearly so large; a larger header is invalid.
_MAX_BYTES = 8 << 30


def inline(tensor: torch.Tensor) -> tensors_pb2.Tensor:
    """A tensor with its values in the message."""
    return tensors_pb2.Tensor(dtype=_wire(tensor.dtype), shape=list(tensor.shape), inline=bytes(view(tensor)))


def described(tensor: torch.Tensor, handle: tensors_pb2.Handle) -> tensors_pb2.Tensor:
    """A message for a tensor that its owner holds."""
    return tensors_pb2.Tensor(dtype=_wire(tensor.dtype), shape=list(tensor.shape), handle=handle)


def from_inline(message: tensors_pb2.Tensor) -> torch.Tensor:
    """The tensor of a message with inline values. InvalidRequestError where bytes and shape disagree."""
    dtype, shape = _checked(message.dtype, message.shape)
    expected = math.prod(shape) * dtype.itemsize
    if len(message.inline) != expected:
        raise InvalidRequestError(
            f"A tensor of shape {shape} and {dtype} takes {expected} bytes; the message holds {len(message.inline)}."
        )
    return _tensor(bytearray(message.inline), dtype, shape)


def chunks(tensors: Mapping[str, torch.Tensor], *, size: int = CHUNK_BYTES) -> Iterator[tensors_pb2.TensorChunk]:
    """A bundle of tensors as pieces of at most `size` bytes; at least one piece."""
    total = total_bytes(tensors.values())
    piece, start, offset = bytearray(), 0, 0
    first = True
    for tensor in tensors.values():
        left = view(tensor)
        while left:
            take = min(len(left), size - len(piece))
            piece += left[:take]
            left, offset = left[take:], offset + take
            if len(piece) == size and offset < total:
                yield tensors_pb2.TensorChunk(
                    headers=headers(tensors) if first else (), offset=start, data=bytes(piece)
                )
                piece, start, first = bytearray(), offset, False
    yield tensors_pb2.TensorChunk(headers=headers(tensors) if first else (), offset=start, data=bytes(piece), last=True)


def headers(tensors: Mapping[str, torch.Tensor]) -> list[tensors_pb2.TensorHeader]:
    """The description of a bundle."""
    return [tensors_pb2.TensorHeader(name=n, dtype=_wire(t.dtype), shape=list(t.shape)) for n, t in tensors.items()]


def empty(headers: Iterable[tensors_pb2.TensorHeader]) -> dict[str, torch.Tensor]:
    """The bundle that headers describe, its values not set. DataLossError where they are invalid."""
    return {name: torch.empty(shape, dtype=dtype) for name, dtype, shape in _described(headers)}


def view(tensor: torch.Tensor) -> memoryview:
    """A tensor's values as bytes: its own memory where it is contiguous and on the CPU, else a copy."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


class Assembler:
    """Assembles a bundle from its pieces.

    `add` each piece; it returns True for the last one, and `tensors` then holds the bundle by name.
    """

    def __init__(self) -> None:
        self._headers: list[tuple[str, torch.dtype, tuple[int, ...]]] | None = None
        self._buffer = bytearray()
        self._filled = 0
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, chunk: tensors_pb2.TensorChunk) -> bool:
        """Adds one piece. DataLossError where pieces are missing, repeated or do not fit the headers."""
        if self._headers is None:
            self._headers = _described(chunk.headers)
            total = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self._headers)
            self._buffer = bytearray(total)
        elif chunk.headers:
            raise DataLossError("A tensor bundle carries its headers twice; pieces of two bundles were mixed.")
        end = chunk.offset + len(chunk.data)
        if chunk.offset != self._filled or end > len(self._buffer):
            raise DataLossError(
                f"A piece for bytes {chunk.offset}-{end} arrived after {self._filled} of {len(self._buffer)} bytes."
            )
        self._buffer[chunk.offset : end] = chunk.data
        self._filled = end
        if not chunk.last:
            return False
        if self._filled != len(self._buffer):
            raise DataLossError(f"A tensor bundle ended after {self._filled} of {len(self._buffer)} bytes.")
        view, at = memoryview(self._buffer), 0
        for name, dtype, shape in self._headers:
            size = math.prod(shape) * dtype.itemsize
            self.tensors[name] = _tensor(view[at : at + size], dtype, shape)
            at += size
        return True

    @property
    def size(self) -> int:
        """Bytes of the bundle so far."""
        return self._filled


def total_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _wire(dtype: torch.dtype) -> Any:
    try:
        return _WIRE[dtype]
    except KeyError:
        raise TypeError(f"{dtype} cannot be sent between servers.") from None


def _described(headers: Iterable[tensors_pb2.TensorHeader]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    described = [(h.name, *_checked(h.dtype, h.shape)) for h in headers]
    if len({name for name, _, _ in described}) != len(described):
        raise DataLossError("A tensor bundle names a tensor twice; the sender is defective.")
    total = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in described)
    if total > _MAX_BYTES:
        raise InvalidRequestError(f"A tensor bundle of {total} bytes is over the limit of {_MAX_BYTES}.")
    return described


def _checked(dtype: int, shape: Iterable[int]) -> tuple[torch.dtype, tuple[int, ...]]:
    sizes = tuple(shape)
    if dtype not in _DTYPES:
        raise InvalidRequestError(f"Element type {dtype} is not known to this server.")
    if len(sizes) > _MAX_DIMENSIONS or any(size < 0 for size in sizes):
        raise InvalidRequestError(f"Shape {sizes} is invalid: at most {_MAX_DIMENSIONS} dimensions, each at least 0.")
    return _DTYPES[dtype], sizes


def _tensor(buffer: bytearray | memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if len(buffer) == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=torch.uint8).clone().view(dtype).reshape(shape)
