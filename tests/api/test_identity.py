"""Which models are one: identity and what sharers agree on."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from latentflow.api import (
    API_VERSION,
    DiffusionWorkflow,
    Model,
    Scaling,
    Source,
    distinct_models,
    identity,
    load_workflows,
    merge_scaling,
    placed,
)
from latentflow.api.types import Engine, Net
from support.paths import EXAMPLES

BASE: dict[str, Any] = {"name": "base", "role": "Denoiser", "source": {"uri": "shapes"}}


def model(**changes: Any) -> Model:
    return Model.model_validate(BASE | changes)


def with_engine(of: Model | None = None, **options: Any) -> Model:
    """With options of the engine, also those that this version refuses."""
    of = of or model()
    return of.model_copy(update={"engine": of.engine.model_copy(update=options)})


def test_an_identity_is_a_dns_label_that_begins_with_the_role() -> None:
    assert identity(model()).startswith("denoiser-")
    assert len(identity(model())) <= 63


# A changed value here renames and restarts every model of that identity in every cluster: see docs/upgrading.md.
_SHAPES = {"text": "text-encoder-6af4c5cbcf", "base": "denoiser-ff725c4333", "pixels": "vae-817a54017d"}
GOLDEN = {
    "plain": _SHAPES,
    "nets": _SHAPES | {"hints": "controlnet-7a4012ed67"},
    "sdxl": {"text": "text-encoder-5a66edc3a4", "base": "denoiser-2f61bb785e", "pixels": "vae-a27b0efa60"},
    "sdxl-one-gpu": {"text": "text-encoder-9c9468bfe5", "base": "denoiser-aeae4ae16f", "pixels": "vae-b6d5c26a3a"},
    "shapes": _SHAPES
    | {"edges": "controlnet-43db2b71b8", "layout": "controlnet-db829599c2", "styles": "lora-store-33fd157a3d"},
    "shapes-colocated": _SHAPES
    | {
        "base": "denoiser-e42b6ca777",
        "edges": "controlnet-8d54c8047d",
        "layout": "controlnet-8ef661d17c",
        "styles": "lora-store-836f29bfde",
    },
    "shapes-minimal": _SHAPES,
    "traced": {
        "words": "text-encoder-6af4c5cbcf",
        "base": "denoiser-ff725c4333",
        "edges": "controlnet-43db2b71b8",
        "pixels": "vae-817a54017d",
    },
}


def test_the_identities_of_every_example_are_as_in_every_release_of_this_version() -> None:
    workflows = [workflow for path in EXAMPLES.glob("*.yaml") for workflow in load_workflows(path)]
    assert {workflow.name: placed(workflow) for workflow in workflows} == GOLDEN


def test_names_scaling_and_spelt_out_defaults_do_not_change_the_identity() -> None:
    same = model(name="other", scaling={"maxReplicas": 4}, dtype="float32", engine={"device": "cpu"})
    assert identity(same) == identity(model())


def test_defaults_that_change_results_are_those_of_every_release_of_this_version() -> None:
    """They are not part of identities, so a changed one would change results under unchanged identities."""
    assert (model().dtype, model().parallelism.tensor, model().nets) == ("float32", 1, None)
    assert (Engine().compile, Engine().step_cache) == (False, "None")


def test_an_option_that_the_role_does_not_use_does_not_change_the_identity() -> None:
    pixels = model(role="VAE")
    options = {"compile": True, "step_cache": "Auto", "async_steps": 3}
    assert identity(with_engine(pixels, **options)) == identity(pixels)
    store = model(role="LoRAStore", attachTo="base")
    assert identity(with_engine(store, max_running=9)) == identity(store)
    assert identity(model(engine={"maxRunning": 9})) != identity(model())


def test_what_changes_the_served_model_changes_the_identity() -> None:
    others = [
        model(dtype="float16"),
        model(source={"uri": "shapes", "subfolder": "unet"}),
        model(source={"uri": "shapes", "variant": "fp16"}),
        model(source={"uri": "shapes.safetensors"}),
        model(engine={"threads": 2}),
        model(resources={"limits": {"cpu": 1}}),
        model(parallelism={"tensor": 2}),
        with_engine(compile=True),
        with_engine(step_cache="Auto"),
        model().model_copy(update={"nets": [Net(name="a", source=Source(uri="b"))]}),
        model(role="VAE"),
    ]
    assert len({identity(one) for one in [model(), *others]}) == len(others) + 1


def test_the_order_of_nets_does_not_change_the_identity() -> None:
    nets = [{"name": name, "source": {"uri": name}} for name in ("depth", "pose")]
    one, other = (model(role="ControlNet", attachTo="base", nets=given) for given in (nets, nets[::-1]))
    assert identity(one) == identity(other)
    assert identity(one) != identity(model(role="ControlNet", attachTo="base", nets=nets[:1]))


def test_a_model_reference_is_its_own_identity() -> None:
    assert identity(Model.model_validate({"name": "a", "role": "VAE", "modelRef": "vae-123"})) == "vae-123"


def test_workflows_that_name_the_same_models_share_them() -> None:
    assert len(distinct_models(load_workflows(EXAMPLES / "shapes-shared.yaml"))) == 4


OTHERS = ("text", "edges", "styles", "pixels")


def workflow(*together: str, dtype: str = "float32", edges: str = "controlnet-edges") -> DiffusionWorkflow:
    """One model of each role, some of them in the denoiser's pods."""
    models = [
        {"name": "text", "role": "TextEncoder", "source": {"uri": "shapes"}},
        {"name": "base", "role": "Denoiser", "source": {"uri": "shapes"}, "dtype": dtype},
        {"name": "edges", "role": "ControlNet", "attachTo": "base", "source": {"uri": "shapes", "subfolder": edges}},
        {"name": "styles", "role": "LoRAStore", "attachTo": "base", "source": {"uri": "shapes"}},
        {"name": "pixels", "role": "VAE", "source": {"uri": "shapes"}},
    ]
    for one in models:
        one["placement"] = "Colocated" if one["name"] in together else "Spread"
    head = {"apiVersion": API_VERSION, "kind": "DiffusionWorkflow", "metadata": {"name": "x"}}
    return DiffusionWorkflow.model_validate(head | {"spec": {"models": models}})


@given(st.sets(st.sampled_from(OTHERS)))
def test_only_models_in_the_denoiser_s_pods_and_that_denoiser_are_others_for_it(together: set[str]) -> None:
    alone, names = placed(workflow()), placed(workflow(*together))
    assert alone == {model.name: identity(model) for model in workflow().spec.models}
    changed = {name for name in names if names[name] != alone[name]}
    assert changed == (together | {"base"} if together else set())


@given(st.sets(st.sampled_from(OTHERS), min_size=1), st.sampled_from([{"dtype": "float16"}, {"edges": "other"}]))
def test_all_in_one_pod_are_others_when_one_of_them_is(together: set[str], change: dict[str, str]) -> None:
    before, after = placed(workflow(*together)), placed(workflow(*together, **change))
    changed = {name for name in before if before[name] != after[name]}
    if change == {"edges": "other"} and "edges" not in together:
        assert changed == {"edges"}
    else:
        assert changed == together | {"base"}


@given(st.sets(st.sampled_from(OTHERS)), st.sets(st.sampled_from(OTHERS)))
def test_a_denoiser_is_shared_only_with_all_its_colocated_models(one: set[str], other: set[str]) -> None:
    assert (placed(workflow(*one))["base"] == placed(workflow(*other))["base"]) == (one == other)


def test_two_names_of_one_colocated_model_are_one() -> None:
    twice = workflow("edges")
    again = twice.spec.models[2].model_copy(update={"name": "again"})
    doubled = twice.model_copy(update={"spec": twice.spec.model_copy(update={"models": [*twice.spec.models, again]})})
    assert placed(doubled) == placed(twice) | {"again": placed(twice)["edges"]}


def test_placement_changes_nothing_on_one_machine() -> None:
    assert distinct_models([workflow("edges", "styles")]).keys() == distinct_models([workflow()]).keys()


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
