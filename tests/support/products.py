"""Products of parameters: `make test` runs a subset that has every pair of values, `make test-all` all combinations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

Combination = tuple[int, ...]


def combinations(*axes: Sequence[Any]) -> list[Any]:
    """Every combination of one value of each axis, as pytest's parameters; all but those of `pairwise` are exhaustive."""
    chosen = pairwise([len(axis) for axis in axes])
    return [
        pytest.param(
            *(axis[index] for axis, index in zip(axes, combination, strict=True)),
            marks=() if combination in chosen else pytest.mark.exhaustive,
        )
        for combination in itertools.product(*(range(len(axis)) for axis in axes))
    ]


def pairwise(sizes: Sequence[int]) -> set[Combination]:
    """Few combinations of indices that contain every pair of indices of two axes.

    Args:
        sizes: Number of values of each axis; two axes at least.
    """
    left = list(itertools.product(*map(range, sizes)))
    missing = set().union(*map(_pairs, left))
    chosen = set()
    while missing:
        best = max(left, key=lambda combination: len(_pairs(combination) & missing))
        chosen.add(best)
        missing -= _pairs(best)
    return chosen


def _pairs(combination: Combination) -> set[tuple[tuple[int, int], tuple[int, int]]]:
    return set(itertools.combinations(enumerate(combination), 2))
