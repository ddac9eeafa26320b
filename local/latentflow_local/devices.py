"""The GPUs of this machine."""

from __future__ import annotations


def gpus() -> int:
    """How many GPUs the model servers may use: those that CUDA_VISIBLE_DEVICES leaves; 0 without a GPU or a driver."""
    # Imported here: only models on GPUs need it, and the import takes seconds.
    import torch

    return torch.cuda.device_count()
