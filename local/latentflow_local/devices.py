"""How many GPUs this machine has for its model servers."""

from __future__ import annotations


def gpus() -> int:
    """Those that CUDA_VISIBLE_DEVICES leaves; 0 where there is none, or no driver."""
    # Imported here: only models on GPUs need it, and it takes seconds.
    import torch

    return torch.cuda.device_count()
