"""The manifests of the objects that serve a model."""

from __future__ import annotations

from typing import Any, get_args, get_origin

import pytest
from latentflow.api.types import Engine, ModelSpec, Pod, Source
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


def made(settings: OperatorSettings = SETTINGS, **spec: Any) -> tuple[Manifest, ...]:
    whole = {"role": "VAE", "source": {"uri": "shapes"}} | spec
    return manifests(name="vae-1", namespace="ns", uid="uid-1", spec=ModelSpec.model_validate(whole), settings=settings)


def pod(**spec: Any) -> Manifest:
    template: Manifest = made(**spec)[0]["spec"]["template"]["spec"]
    return template


def test_all_objects_of_a_model_are_owned_by_it() -> None:
    for manifest in made():
        assert manifest["metadata"]["name"] == "vae-1"
        (owner,) = manifest["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"], owner["controller"]) == ("DiffusionModel", "uid-1", True)


def test_the_server_accepts_its_arguments() -> None:
    (container,) = pod(
        role="Denoiser",
        source={"uri": "hf://org/repo", "subfolder": "vae", "revision": "main", "variant": "fp16"},
        engine={"threads": 2, "maxRunning": 3, "maxWaiting": 5},
        dtype="bfloat16",
        parallelism={"tensor": 2},
    )["containers"]
    settings = parse([argument.replace("$(POD_IP)", "10.1.2.3") for argument in container["args"]])
    assert (settings.role, settings.uri) == ("Denoiser", "hf://org/repo")
    assert (settings.subfolder, settings.revision, settings.variant) == ("vae", "main", "fp16")
    assert (settings.engine, settings.dtype) == (Engine(threads=2, max_running=3, max_waiting=5), "bfloat16")
    assert settings.tensor == 2
    assert settings.advertise == "10.1.2.3:8500"
    assert settings.identity == "vae-1"


@pytest.mark.parametrize("degree", [1, "Auto"])
def test_a_model_that_is_not_divided_has_the_arguments_of_earlier_versions(degree: Any) -> None:
    divided, plain = (pod(role="Denoiser", **one) for one in ({"parallelism": {"tensor": degree}}, {}))
    assert divided == plain


def test_the_termination_grace_period_exceeds_the_drain() -> None:
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
def test_replicas_are_as_scaled_and_initially_enough_to_serve(
    scaling: dict[str, int], replicas: int | None, pods: int
) -> None:
    assert made(scaling=scaling, replicas=replicas)[0]["spec"]["replicas"] == pods


@pytest.mark.parametrize(
    ("rollout", "surge", "unavailable"), [({}, 1, 0), ({"rollout": "Surge"}, 1, 0), ({"rollout": "Replace"}, 0, 1)]
)
def test_a_replacing_rollout_ends_a_pod_before_it_starts_the_next(
    rollout: dict[str, Any], surge: int, unavailable: int
) -> None:
    strategy = made(**rollout)[0]["spec"]["strategy"]
    assert strategy["rollingUpdate"] == {"maxSurge": surge, "maxUnavailable": unavailable}


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


def test_each_net_of_a_controlnet_is_mounted_and_reaches_its_server() -> None:
    spec = pod(
        role="ControlNet",
        source={"uri": "pvc://nets/edges"},
        nets=[
            {"name": "depth", "source": {"uri": "pvc://nets/depth", "variant": "fp16"}},
            {"name": "pose", "source": {"uri": "hf://org/pose", "revision": "main"}},
            {"name": "lines", "source": {"uri": "oci://registry.example/lines:1", "subfolder": "controlnet"}},
        ],
    )
    (container,) = spec["containers"]
    settings = parse([argument.replace("$(POD_IP)", "10.1.2.3") for argument in container["args"]])
    assert [(net.name, net.source) for net in settings.nets] == [
        ("depth", Source(uri="file:///nets/1/depth", variant="fp16")),
        ("pose", Source(uri="hf://org/pose", revision="main")),
        ("lines", Source(uri="file:///nets/3", subfolder="controlnet")),
    ]
    paths = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    claims = {
        paths[v["name"]] for v in spec["volumes"] if v.get("persistentVolumeClaim", {}).get("claimName") == "nets"
    }
    assert claims == {"/source", "/nets/1"}
    assert [paths[v["name"]] for v in spec["volumes"] if "image" in v] == ["/nets/3"]
    assert "HF_TOKEN" in {variable["name"] for variable in container["env"]}


def test_an_image_is_mounted_and_read_as_a_folder() -> None:
    spec = pod(source={"uri": "oci://registry.example:5000/models/shapes@sha256:00"})
    image = {"reference": "registry.example:5000/models/shapes@sha256:00", "pullPolicy": "IfNotPresent"}
    assert {"name": "source", "image": image} in spec["volumes"]
    assert {"name": "source", "mountPath": "/source", "readOnly": True} in spec["containers"][0]["volumeMounts"]
    assert "--uri=file:///source" in spec["containers"][0]["args"]


@pytest.mark.parametrize(
    ("uri", "hub", "s3"), [("hf://org/repo", True, False), ("s3://bucket/x", False, True), ("shapes", False, False)]
)
def test_only_servers_that_need_them_get_credentials(uri: str, hub: bool, s3: bool) -> None:
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


def test_every_field_of_a_pod_reaches_the_deployment() -> None:
    """But those of containers, and labels and annotations, which other tests look at."""
    values: dict[type, Any] = {bool: False, str: "x", list: [{"name": "x"}], dict: {"x": "y"}}
    elsewhere = {"labels", "annotations", "env", "volumes", "volume_mounts"}
    wanted: dict[str, Any] = {}
    for name, field in Pod.model_fields.items():
        kind = next(one for one in get_args(field.annotation) if one is not type(None))
        if name not in elsewhere:
            wanted[str(field.alias)] = values[get_origin(kind) or kind]
    assert len(wanted) > 15
    found = pod(pod=wanted)
    assert {name: found[name] for name in wanted} == wanted


def test_labels_and_annotations_of_a_pod_stand_beside_the_operator_s_own() -> None:
    theirs = {"labels": {"kueue.x-k8s.io/queue-name": "images"}, "annotations": {"prometheus.io/scrape": "false"}}
    template = made(pod=theirs)[0]["spec"]["template"]["metadata"]
    assert template["labels"] == made()[0]["spec"]["template"]["metadata"]["labels"] | theirs["labels"]
    assert template["annotations"]["prometheus.io/scrape"] == "false"
    assert template["annotations"]["prometheus.io/port"] == "8501"


def test_secrets_are_referenced_and_never_written_out() -> None:
    (container,) = pod(source={"uri": "hf://org/repo"})["containers"]
    variables = {variable["name"]: variable for variable in container["env"]}
    for name, secret in (("LATENTFLOW_TOKEN", "latentflow-token"), ("HF_TOKEN", "hub")):
        assert variables[name]["valueFrom"] == {"secretKeyRef": {"name": secret, "key": "token"}}


COLOCATED: list[Manifest] = [
    {"model": "controlnet-1", "role": "ControlNet", "source": {"uri": "pvc://nets/edges"}, "engine": {"maxWaiting": 2}},
    {"model": "lora-store-1", "role": "LoRAStore", "source": {"uri": "pvc://styles"}, "dtype": "float16"},
    {"model": "vae-1", "role": "VAE", "source": {"uri": "pvc://styles"}, "resources": {"limits": {"cpu": "1"}}},
]


def colocated(**spec: Any) -> Manifest:
    return pod(role="Denoiser", source={"uri": "pvc://weights"}, colocated=COLOCATED, **spec)


def container(spec: Manifest, name: str) -> Manifest:
    (found,) = (one for one in spec["containers"] if one["name"] == name)
    return dict(found)


def arguments(of: Manifest) -> dict[str, str]:
    return dict(argument.removeprefix("--").split("=", 1) for argument in of["args"])


def test_colocated_models_are_containers_with_their_own_names_and_ports() -> None:
    containers = colocated()["containers"]
    assert [one["name"] for one in containers] == ["node", "controlnet-1", "lora-store-1", "vae-1"]
    ports = [port for one in containers for port in one["ports"]]
    for field in ("name", "containerPort"):
        assert len({port[field] for port in ports}) == len(ports) == 8
    assert all(len(port["name"]) <= 15 for port in ports)
    for one in containers:
        grpc, metrics = (port["containerPort"] for port in one["ports"])
        given = arguments(one)
        assert given["listen"] == f"[::]:{grpc}"
        assert given["advertise"] == f"$(POD_IP):{grpc}"
        assert given["metrics"] == f"[::]:{metrics}"
        assert {one[probe]["grpc"]["port"] for probe in ("startupProbe", "readinessProbe")} == {grpc}
        assert one["livenessProbe"]["tcpSocket"]["port"] == one["ports"][1]["name"]


def test_a_colocated_model_s_container_follows_its_spec() -> None:
    spec = colocated()
    edges, styles, pixels = (arguments(container(spec, one["model"])) for one in COLOCATED)
    assert (edges["role"], edges["identity"], edges["engine"]) == ("ControlNet", "controlnet-1", '{"maxWaiting": 2}')
    assert (styles["role"], styles["dtype"]) == ("LoRAStore", "float16")
    assert (pixels["role"], container(spec, "vae-1")["resources"]) == ("VAE", {"limits": {"cpu": "1"}})


def test_the_servers_of_a_pod_share_a_memory_volume_and_a_single_server_has_none() -> None:
    spec = colocated()
    assert {"name": "memory", "emptyDir": {"medium": "Memory"}} in spec["volumes"]
    for one in spec["containers"]:
        assert {"name": "memory", "mountPath": "/memory"} in one["volumeMounts"]
        assert arguments(one)["shared-memory"] == "/memory"
    assert not [volume for volume in pod()["volumes"] if volume["name"] == "memory"]
    assert "shared-memory" not in arguments(pod()["containers"][0])


def test_each_container_of_a_pod_mounts_the_claim_of_its_own_model() -> None:
    spec = colocated()
    names = [volume["name"] for volume in spec["volumes"]]
    assert len(set(names)) == len(names)
    claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if "emptyDir" not in v}
    for name, claim in (("node", "weights"), ("controlnet-1", "nets"), ("lora-store-1", "styles"), ("vae-1", "styles")):
        mounted = [m["name"] for m in container(spec, name)["volumeMounts"] if m["mountPath"] == "/source"]
        assert [claims[mount] for mount in mounted] == [claim]


def test_pod_overrides_of_a_host_reach_every_container() -> None:
    spec = colocated(
        pod={
            "env": [{"name": "A", "value": "1"}],
            "volumes": [{"name": "mine", "emptyDir": {}}],
            "volumeMounts": [{"name": "mine", "mountPath": "/mine"}],
            "resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": "one-gpu"}],
        }
    )
    for one in spec["containers"]:
        assert {"name": "mine", "mountPath": "/mine"} in one["volumeMounts"]
        assert {"name": "A", "value": "1"} in one["env"]
    assert spec["resourceClaims"] == [{"name": "gpu", "resourceClaimTemplateName": "one-gpu"}]


def test_a_colocated_model_has_only_a_service_with_its_own_port_in_the_host_s_pods() -> None:
    containers = colocated()["containers"]
    for index, one in enumerate(COLOCATED, 1):
        host = {"model": "denoiser-1", "index": index}
        spec = ModelSpec.model_validate({"role": "VAE", "source": {"uri": "shapes"}, "host": host})
        (service,) = manifests(name=one["model"], namespace="ns", uid="uid-1", spec=spec, settings=SETTINGS)
        assert service["kind"] == "Service"
        assert service["metadata"]["labels"]["latentflow.io/model"] == one["model"]
        assert service["spec"]["selector"] == {"latentflow.io/model": "denoiser-1"}
        ports = {port["name"]: (port["targetPort"], port["port"]) for port in service["spec"]["ports"]}
        grpc, metrics = ((port["name"], port["containerPort"]) for port in containers[index]["ports"])
        assert ports == {"grpc": grpc, "metrics": metrics}
