"""When an object counts as being as it is wished to be."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from latentflow_operator.comparison import DIGEST, covered, sealed

values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text("abc", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("xyz", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(values)
def test_everything_covers_itself(value: Any) -> None:
    assert covered(value, copy.deepcopy(value))


@given(st.dictionaries(st.text("xyz", min_size=1), values), st.text("abc", min_size=1), values)
def test_what_the_server_adds_is_no_difference(wished: dict[str, Any], key: str, added: Any) -> None:
    assert covered(wished, wished | {key: added})


@given(st.dictionaries(st.text("xyz", min_size=1), st.integers(), min_size=1), st.data())
def test_what_others_change_or_remove_is_a_difference(wished: dict[str, Any], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(wished)))
    assert not covered(wished, wished | {key: "changed"})
    assert not covered(wished, {k: v for k, v in wished.items() if k != key})


def test_another_spelling_of_a_quantity_is_no_difference() -> None:
    assert covered({"cpu": "1000m", "memory": "1024Mi", "gpu": 1}, {"cpu": "1", "memory": "1Gi", "gpu": "1"})
    assert not covered({"cpu": "1000m"}, {"cpu": "2"})


def test_what_is_no_longer_wished_changes_the_digest() -> None:
    first = sealed({"metadata": {"name": "x"}, "spec": {"a": 1, "b": 2}})
    second = sealed({"metadata": {"name": "x"}, "spec": {"a": 1}})
    assert first["metadata"]["annotations"][DIGEST] != second["metadata"]["annotations"][DIGEST]
    assert not covered(second, first)
