"""Which models workflows need, which workflows own them, and whose setting is used where they differ."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from latentflow.api import API_VERSION, DiffusionWorkflow, identity, placed
from latentflow_operator.binding import Owner, bind, desired_models


def owner(name: str, *, created: str = "2026-01-01T00:00:00Z", base: dict[str, Any] | None = None) -> Owner:
    """A workflow with a text encoder, a denoiser (changed by `base`) and a VAE."""
    models = [
        {"name": "text", "role": "TextEncoder", "source": {"uri": "shapes"}},
        {"name": "base", "role": "Denoiser", "source": {"uri": "shapes"}} | (base or {}),
        {"name": "pixels", "role": "VAE", "source": {"uri": "shapes"}},
    ]
    workflow = DiffusionWorkflow.model_validate(
        {
            "apiVersion": API_VERSION,
            "kind": "DiffusionWorkflow",
            "metadata": {"name": name},
            "spec": {"models": models},
        }
    )
    return Owner(workflow=workflow, uid=f"uid-{name}", created=created)


def denoiser(owners: list[Owner]) -> Any:
    return next(model for model in desired_models(owners).values() if model.spec.role == "Denoiser")


def test_workflows_with_the_same_models_own_them_together() -> None:
    models = desired_models([owner("a"), owner("b")])
    assert len(models) == 3
    assert all([o.workflow.name for o in model.owners] == ["a", "b"] for model in models.values())


def test_a_different_source_dtype_engine_or_resource_is_a_different_model() -> None:
    changes: list[dict[str, Any]] = [
        {"source": {"uri": "other"}},
        {"dtype": "float16"},
        {"engine": {"maxRunning": 2}},
        {"resources": {"limits": {"cpu": 1}}},
    ]
    owners = [owner("a"), *(owner(f"w{i}", base=change) for i, change in enumerate(changes))]
    assert len(desired_models(owners)) == 3 + len(changes)


def test_the_bounds_of_sharing_workflows_merge_and_external_wins() -> None:
    shared = denoiser(
        [
            owner("a", base={"scaling": {"minReplicas": 0, "maxReplicas": 4}}),
            owner("b", base={"scaling": {"minReplicas": 2, "maxReplicas": 3, "mode": "External"}}),
        ]
    )
    assert (shared.spec.scaling.min_replicas, shared.spec.scaling.max_replicas) == (2, 4)
    assert shared.spec.scaling.mode == "External"
    assert not shared.conflicts


def test_of_other_settings_the_oldest_owner_s_is_used_and_a_younger_has_a_conflict() -> None:
    young = owner("young", created="2026-01-02T00:00:00Z", base={"pod": {"nodeSelector": {"zone": "b"}}})
    old = owner("old", base={"pod": {"nodeSelector": {"zone": "a"}}, "rollout": "Replace"})
    shared = denoiser([young, old])
    assert shared.spec.pod.node_selector == {"zone": "a"}
    assert shared.spec.rollout == "Replace"
    rollout, conflict = shared.conflicts
    assert (rollout.uid, rollout.field) == ("uid-young", "rollout")
    assert (conflict.uid, conflict.field) == ("uid-young", "pod")
    assert "Model 'base' is shared with the older workflow old" in conflict.message


def test_a_model_by_reference_is_not_a_desired_model() -> None:
    by_reference = owner("a", base={"source": None, "modelRef": "denoiser-of-theirs"})
    assert not [model for model in desired_models([by_reference]).values() if model.spec.role == "Denoiser"]


names = st.lists(st.sampled_from("abcdef"), unique=True, min_size=1)


@given(names, st.randoms())
def test_the_order_of_the_workflows_does_not_matter(chosen: list[str], random: Any) -> None:
    owners = [
        owner(
            name,
            created=f"2026-01-0{1 + ord(name) % 3}T00:00:00Z",
            base={"scaling": {"maxReplicas": 1 + ord(name) % 4}},
        )
        for name in chosen
    ]
    shuffled = random.sample(owners, len(owners))
    assert desired_models(shuffled) == desired_models(owners)


@given(names)
def test_every_model_of_a_workflow_is_desired_and_owned_by_it(chosen: list[str]) -> None:
    owners = [owner(name, base={"source": {"uri": name}}) for name in chosen]
    models = desired_models(owners)
    for one in owners:
        for model in one.workflow.spec.models:
            assert one in models[identity(model)].owners


def with_colocated(name: str, *more: dict[str, Any], **base: Any) -> Owner:
    """A workflow whose ControlNet and VAE run in the denoiser's pods."""
    one = owner(name, base=base)
    body = one.workflow.model_dump(mode="json", by_alias=True, exclude_none=True)
    edges = {"name": "edges", "role": "ControlNet", "attachTo": "base", "source": {"uri": "shapes"}}
    body["spec"]["models"] += [edges | {"placement": "Colocated"}, *more]
    body["spec"]["models"][2]["placement"] = "Colocated"
    return Owner(workflow=DiffusionWorkflow.model_validate(body), uid=one.uid, created=one.created)


def test_a_denoiser_lists_its_colocated_models_and_they_name_it_as_their_host() -> None:
    one = with_colocated("a")
    names, models = placed(one.workflow), desired_models([one])
    assert models.keys() == set(names.values())
    host = models[names["base"]].spec
    assert host.colocated is not None
    assert host.host is None
    for index, colocated in enumerate(host.colocated, 1):
        own = models[colocated.model].spec
        assert own.host is not None
        assert (own.host.model, own.host.index) == (names["base"], index)
        assert (own.preferred_host, own.colocated) == (None, None)
        for field in ("role", "source", "dtype", "engine", "resources"):
            assert getattr(colocated, field) == getattr(own, field)
    assert {one.model for one in host.colocated} == {names["edges"], names["pixels"]}
    assert models[names["text"]].spec.host is None


def test_workflows_share_a_denoiser_only_if_its_colocated_models_are_the_same() -> None:
    same = desired_models([with_colocated("a"), with_colocated("b")])
    assert {len(model.owners) for model in same.values()} == {2}
    apart = desired_models([with_colocated("a"), owner("b")])
    shared = [model for model in apart.values() if len(model.owners) == 2]
    assert [model.spec.role for model in shared] == ["TextEncoder"]


def test_a_separate_controlnet_prefers_the_hosts_of_its_denoiser_s_pods() -> None:
    more = {"name": "layout", "role": "ControlNet", "attachTo": "base", "source": {"uri": "layout"}}
    one = with_colocated("a", more)
    names = placed(one.workflow)
    assert desired_models([one])[names["layout"]].spec.preferred_host == names["base"]


def test_a_changed_colocated_model_takes_over_with_its_whole_pod_when_all_are_ready() -> None:
    now = placed(with_colocated("a", dtype="float16").workflow)
    changed = with_colocated("a").workflow
    then = placed(changed)
    for late in (None, then["base"], then["edges"], then["pixels"]):
        ready = set(then.values()) - {late}
        bindings = bind(changed, now, is_ready=ready.__contains__, has_served=lambda _: True)
        models = {binding.name: binding.model for binding in bindings}
        assert models == (then if late is None else now)


def bound(
    change: dict[str, Any], now: dict[str, str], *, ready: bool, served: bool
) -> dict[str, tuple[str, str | None]]:
    workflow = owner("a", base=change).workflow
    bindings = bind(workflow, now, is_ready=lambda _: ready, has_served=lambda _: served)
    return {binding.name: (binding.model, binding.next) for binding in bindings}


def identities(change: dict[str, Any] | None = None) -> dict[str, str]:
    return {model.name: identity(model) for model in owner("a", base=change).workflow.spec.models}


def test_a_new_workflow_is_bound_to_the_models_that_it_names() -> None:
    assert bound({}, {}, ready=False, served=False) == {name: (model, None) for name, model in identities().items()}


def test_the_previous_model_serves_until_its_successor_is_ready() -> None:
    change = {"dtype": "float16"}
    now, then = identities(), identities(change)
    assert bound(change, now, ready=False, served=True)["base"] == (now["base"], then["base"])
    assert bound(change, now, ready=True, served=True)["base"] == (then["base"], None)


def test_a_model_that_never_served_is_replaced_at_once() -> None:
    change = {"dtype": "float16"}
    assert bound(change, identities(), ready=False, served=False)["base"] == (identities(change)["base"], None)


def test_with_a_replacing_rollout_the_successor_takes_over_before_it_is_ready() -> None:
    change = {"dtype": "float16", "rollout": "Replace"}
    assert bound(change, identities(), ready=False, served=True)["base"] == (identities(change)["base"], None)
    assert identities({"rollout": "Replace"}) == identities()


@given(st.sets(st.sampled_from(["text", "base", "pixels"])), st.booleans())
def test_all_changed_models_take_over_together_or_not_at_all(changed: set[str], ready: bool) -> None:
    now = identities() | {name: f"old-{name}" for name in changed}
    after = bound({}, now, ready=ready, served=True)
    waiting = {name for name, (_, following) in after.items() if following is not None}
    assert waiting == (set() if ready else changed)
