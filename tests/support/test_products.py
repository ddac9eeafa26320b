"""Of a product of parameters `make test` runs every pair of values, and `make test-all` the rest too."""

from __future__ import annotations

import itertools

from support.products import combinations

AXES = ("abcdefg", "xyz", (1, 2), (True, False))


def test_all_combinations_are_parameters_and_those_not_exhaustive_have_every_pair() -> None:
    parameters = combinations(*AXES)
    assert {one.values for one in parameters} == set(itertools.product(*AXES))
    kept = [one.values for one in parameters if not one.marks]
    for first, second in itertools.combinations(range(len(AXES)), 2):
        pairs = {(values[first], values[second]) for values in kept}
        assert pairs == set(itertools.product(AXES[first], AXES[second]))
    assert len(kept) < len(parameters) / 3
