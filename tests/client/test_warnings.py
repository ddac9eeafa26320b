"""The warnings of `latentflow validate`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from latentflow.api import DiffusionWorkflow, load_workflows
from latentflow.cli import warnings
from support.paths import EXAMPLES, ROOT

MODELS = ROOT / "models"


def workflow(**base: Any) -> DiffusionWorkflow:
    """The smallest example with another denoiser."""
    (one,) = load_workflows(EXAMPLES / "shapes-minimal.yaml")
    body = one.model_dump(mode="json", by_alias=True, exclude_none=True)
    next(model for model in body["spec"]["models"] if model["role"] == "Denoiser").update(base)
    return DiffusionWorkflow.model_validate(body)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_examples_have_no_warning_about_devices(path: Path) -> None:
    for one in load_workflows(path):
        assert warnings.of(one, model_root=None) == []


@pytest.mark.parametrize(
    ("base", "warning"),
    [
        ({"engine": {"device": "cuda"}}, "models[base].resources: the model runs on cuda and requests no device"),
        (
            {"engine": {"device": "cuda:1"}, "resources": {"limits": {"cpu": 1, "memory": "8Gi"}}},
            "models[base].resources: the model runs on cuda:1 and requests no device",
        ),
        (
            {"resources": {"limits": {"nvidia.com/gpu": 1}}},
            "models[base].engine.device: the model requests nvidia.com/gpu and runs on the CPU",
        ),
        ({"source": {"uri": "absent"}}, f"models[base].source.uri: {MODELS}/absent does not exist"),
        (
            {"source": {"uri": "shapes", "subfolder": "absent"}},
            f"models[base].source.subfolder: {MODELS}/shapes/absent does not exist",
        ),
    ],
)
def test_a_probable_mistake_is_reported_with_its_field(base: dict[str, Any], warning: str) -> None:
    (found,) = warnings.of(workflow(**base), model_root=MODELS)
    assert found.startswith(warning)


@pytest.mark.parametrize(
    "resources", [{"limits": {"nvidia.com/gpu": 1}}, {"limits": {"amd.com/gpu": 1}}, {"claims": [{"name": "gpu"}]}]
)
def test_a_model_that_requests_a_device_for_cuda_has_no_warning(resources: dict[str, Any]) -> None:
    assert warnings.of(workflow(engine={"device": "cuda"}, resources=resources), model_root=MODELS) == []


def test_weights_of_pipelines_of_different_classes_are_reported(tmp_path: Path) -> None:
    for folder, name in (("shapes", "StableDiffusionPipeline"), ("large", "StableDiffusionXLPipeline")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    (found,) = warnings.of(workflow(source={"uri": "large"}), model_root=tmp_path)
    assert "text, pixels of a StableDiffusionPipeline and base of a StableDiffusionXLPipeline" in found


def test_the_command_prints_warnings_and_ends_well(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "latentflow"), "validate", f"--model-root={tmp_path}"]
    ended = subprocess.run(
        [*command, str(EXAMPLES / "shapes-minimal.yaml")], capture_output=True, text=True, check=True
    )
    assert ended.stdout.count(f"warning: models[text].source.uri: {tmp_path}/shapes does not exist") == 1
    assert "not checked" not in ended.stdout
    document = subprocess.run(
        [*command, "--json", str(EXAMPLES / "shapes-minimal.yaml")], capture_output=True, text=True, check=True
    )
    assert len(json.loads(document.stdout)["warnings"]["default/shapes-minimal"]) == 3


def test_sources_that_were_not_looked_for_are_listed(tmp_path: Path) -> None:
    remote = workflow(source={"uri": "hf://org/repo"})
    assert warnings.unchecked(remote, model_root=None) == [
        "whether the model root contains shapes; --model-root FOLDER checks this",
        "whether hf://org/repo can be read",
    ]
    assert warnings.unchecked(remote, model_root=tmp_path) == ["whether hf://org/repo can be read"]
    command = [str(Path(sys.executable).parent / "latentflow"), "validate", str(EXAMPLES / "shapes-minimal.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "  not checked: whether the model root contains shapes; --model-root FOLDER checks this\n" in ended.stdout
