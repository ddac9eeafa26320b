"""The objects that serve a model."""

from __future__ import annotations

from typing import Any

import pytest
from latentflow.api.types import ModelSpec
from latentflow_nodes.settings import parse
from latentflow_operator.manifests import Manifest, manifests
from latentflow_operator.settings import OperatorSettings

SETTINGS = OperatorSettings(
    node_image="latentflow-node:1",
    model_root={"hostPath": {"path": "/srv/models"}},
    token_secret="latentflow-token",
    hub_secret="hub",
    hub_endpoint="https://hub.example",
    s3_secret="s3",
)


def made(settings: OperatorSettings = SETTINGS, **spec: Any) -> tuple[Manifest, Manifest, Manifest]:
    whole = {"role": "VAE", "source": {"uri": "shapes"}} | spec
    return manifests(name="vae-1", namespace="ns", uid="uid-1", spec=ModelSpec.model_validate(whole), settings=settings)


def pod(**spec: Any) -> Manifest:
    template: Manifest = made(**spec)[0]["spec"]["template"]["spec"]
    return template


def test_all_of_a_model_s_objects_are_owned_by_it_and_go_with_it() -> None:
    for manifest in made():
        assert manifest["metadata"]["name"] == "vae-1"
        (owner,) = manifest["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"], owner["controller"]) == ("DiffusionModel", "uid-1", True)


def test_the_server_s_arguments_are_ones_that_it_takes() -> None:
    (container,) = pod(
        source={"uri": "hf://org/repo", "subfolder": "vae", "revision": "main"},
        engine={"threads": 2, "maxRunning": 3, "maxWaiting": 5},
        dtype="bfloat16",
    )["containers"]
    settings = parse([argument.replace("$(POD_IP)", "10.1.2.3") for argument in container["args"]])
    assert (settings.role, settings.uri, settings.subfolder, settings.revision) == (
        "VAE",
        "hf://org/repo",
        "vae",
        "main",
    )
    assert (settings.threads, settings.max_running, settings.max_waiting, settings.dtype) == (2, 3, 5, "bfloat16")
    assert settings.advertise == "10.1.2.3:8500"
    assert settings.identity == "vae-1"


def test_termination_grace_exceeds_the_drain() -> None:
    drain = next(a for a in pod()["containers"][0]["args"] if a.startswith("--drain="))
    assert pod()["terminationGracePeriodSeconds"] > int(drain.partition("=")[2])


@pytest.mark.parametrize(
    ("scaling", "replicas", "pods"),
    [
        ({}, None, 1),
        ({"minReplicas": 0}, None, 1),
        ({"minReplicas": 2, "maxReplicas": 3}, None, 2),
        ({}, 0, 0),
        ({}, 5, 5),
    ],
)
def test_replicas_are_what_was_scaled_to_and_at_first_enough_to_serve(
    scaling: dict[str, int], replicas: int | None, pods: int
) -> None:
    assert made(scaling=scaling, replicas=replicas)[0]["spec"]["replicas"] == pods


def test_a_relative_source_mounts_the_model_root_read_only() -> None:
    spec = pod()
    assert {"name": "models", "hostPath": {"path": "/srv/models"}} in spec["volumes"]
    assert {"name": "models", "mountPath": "/models", "readOnly": True} in spec["containers"][0]["volumeMounts"]
    assert "--uri=shapes" in spec["containers"][0]["args"]


def test_a_claim_is_mounted_and_read_as_a_folder() -> None:
    spec = pod(source={"uri": "pvc://weights/family/shapes"})
    claim = {"claimName": "weights", "readOnly": True}
    assert {"name": "source", "persistentVolumeClaim": claim} in spec["volumes"]
    assert "--uri=file:///source/family/shapes" in spec["containers"][0]["args"]
    assert not [volume for volume in spec["volumes"] if volume["name"] == "models"]


def test_an_image_is_mounted_and_read_as_a_folder() -> None:
    spec = pod(source={"uri": "oci://registry.example:5000/models/shapes@sha256:00"})
    image = {"reference": "registry.example:5000/models/shapes@sha256:00", "pullPolicy": "IfNotPresent"}
    assert {"name": "source", "image": image} in spec["volumes"]
    assert {"name": "source", "mountPath": "/source", "readOnly": True} in spec["containers"][0]["volumeMounts"]
    assert "--uri=file:///source" in spec["containers"][0]["args"]


@pytest.mark.parametrize(
    ("uri", "hub", "s3"), [("hf://org/repo", True, False), ("s3://bucket/x", False, True), ("shapes", False, False)]
)
def test_only_servers_that_need_them_get_a_store_s_credentials(uri: str, hub: bool, s3: bool) -> None:
    (container,) = pod(source={"uri": uri})["containers"]
    names = {variable["name"] for variable in container["env"]}
    assert ("HF_TOKEN" in names, "HF_ENDPOINT" in names) == (hub, hub)
    assert container.get("envFrom", []) == ([{"secretRef": {"name": "s3"}}] if s3 else [])


def test_pod_overrides_pass_through() -> None:
    spec = pod(
        pod={
            "nodeSelector": {"gpu": "h100"},
            "tolerations": [{"operator": "Exists"}],
            "env": [{"name": "A", "value": "1"}],
            "volumes": [{"name": "mine", "emptyDir": {}}],
            "volumeMounts": [{"name": "mine", "mountPath": "/mine"}],
            "priorityClassName": "high",
        }
    )
    assert (spec["nodeSelector"], spec["priorityClassName"]) == ({"gpu": "h100"}, "high")
    assert spec["tolerations"] == [{"operator": "Exists"}]
    assert {"name": "mine", "emptyDir": {}} in spec["volumes"]
    assert {"name": "mine", "mountPath": "/mine"} in spec["containers"][0]["volumeMounts"]
    assert {"name": "A", "value": "1"} in spec["containers"][0]["env"]


def test_secrets_are_referred_to_and_never_written_out() -> None:
    (container,) = pod(source={"uri": "hf://org/repo"})["containers"]
    variables = {variable["name"]: variable for variable in container["env"]}
    for name, secret in (("LATENTFLOW_TOKEN", "latentflow-token"), ("HF_TOKEN", "hub")):
        assert variables[name]["valueFrom"] == {"secretKeyRef": {"name": secret, "key": "token"}}
