"""The user's path on a real cluster: install the chart, apply a workflow, make an image."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import images
import pytest
import yaml
from conftest import RELEASE_NAMESPACE
from latentflow.api import load_workflows
from latentflow.client import Client
from latentflow_local.runtime import run
from observing import Prometheus
from PIL import Image, ImageChops, ImageDraw
from support.apiserver import ApiServer, search_path
from support.kubectl import Body, Namespace
from support.paths import EXAMPLES, ROOT
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

PROMPT, SEED = "a large red circle on the left and a small blue star on the right, white background", 7
LORA = "outline:0.8"
MARK = "-----image-----"
GATEWAYS = f"latentflow-gateway.{RELEASE_NAMESPACE}.svc"


def threaded(example: str) -> Body:
    """An example whose models use one thread each, so that results do not depend on the number of cores."""
    body = dict(yaml.safe_load((EXAMPLES / example).read_text()))
    for model in body["spec"]["models"]:
        # A LoRA store computes nothing and has no threads.
        if model["role"] != "LoRAStore":
            model["engine"] = {"threads": 1}
    return body


def generate(release: ApiServer, namespace: Namespace, output: Path, *options: str) -> Image.Image:
    """The image that `latentflow generate --kube` makes on this machine."""
    latentflow = Path(sys.executable).parent / "latentflow"
    command = [str(latentflow), "generate", PROMPT, "--kube", f"--namespace={namespace.name}", f"--output={output}"]
    done = subprocess.run(
        [*command, f"--seed={SEED}", f"--lora={LORA}", *options],
        env=os.environ | {"KUBECONFIG": str(release.kubeconfig), "PATH": search_path()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Image.open(output)


def generate_in_a_pod(release: ApiServer, namespace: Namespace) -> Image.Image:
    """The image that the client makes in a pod that knows only the DNS name of the gateways."""
    workflow = f"--workflow={namespace.name}/shapes"
    make = f"latentflow generate '{PROMPT}' {workflow} --target={GATEWAYS}:8400 --seed={SEED} --lora={LORA}"
    script = f"{make} -o /tmp/out.png && echo {MARK} && base64 /tmp/out.png"
    return printed_by_a_pod(release, namespace, "client", ["sh", "-c", script])


def generate_over_http(release: ApiServer, namespace: Namespace) -> Image.Image:
    """The image that a program without our client makes in a pod."""
    body = {"model": f"{namespace.name}/shapes", "prompt": PROMPT, "seed": SEED, "loras": {"outline": 0.8}}
    program = f"""
import json, urllib.request
url, body = "http://{GATEWAYS}:8402/v1/images/generations", {json.dumps(body)!r}.encode()
request = urllib.request.Request(url, body, {{"content-type": "application/json"}})
with urllib.request.urlopen(request, timeout=240) as response:
    print({MARK!r}, json.load(response)["data"][0]["b64_json"])
"""
    return printed_by_a_pod(release, namespace, "http-client", ["python3", "-c", program])


def printed_by_a_pod(release: ApiServer, namespace: Namespace, name: str, command: list[str]) -> Image.Image:
    """The image whose PNG a command prints as base64 after the mark, in a pod of the control image."""
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    namespace.create(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name},
            "spec": {
                "restartPolicy": "Never",
                "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
                "containers": [
                    {
                        "name": name,
                        "image": images.CONTROL,
                        "imagePullPolicy": "Never",
                        "command": command,
                        "securityContext": security,
                    }
                ],
            },
        }
    )
    pod = namespace.until("Pod", lambda found: found[name]["status"].get("phase") in ("Succeeded", "Failed"))
    logs = release.kubectl("logs", f"--namespace={namespace.name}", name)
    assert pod[name]["status"]["phase"] == "Succeeded", logs
    return Image.open(io.BytesIO(base64.b64decode(logs.partition(MARK)[2])))


async def embedded(workflow: Body, folder: Path) -> Image.Image:
    """The image that the embedded runtime makes from the same file."""
    path = folder / "workflow.yaml"
    path.write_text(yaml.safe_dump(workflow))
    async with run(load_workflows(path), model_root=ROOT / "models", listen="127.0.0.1:0", log_level="WARNING") as up:
        await up.supervisor.wait_ready(240)

        def request() -> Image.Image:
            with Client(up.target, timeout=120) as client:
                return client.generate(PROMPT, seed=SEED, loras={"outline": 0.8}).image

        return await asyncio.to_thread(request)


def wait_until_ready(release: ApiServer, namespace: Namespace, *names: str) -> None:
    for name in names:
        try:
            release.kubectl(
                "wait", f"--namespace={namespace.name}", "--for=condition=Ready", f"dwf/{name}", "--timeout=5m"
            )
        except AssertionError as error:
            state = release.kubectl("describe", "dwf,dm,pods", f"--namespace={namespace.name}")
            raise AssertionError(f"{error}\n{state}") from None


@pytest.mark.timeout(900)
async def test_a_workflow_becomes_ready_and_every_client_gets_the_same_image(
    release: ApiServer, namespace: Namespace, tmp_path: Path
) -> None:
    workflow = threaded("shapes.yaml")
    namespace.apply(workflow)
    wait_until_ready(release, namespace, "shapes")
    outside = generate(release, namespace, tmp_path / "outside.png")
    inside, over_http = generate_in_a_pod(release, namespace), generate_over_http(release, namespace)
    here = await embedded(workflow, tmp_path)
    assert ImageChops.difference(outside.convert("RGB"), here.convert("RGB")).getbbox() is None
    for other in (inside, over_http):
        assert ImageChops.difference(outside.convert("RGB"), other.convert("RGB")).getbbox() is None


@pytest.mark.timeout(900)
def test_a_second_workflow_adds_only_its_new_model_and_deleting_both_leaves_none(
    release: ApiServer, namespace: Namespace
) -> None:
    namespace.apply(threaded("shapes.yaml"))
    wait_until_ready(release, namespace, "shapes")
    before = namespace.list("Pod").keys()
    assert len(before) == 6
    second = threaded("shapes.yaml")
    second["metadata"]["name"] = "half"
    for model in second["spec"]["models"]:
        if model["name"] == "base":
            model["dtype"] = "bfloat16"
    namespace.apply(second)
    wait_until_ready(release, namespace, "shapes", "half")
    both = namespace.list("Pod").keys()
    assert before < both
    assert len(both - before) == 1
    for name in ("shapes", "half"):
        namespace.delete("DiffusionWorkflow", name)
    for kind in ("DiffusionModel", "Deployment", "Service", "PodDisruptionBudget", "Pod"):
        namespace.until(kind, lambda found: not found, seconds=120)


def outline(path: Path) -> None:
    """Writes the hint of the edges ControlNet: the outline of a circle, white on black."""
    image = Image.new("RGB", (64, 64))
    ImageDraw.Draw(image).ellipse((8, 20, 32, 44), outline="white")
    image.save(path)


@pytest.mark.timeout(900)
def test_tensors_use_shared_memory_in_a_pod_and_grpc_between_pods_for_the_same_image(
    release: ApiServer, prometheus: Prometheus, namespace: Namespace, tmp_path: Path
) -> None:
    names = ("shapes", "shapes-colocated")
    for name in names:
        namespace.apply(threaded(f"{name}.yaml"))
    wait_until_ready(release, namespace, *names)
    outline(tmp_path / "edges.png")
    control = f"--control=edges={tmp_path / 'edges.png'}"
    spread, together = (
        generate(release, namespace, tmp_path / f"{name}.png", control, f"--workflow={name}") for name in names
    )
    assert ImageChops.difference(spread.convert("RGB"), together.convert("RGB")).getbbox() is None

    def model(workflow: str, name: str) -> str:
        body = namespace.get("DiffusionWorkflow", workflow)
        assert body is not None
        return next(str(entry["model"]) for entry in body["status"]["models"] if entry["name"] == name)

    done = time.time()

    @retry(retry=retry_if_exception_type(AssertionError), stop=stop_after_delay(30), wait=wait_fixed(1), reraise=True)
    def scraped() -> None:
        """Returns when Prometheus has scraped every server since the last image was done."""
        scrape = f'min by (model) (timestamp(latentflow_ready{{namespace="{namespace.name}"}}))'
        assert min(prometheus.query(scrape, "model").values()) > done

    def transports(workflow: str, name: str, direction: str) -> set[str]:
        """The transports by which a model has sent or received tensors, from its scraped metrics."""
        labels = f'namespace="{namespace.name}",model="{model(workflow, name)}",direction="{direction}"'
        return set(prometheus.query(f"sum by (transport) (latentflow_tensor_bytes_total{{{labels}}}) > 0", "transport"))

    scraped()
    # Residuals come from the same pod, conditioning from the text encoder's; adapters always use gRPC. The latents are so
    # small that they travel in the denoiser's answer.
    assert transports("shapes-colocated", "base", "receive") == {"shared-memory", "grpc"}
    assert transports("shapes-colocated", "edges", "send") == {"shared-memory"}
    for name in ("text", "edges", "styles"):
        assert transports("shapes", name, "send") == {"grpc"}


def test_the_release_s_pods_run_under_restricted_pod_security(release: ApiServer) -> None:
    pods = json.loads(release.kubectl("get", "pods", f"--namespace={RELEASE_NAMESPACE}", "--output=json"))["items"]
    assert {pod["status"]["phase"] for pod in pods} == {"Running"}
    assert len(pods) == 3
