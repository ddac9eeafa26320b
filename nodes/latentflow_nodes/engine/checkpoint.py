"""The state of a sample as bytes, without pickle: trees of tensors and plain values."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from latentflow.errors import DataLossError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors


def freeze(tree: Any) -> bytes:
    """Any tree of dicts, lists, tensors, arrays and plain values as bytes; `thaw` gives an equal tree.

    Tensors are stored as safetensors, the rest as JSON, which keeps Python floats exactly. TypeError for any other value,
    so that no state is lost silently.
    """
    tensors: dict[str, torch.Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = f"t{len(tensors)}"
            tensors[name] = value.detach().to("cpu").contiguous().clone()
            return {"tensor": name}
        if isinstance(value, np.ndarray):
            return {"array": plain(torch.from_numpy(value.copy()))}
        if isinstance(value, np.generic):
            return plain(value.item())
        if isinstance(value, dict):
            return {"dict": [[str(key), plain(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {"tuple" if isinstance(value, tuple) else "list": [plain(item) for item in value]}
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        raise TypeError(f"A checkpoint cannot hold a {type(value).__name__}.")

    tree_text = json.dumps(plain(tree))
    blob: bytes = save_safetensors(tensors, metadata={"tree": tree_text})
    return blob


def thaw(blob: bytes) -> Any:
    """The tree of a `freeze`. DataLossError where the bytes are damaged."""
    try:
        length = int.from_bytes(blob[:8], "little")
        tree = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"]["tree"])
        tensors = load_safetensors(blob)

        def full(node: Any) -> Any:
            ((kind, value),) = node.items()
            if kind == "tensor":
                return tensors[value]
            if kind == "array":
                return full(value).numpy()
            if kind == "dict":
                return {key: full(item) for key, item in value}
            if kind in ("list", "tuple"):
                return (list if kind == "list" else tuple)(full(item) for item in value)
            if kind == "value":
                return value
            raise KeyError(kind)

        return full(tree)
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        raise DataLossError(
            f"A checkpoint of {len(blob)} bytes cannot be read ({error}); start the request again."
        ) from None
