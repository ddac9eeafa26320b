"""When an object counts as having its desired state."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from latentflow_operator.comparison import DIGEST, covers, with_digest

values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text("abc", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("xyz", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(values)
def test_every_value_covers_itself(value: Any) -> None:
    assert covers(copy.deepcopy(value), value)


@given(st.dictionaries(st.text("xyz", min_size=1), values), st.text("abc", min_size=1), values)
def test_a_field_that_the_server_adds_is_no_difference(desired: dict[str, Any], key: str, added: Any) -> None:
    assert covers(desired | {key: added}, desired)


@given(st.dictionaries(st.text("xyz", min_size=1), st.integers(), min_size=1), st.data())
def test_a_field_that_others_change_or_remove_is_a_difference(desired: dict[str, Any], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(desired)))
    assert not covers(desired | {key: "changed"}, desired)
    assert not covers({k: v for k, v in desired.items() if k != key}, desired)


def test_another_notation_of_a_quantity_is_no_difference() -> None:
    assert covers({"cpu": "1", "memory": "1Gi", "gpu": "1"}, {"cpu": "1000m", "memory": "1024Mi", "gpu": 1})
    assert not covers({"cpu": "2"}, {"cpu": "1000m"})


def test_a_field_that_is_no_longer_desired_changes_the_digest() -> None:
    first = with_digest({"metadata": {"name": "x"}, "spec": {"a": 1, "b": 2}})
    second = with_digest({"metadata": {"name": "x"}, "spec": {"a": 1}})
    assert first["metadata"]["annotations"][DIGEST] != second["metadata"]["annotations"][DIGEST]
    assert not covers(first, second)
