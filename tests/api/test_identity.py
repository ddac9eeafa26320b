"""Which models are one: identity and what sharers agree on."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from latentflow.api import Model, Scaling, distinct_models, identity, load_workflows, merge_scaling
from support.paths import EXAMPLES

BASE: dict[str, Any] = {"name": "base", "role": "Denoiser", "source": {"uri": "shapes"}}


def model(**changes: Any) -> Model:
    return Model.model_validate(BASE | changes)


def test_an_identity_is_a_dns_label_that_begins_with_the_role() -> None:
    assert identity(model()).startswith("denoiser-")
    assert len(identity(model())) <= 63


def test_names_scaling_and_spelt_out_defaults_do_not_change_the_identity() -> None:
    same = model(name="other", scaling={"maxReplicas": 4}, dtype="float32", engine={"device": "cpu"})
    assert identity(same) == identity(model())


def test_what_changes_the_served_model_changes_the_identity() -> None:
    others = [
        model(dtype="float16"),
        model(source={"uri": "shapes", "subfolder": "unet"}),
        model(engine={"threads": 2}),
        model(resources={"limits": {"cpu": 1}}),
        model(parallelism={"tensor": 2}),
        model(role="VAE"),
    ]
    assert len({identity(one) for one in [model(), *others]}) == len(others) + 1


def test_a_model_reference_is_its_own_identity() -> None:
    assert identity(Model.model_validate({"name": "a", "role": "VAE", "modelRef": "vae-123"})) == "vae-123"


def test_workflows_that_name_the_same_models_share_them() -> None:
    assert len(distinct_models(load_workflows(EXAMPLES / "shapes-shared.yaml"))) == 4


bounds = st.integers(0, 9).flatmap(
    lambda least: st.builds(
        Scaling,
        min_replicas=st.just(least),
        max_replicas=st.integers(max(1, least), 12),
        mode=st.sampled_from(["Managed", "External"]),
    )
)


@given(bounds, bounds, bounds)
def test_sharers_agree_in_whatever_order_they_come(a: Scaling, b: Scaling, c: Scaling) -> None:
    assert merge_scaling(a, b) == merge_scaling(b, a)
    assert merge_scaling(merge_scaling(a, b), c) == merge_scaling(a, merge_scaling(b, c))
    assert merge_scaling(a, a) == a


@given(bounds, bounds)
def test_merged_bounds_are_the_larger_ones_and_external_wins(a: Scaling, b: Scaling) -> None:
    merged = merge_scaling(a, b)
    assert merged.min_replicas == max(a.min_replicas, b.min_replicas)
    assert merged.max_replicas == max(a.max_replicas, b.max_replicas)
    assert (merged.mode == "External") == ("External" in (a.mode, b.mode))
