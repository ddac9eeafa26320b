"""Tensors survive the wire and checkpoints survive the disk, bit for bit; damage is noticed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from latentflow.errors import DataLossError, InvalidRequestError, LatentflowError
from latentflow.v1 import tensors_pb2
from latentflow_nodes.engine import checkpoint
from latentflow_nodes.tensors import codec
from support.tensors import bundles, equal, tensors


@given(tensors())
def test_a_tensor_comes_back_from_a_message(tensor: torch.Tensor) -> None:
    message = tensors_pb2.Tensor.FromString(codec.inline(tensor).SerializeToString())
    assert equal(codec.from_inline(message), tensor)


@given(bundles(), st.integers(1, 64))
def test_a_bundle_comes_back_from_pieces_of_any_size(bundle: dict[str, torch.Tensor], size: int) -> None:
    assembler = codec.Assembler()
    pieces = list(codec.chunks(bundle, size=size))
    assert [assembler.add(piece) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(piece.data) <= size for piece in pieces)
    assert assembler.tensors.keys() == bundle.keys()
    assert all(equal(assembler.tensors[name], tensor) for name, tensor in bundle.items())


def test_a_large_tensor_is_sent_in_pieces_below_the_limit() -> None:
    pieces = list(codec.chunks({"a": torch.zeros(3, 1 << 18)}))
    assert len(pieces) == 3
    assert max(piece.ByteSize() for piece in pieces) < (1 << 20) + 1024


@given(st.integers(0, 3), st.integers(0, 3))
def test_pieces_out_of_order_are_detected(first: int, second: int) -> None:
    pieces = list(codec.chunks({"a": torch.arange(16)}, size=32))
    order = list(range(len(pieces)))
    order[first], order[second] = order[second], order[first]
    assembler = codec.Assembler()

    def feed() -> bool:
        return [assembler.add(pieces[i]) for i in order][-1]

    if first == second:
        assert feed()
    else:
        with pytest.raises(LatentflowError):
            feed()


def test_a_message_whose_bytes_do_not_fit_its_shape_is_refused() -> None:
    message = codec.inline(torch.zeros(4))
    message.shape[0] = 5
    with pytest.raises(InvalidRequestError, match="takes 20 bytes; the message holds 16"):
        codec.from_inline(message)


def test_an_absurd_size_in_a_header_is_refused_before_allocation() -> None:
    header = tensors_pb2.TensorHeader(name="a", dtype=tensors_pb2.DTYPE_FLOAT32, shape=[1 << 40])
    with pytest.raises(InvalidRequestError, match="over the limit"):
        codec.Assembler().add(tensors_pb2.TensorChunk(headers=[header], last=True))


leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5))
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


@given(trees)
def test_a_checkpoint_keeps_every_value_exactly(tree: Any) -> None:
    assert checkpoint.thaw(checkpoint.freeze(tree)) == tree


def test_a_checkpoint_keeps_tensors_arrays_and_tuples() -> None:
    tree: dict[str, Any] = {
        "t": torch.randn(2, 3),
        "n": np.arange(3.0),
        "p": (1, [torch.tensor(2)]),
        "s": np.float32(0.5),
    }
    back = checkpoint.thaw(checkpoint.freeze(tree))
    assert equal(back["t"], tree["t"])
    assert np.array_equal(back["n"], tree["n"])
    assert back["p"][0] == 1
    assert back["s"] == 0.5
    assert isinstance(back["p"], tuple)


@given(st.binary(max_size=200))
def test_bytes_that_are_not_a_checkpoint_are_refused(blob: bytes) -> None:
    with pytest.raises(DataLossError):
        checkpoint.thaw(blob)


def test_a_checkpoint_refuses_values_that_it_cannot_store() -> None:
    with pytest.raises(TypeError, match="cannot hold a object"):
        checkpoint.freeze({"a": object()})
