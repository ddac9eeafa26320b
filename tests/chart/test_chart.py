"""The Helm chart: its rendered objects, the values that it refuses, and whether a real API server accepts the objects."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from latentflow.api.types import ModelSpec
from latentflow_operator.manifests import manifests
from latentflow_operator.settings import OperatorSettings
from support import schemas
from support.apiserver import ApiServer
from support.chart import CASES, CHART, GOLDEN, cases, golden, helm, objects, template
from support.kubectl import Namespace, new_namespace
from support.paths import ROOT

VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


@pytest.fixture(scope="module")
def schema_location(api_server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    return schemas.write(api_server, tmp_path_factory.mktemp("schemas"))


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.stem)
def test_helm_lint_reports_nothing(case: Path) -> None:
    done = helm("lint", "--strict", str(CHART), f"--values={case}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.stem)
def test_the_chart_renders_to_its_golden_file(case: Path) -> None:
    assert golden(case) == (GOLDEN / case.name).read_text(), "run `make golden` and review the difference"


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.stem)
def test_every_object_conforms_to_its_schema(case: Path, schema_location: str) -> None:
    command = ["kubeconform", "-strict", "-summary", "-output=json"]
    done = subprocess.run(
        [*command, f"-schema-location={schema_location}"],
        input=template(f"--values={case}"),
        capture_output=True,
        text=True,
        check=False,
    )
    outcome = json.loads(done.stdout)
    assert done.returncode == 0, outcome.get("resources", done.stderr)
    assert outcome["summary"]["valid"] > 15


def test_a_schema_refuses_an_unknown_field(schema_location: str) -> None:
    wrong = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "dat": {}}
    command = ["kubeconform", "-strict", f"-schema-location={schema_location}"]
    done = subprocess.run(command, input=yaml.safe_dump(wrong), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "dat" in done.stdout


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.stem)
def test_an_api_server_accepts_every_object(case: Path, api_server: ApiServer) -> None:
    with new_namespace(api_server, "chart") as namespace:
        rendered = template(f"--values={case}", "--set=namespaces=null", namespace=namespace.name)
        api_server.apply([body for body in yaml.safe_load_all(rendered) if body], "--dry-run=server")


def test_network_policies_protect_model_servers_in_the_listed_namespaces() -> None:
    found = objects("--set=networkPolicy.modelNamespaces={art,photos}", namespace="latentflow")
    places = [body["metadata"]["namespace"] for body in found if body["metadata"]["name"] == "latentflow-nodes"]
    assert sorted(places) == ["art", "latentflow", "photos"]


WRONG = [
    ("PodMonitor", {"podMetricsEndpoints": [{"port": "metrics", "interval": "soon"}]}, "interval"),
    ("PodMonitor", {"podMetricEndpoints": []}, "podMetricEndpoints"),
    ("GRPCRoute", {"hostnames": ["images.example:443"]}, "hostnames"),
    ("GRPCRoute", {"rules": [{"backendRefs": [{"name": "gateway"}]}]}, "Must have port for Service reference"),
]


@pytest.mark.parametrize(("kind", "change", "said"), WRONG, ids=[said for *_, said in WRONG])
def test_an_api_server_refuses_a_wrong_object_of_another_project(
    kind: str, change: dict[str, Any], said: str, api_server: ApiServer
) -> None:
    with new_namespace(api_server, "chart") as namespace:
        case = f"--values={CASES / 'everything.yaml'}"
        found = [body for body in objects(case, namespace=namespace.name) if body["kind"] == kind]
        api_server.apply(found, "--dry-run=server")
        found[0]["spec"] |= change
        with pytest.raises(AssertionError, match=said):
            api_server.apply(found, "--dry-run=server")


def test_a_namespace_that_enforces_restricted_pod_security_accepts_the_pods(api_server: ApiServer) -> None:
    with new_namespace(api_server, "restricted") as namespace:
        _restrict(namespace)
        templates = [body for body in objects(namespace=namespace.name) if body["kind"] == "Deployment"]
        assert len(templates) == 2
        for body in templates:
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": body["metadata"]["name"]}}
            spec = body["spec"]["template"]["spec"] | {"serviceAccountName": "default"}
            namespace.create(pod | {"spec": spec})


def _restrict(namespace: Namespace) -> None:
    label = {"pod-security.kubernetes.io/enforce": "restricted"}
    namespace.call("PATCH", f"/api/v1/namespaces/{namespace.name}", {"metadata": {"labels": label}}, merge=True)


def test_the_definitions_equal_those_of_the_repository_and_survive_an_uninstall() -> None:
    definitions = {body["metadata"]["name"]: body for body in objects() if body["kind"] == "CustomResourceDefinition"}
    assert len(definitions) == 2
    for path in (ROOT / "crds").glob("*.yaml"):
        wanted = yaml.safe_load(path.read_text())
        made = definitions[wanted["metadata"]["name"]]
        assert made["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
        assert made == wanted


def test_values_leave_the_definitions_out_or_delete_them_with_the_chart() -> None:
    kinds = [body["kind"] for body in objects("--set=crds.install=false")]
    assert "CustomResourceDefinition" not in kinds
    for body in objects("--set=crds.keep=false"):
        if body["kind"] == "CustomResourceDefinition":
            assert "annotations" not in body["metadata"]


REFUSED = [
    ("opertor.replicas=1", "opertor"),
    ("operator.replicas=-1", "/operator/replicas"),
    ("operator.logFormat=xml", "/operator/logFormat"),
    ("gateway.maxRunning=0", "/gateway/maxRunning"),
    ("gateway.limits.pixels=many", "/gateway/limits/pixels"),
    ("gateway.service.type=Cluster", "/gateway/service/type"),
    ("gateway.service.port=70000", "/gateway/service/port"),
    ("gateway.ingress.enabled=true", "/gateway/ingress/host"),
    ("gateway.http.port=0", "/gateway/http/port"),
    ("gateway.http.corsOrigins[0]=app.example", "/gateway/http/corsOrigins/0"),
    ("gateway.http.ingress.enabled=true", "/gateway/http/ingress/host"),
    (
        "gateway.http.ingress.enabled=true,gateway.http.ingress.host=a,gateway.http.enabled=false",
        "/gateway/http/enabled",
    ),
    ("gateway.grpcRoute.enabled=true", "/gateway/grpcRoute/parentRefs"),
    ("images.node.pullPolicy=Sometimes", "/images/node/pullPolicy"),
    ("models.drainSeconds=-1", "/models/drainSeconds"),
    ("models.hubEndpoint=hub.example/", "/models/hubEndpoint"),
    ("models.s3Secret=Not_A_Name", "/models/s3Secret"),
    ("operator.hubSecret=Not_A_Name", "/operator/hubSecret"),
    ("namespaces[0]=Not_A_Name", "/namespaces/0"),
    ("auth.tokenSecret=Not_A_Name", "/auth/tokenSecret"),
    ("gateway.apiKeysSecret=Not_A_Name", "/gateway/apiKeysSecret"),
    ("scaling.prometheus=prometheus:9090", "/scaling/prometheus"),
    ("scaling.targetUtilization=70", "/scaling/targetUtilization"),
    ("podMonitor.interval=soon", "/podMonitor/interval"),
    ("models.cache.emptyDir.sizeLimit=1Gi,models.cache.hostPath.path=/x", "/models/cache"),
    (
        "gateway.podDisruptionBudget.minAvailable=1,gateway.podDisruptionBudget.maxUnavailable=1",
        "/gateway/podDisruptionBudget",
    ),
]


@pytest.mark.parametrize(("setting", "where"), REFUSED, ids=[setting for setting, _ in REFUSED])
def test_a_wrong_value_is_refused_with_its_name(setting: str, where: str) -> None:
    done = helm("template", "latentflow", str(CHART), f"--set={setting}")
    assert done.returncode != 0
    assert where in done.stderr


def test_the_schema_has_exactly_the_values_of_the_chart() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def compare(values: Any, part: Any, path: str) -> None:
        if "properties" not in part:
            return
        assert part["additionalProperties"] is False, path
        optional = {"global"} if path == "" else {"maxUnavailable", "minAvailable"} & part["properties"].keys()
        assert part["properties"].keys() - optional == values.keys(), path
        for name, value in values.items():
            compare(value, part["properties"][name], f"{path}/{name}")

    compare(VALUES, schema, "")


def test_without_http_nothing_of_the_gateway_names_its_port() -> None:
    rendered = [body for body in objects("--set=gateway.http.enabled=false") if body["kind"] != "ConfigMap"]
    assert "8402" not in json.dumps(rendered)
    assert "8402" in json.dumps(objects())


def test_with_a_list_of_namespaces_the_components_have_no_rights_elsewhere() -> None:
    made = objects("--set=namespaces={art,photos}", namespace="flow")
    bindings = [body for body in made if body["kind"] in ("ClusterRoleBinding", "RoleBinding")]
    assert {body["kind"] for body in bindings} == {"RoleBinding"}
    assert {body["metadata"]["namespace"] for body in bindings} == {"art", "photos", "flow"}
    for component in ("operator", "gateway"):
        (deployment,) = (
            body
            for body in made
            if body["kind"] == "Deployment" and body["metadata"]["name"] == f"latentflow-{component}"
        )
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        assert {"--namespace=art", "--namespace=photos"} <= set(container["args"])


def test_network_policies_open_the_ports_of_every_model_that_may_run_in_a_pod() -> None:
    (policy,) = (
        body for body in objects() if body["kind"] == "NetworkPolicy" and body["metadata"]["name"].endswith("-nodes")
    )
    grpc, metrics = (rule["ports"][1] for rule in policy["spec"]["ingress"])
    settings = OperatorSettings(node_image="x")
    for index in range(1, 32):
        host = {"model": "denoiser-1", "index": index}
        spec = ModelSpec.model_validate({"role": "VAE", "source": {"uri": "shapes"}, "host": host})
        (service,) = manifests(name="vae-1", namespace="ns", uid="1", spec=spec, settings=settings)
        ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
        assert grpc["port"] <= ports["grpc"] <= grpc["endPort"]
        assert metrics["port"] <= ports["metrics"] <= metrics["endPort"]


def test_the_components_accept_the_arguments_and_configuration_of_the_chart(tmp_path: Path) -> None:
    from latentflow_gateway import settings as gateway
    from latentflow_operator import settings as operator

    for case, body in itertools.product(cases(), ("operator", "gateway")):
        made = objects(f"--values={case}")
        (deployment,) = (
            found for found in made if found["kind"] == "Deployment" and found["metadata"]["name"].endswith(body)
        )
        arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
        if body == "gateway":
            assert gateway.parse(arguments).directory is None
            continue
        (config,) = (found for found in made if found["kind"] == "ConfigMap")
        (tmp_path / "operator.yaml").write_text(config["data"]["operator.yaml"])
        arguments[0] = f"--config={tmp_path / 'operator.yaml'}"
        for ip, liveness in (("10.0.0.1", "10.0.0.1:8080"), ("fd00::1", "[fd00::1]:8080")):
            parsed = operator.parse([argument.replace("$(POD_IP)", ip) for argument in arguments])
            assert parsed.settings.node_image
            assert parsed.liveness == liveness
