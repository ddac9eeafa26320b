"""The API server's validation of a spec, which has the same results and messages as `latentflow validate`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from kube.cases import BAD, BASE, GOOD, Case
from kubernetes import client as kube
from latentflow.api import API_VERSION
from latentflow_operator.cluster import Cluster
from support.apiserver import ApiServer

GROUP, VERSION = API_VERSION.split("/")


def workflow(spec: dict[str, Any], name: str = "x") -> dict[str, Any]:
    return {"apiVersion": API_VERSION, "kind": "DiffusionWorkflow", "metadata": {"name": name}, "spec": spec}


def create(server: ApiServer, body: dict[str, Any], *, plural: str = "diffusionworkflows", dry: bool = False) -> Any:
    """Creates as `kubectl apply` does: unknown fields are errors."""
    api = kube.CustomObjectsApi(server.client())
    return api.create_namespaced_custom_object(
        GROUP, VERSION, "default", plural, body, field_validation="Strict", dry_run="All" if dry else None
    )


def refusal(caught: pytest.ExceptionInfo[kube.ApiException]) -> str:
    return str(json.loads(caught.value.body or "")["message"])


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_an_invalid_spec_is_refused_with_the_message_in_the_table(api_server: ApiServer, case: Case) -> None:
    with pytest.raises(kube.ApiException) as caught:
        create(api_server, workflow(case.spec()), dry=True)
    assert caught.value.status in (400, 422)
    assert case.words in refusal(caught)


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case.name)
def test_an_unusual_valid_spec_is_accepted(api_server: ApiServer, case: Case) -> None:
    create(api_server, workflow(case.spec()), dry=True)


def test_the_server_adds_the_defaults(api_server: ApiServer) -> None:
    spec = create(api_server, workflow(BASE), dry=True)["spec"]
    assert spec["defaults"] == {"steps": 20, "guidanceScale": 5.0, "width": 512, "height": 512}
    assert spec["models"][0]["scaling"] == {"minReplicas": 1, "maxReplicas": 1, "mode": "Managed"}
    assert "engine" not in spec["models"][0]
    assert "slo" not in spec


def test_a_name_longer_than_a_label_s_value_is_refused(api_server: ApiServer) -> None:
    with pytest.raises(kube.ApiException) as caught:
        create(api_server, workflow(BASE, name="x" * 64), dry=True)
    assert "metadata.name" in refusal(caught)


def test_the_role_of_a_model_cannot_change_but_its_source_may(api_server: ApiServer) -> None:
    api = kube.CustomObjectsApi(api_server.client())
    create(api_server, workflow(BASE, name="changing"))

    def patch(index: int, **change: Any) -> None:
        models = [model | (change if i == index else {}) for i, model in enumerate(BASE["models"])]
        api.patch_namespaced_custom_object(
            GROUP, VERSION, "default", "diffusionworkflows", "changing", {"spec": {"models": models}}
        )

    patch(1, source={"uri": "other"})
    with pytest.raises(kube.ApiException) as caught:
        patch(3, role="ControlNet")
    assert "model 'styles' was a LoRAStore; a role cannot change" in refusal(caught)


MODEL = {"role": "VAE", "source": {"uri": "shapes"}, "resources": {"limits": {"cpu": "1"}}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("role", "TextEncoder"),
        ("source", {"uri": "other"}),
        ("nets", [{"name": "a", "source": {"uri": "b"}}]),
        ("dtype", "float16"),
        ("engine", {"maxWaiting": 8}),
        ("resources", {"limits": {"cpu": "2"}}),
        ("host", {"model": "denoiser-1", "index": 1}),
        ("colocated", [{"model": "controlnet-1", "role": "ControlNet", "source": {"uri": "shapes"}}]),
    ],
)
def test_the_fields_of_a_model_s_identity_cannot_change(api_server: ApiServer, field: str, value: Any) -> None:
    api = kube.CustomObjectsApi(api_server.client())
    name = f"vae-{field}"
    body = {"apiVersion": API_VERSION, "kind": "DiffusionModel", "metadata": {"name": name}, "spec": MODEL}
    create(api_server, body, plural="diffusionmodels")
    with pytest.raises(kube.ApiException) as caught:
        api.patch_namespaced_custom_object(GROUP, VERSION, "default", "diffusionmodels", name, {"spec": {field: value}})
    assert f"{field} is part of the model's identity and cannot change" in refusal(caught)


def test_the_tensor_degree_of_a_model_cannot_change_and_auto_is_one(api_server: ApiServer) -> None:
    api = kube.CustomObjectsApi(api_server.client())
    spec = {"role": "Denoiser", "source": {"uri": "shapes"}, "parallelism": {"tensor": "Auto"}}
    body = {"apiVersion": API_VERSION, "kind": "DiffusionModel", "metadata": {"name": "divided"}, "spec": spec}
    create(api_server, body, plural="diffusionmodels")

    def patch(degree: Any) -> Any:
        change = {"spec": {"parallelism": {"tensor": degree}}}
        return api.patch_namespaced_custom_object(GROUP, VERSION, "default", "diffusionmodels", "divided", change)

    assert patch(1)["spec"]["parallelism"]["tensor"] == 1
    assert patch("Auto")["spec"]["parallelism"]["tensor"] == "Auto"
    with pytest.raises(kube.ApiException) as caught:
        patch(2)
    assert "parallelism.tensor is part of the model's identity and cannot change" in refusal(caught)


def test_replicas_have_no_default_and_are_written_through_scale(api_server: ApiServer) -> None:
    api = kube.CustomObjectsApi(api_server.client())
    body = {"apiVersion": API_VERSION, "kind": "DiffusionModel", "metadata": {"name": "vae-scaled"}, "spec": MODEL}
    assert "replicas" not in create(api_server, body, plural="diffusionmodels")["spec"]
    path = (GROUP, VERSION, "default", "diffusionmodels", "vae-scaled")
    api.patch_namespaced_custom_object_scale(*path, {"spec": {"replicas": 3}})
    scaled: Any = api.get_namespaced_custom_object(*path)
    assert scaled["spec"]["replicas"] == 3


def test_server_side_apply_merges_models_by_name(api_server: ApiServer) -> None:
    create(api_server, workflow(BASE, name="merged"))
    api = api_server.client()
    theirs = workflow({"models": [{"name": "base", "role": "Denoiser", "scaling": {"maxReplicas": 5}}]}, name="merged")
    theirs["metadata"]["namespace"] = "default"
    Cluster(api, manager="them").apply(theirs)
    path = (GROUP, VERSION, "default", "diffusionworkflows", "merged")
    merged: Any = kube.CustomObjectsApi(api).get_namespaced_custom_object(*path)
    models = merged["spec"]["models"]
    assert len(models) == len(BASE["models"])
    assert models[1]["scaling"]["maxReplicas"] == 5
    assert models[1]["source"] == {"uri": "shapes"}


def test_every_field_has_a_description(api_server: ApiServer) -> None:
    """`kubectl explain` is the reference, so no field is without a description."""
    extensions = kube.ApiextensionsV1Api(api_server.client())

    def silent(schema: dict[str, Any], path: str) -> list[str]:
        found = []
        for name, member in (schema.get("properties") or {}).items():
            here = f"{path}.{name}"
            if not member.get("description"):
                found.append(here)
            found += silent(member, here) + silent(member.get("items") or {}, f"{here}[]")
        return found

    for plural in ("diffusionworkflows", "diffusionmodels"):
        definition = extensions.read_custom_resource_definition(f"{plural}.{GROUP}")
        schema = definition.to_dict(serialize=True)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        properties = schema["properties"]
        assert not silent({"properties": {key: properties[key] for key in ("spec", "status")}}, plural)
