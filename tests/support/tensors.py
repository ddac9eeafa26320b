"""Hypothesis strategies for tensors of every transferred type."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of up to four dimensions; may be empty or a scalar."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return (torch.randn(shape, generator=generator) * 50).to(dtype)


def bundles() -> st.SearchStrategy[dict[str, torch.Tensor]]:
    """Up to five named tensors."""
    return st.dictionaries(st.text(min_size=1, max_size=5), tensors(), max_size=5)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
