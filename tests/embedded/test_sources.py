"""The sources from which the embedded runtime loads weights."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from latentflow import Client
from latentflow.api import DiffusionWorkflow
from latentflow.errors import UnavailableError, UnimplementedError
from latentflow_local.pinning import pinned
from latentflow_local.planning import models_of
from PIL import Image
from support.bucket import BUCKET, Store
from support.hub import Hub
from support.packs import SHAPES
from support.paths import EXAMPLES
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

PROGRAM = str(Path(sys.executable).parent / "latentflow")


def shapes_from(uri: str) -> dict[str, object]:
    body: dict[str, object] = yaml.safe_load(
        (EXAMPLES / "shapes-minimal.yaml").read_text().replace("uri: shapes", f'uri: "{uri}"')
    )
    return body


@pytest.mark.parametrize("uri", ["pvc://claim/shapes", "oci://registry.example/shapes:1"])
def test_a_source_that_needs_a_cluster_is_refused_with_its_name(uri: str) -> None:
    with pytest.raises(UnimplementedError) as caught:
        models_of([DiffusionWorkflow.model_validate(shapes_from(uri))])
    scheme = uri.partition(":")[0]
    assert f"model 'text' comes from {uri}" in caught.value.message
    assert f"{scheme}:// needs a cluster" in caught.value.message


def test_hub_models_are_pinned_to_one_commit_while_they_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with Hub().running() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        workflows = [DiffusionWorkflow.model_validate(shapes_from("hf://org/shapes"))]
        assert pinned(workflows) == workflows
        commit = hub.push("org/shapes", SHAPES)
        requests = hub.requests["revision"]
        assert {model.source.revision for model in pinned(workflows)[0].spec.models if model.source} == {commit}
        assert hub.requests["revision"] == requests + 1
        hub.down = True
        assert {model.source.revision for model in pinned(workflows)[0].spec.models if model.source} == {commit}


def test_the_nets_of_a_controlnet_are_pinned_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    body: Any = yaml.safe_load((EXAMPLES / "shapes.yaml").read_text())
    edges = next(model for model in body["spec"]["models"] if model["name"] == "edges")
    edges["nets"] = [{"name": "layout", "source": {"uri": "hf://org/shapes", "subfolder": "controlnet-layout"}}]
    with Hub().running() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        commit = hub.push("org/shapes", SHAPES)
        (found,) = pinned([DiffusionWorkflow.model_validate(body)])
    nets = [net for model in found.spec.models for net in model.nets or ()]
    assert [net.source.revision for net in nets] == [commit]


def test_without_a_hub_source_nothing_is_pinned() -> None:
    workflows = [DiffusionWorkflow.model_validate(shapes_from("shapes"))]
    assert pinned(workflows) == workflows


@retry(retry=retry_if_exception_type(UnavailableError), stop=stop_after_delay(240), wait=wait_fixed(0.5), reraise=True)
def generated(target: str) -> Image.Image:
    with Client(target, timeout=120) as client:
        return client.generate("a red circle", steps=2, seed=1).image


def test_models_from_a_bucket_are_served_on_one_machine(tmp_path: Path) -> None:
    with Store().running() as store, socket.socket() as free:
        store.upload(SHAPES, "shapes")
        free.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        (tmp_path / "workflow.yaml").write_text(yaml.safe_dump(shapes_from(f"s3://{BUCKET}/shapes")))
        environment = {
            "HOME": str(tmp_path),
            "AWS_ENDPOINT_URL": store.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
        }
        up = subprocess.Popen(
            [PROGRAM, "up", str(tmp_path / "workflow.yaml"), f"--listen={target}", "--http-listen=none", "--threads=1"],
            env=os.environ | environment,
        )
        try:
            assert generated(target).size == (64, 64)
        finally:
            up.terminate()
            up.wait(60)
    assert list((tmp_path / ".cache/latentflow/s3").glob("*/*/vae/*.safetensors"))
