"""The device and the libraries that figures were measured with."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

_PACKAGES = ("diffusers", "transformers", "peft", "accelerate", "huggingface_hub", "grpcio", "protobuf", "numpy")


def versions() -> dict[str, str]:
    """Names and versions, the GPU's name and memory among them."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": f"{properties.total_memory / 2**30:.1f}",
            "gpus": str(torch.cuda.device_count()),
        }
    return found
