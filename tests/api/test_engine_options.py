"""Engine options: declared once, in the type Engine; everything else follows from that declaration."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latentflow.api import DiffusionWorkflow, identity, load_workflows, placed
from latentflow.api.fields import limits_of
from latentflow.api.types import API_VERSION, Engine, ModelSpec, Role
from latentflow_local.planning import plan_models
from latentflow_nodes import settings as node
from latentflow_operator.manifests import manifests
from latentflow_operator.settings import OperatorSettings
from support.paths import EXAMPLES, ROOT

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "device": st.sampled_from(["cpu", "cuda", "cuda:3"]),
    "threads": st.none() | st.integers(1, 1024),
    "max_running": st.integers(1, 64),
    "max_waiting": st.integers(0, 4096),
    "compile": st.just(False),
    "step_cache": st.just("None"),
    "async_steps": st.integers(0, 1000),
}


def engines(role: Role) -> st.SearchStrategy[Engine]:
    return st.fixed_dictionaries(
        {},
        optional={
            name: values for name, values in VALUES.items() if role in limits_of(Engine.model_fields[name]).roles
        },
    ).map(lambda options: Engine(**options))


served = st.sampled_from(list(Role)).flatmap(lambda role: st.tuples(st.just(role), engines(role)))


def arguments_in_a_pod(role: Role, engine: Engine) -> list[str]:
    spec = ModelSpec.model_validate({"role": role, "source": {"uri": "shapes"}, "engine": engine})
    made = manifests(name="x", namespace="ns", uid="1", spec=spec, settings=OperatorSettings(node_image="node:1"))
    arguments: list[str] = made[0]["spec"]["template"]["spec"]["containers"][0]["args"]
    return arguments


def workflow(role: Role, engine: Engine) -> DiffusionWorkflow:
    """A workflow of every role; the models of one of them have this engine."""
    models = [
        {"name": one.lower(), "role": one, "source": {"uri": "shapes"}, "engine": engine if one is role else Engine()}
        | ({"attachTo": "denoiser"} if one in (Role.CONTROL_NET, Role.LORA_STORE) else {})
        for one in Role
    ]
    head = {"apiVersion": API_VERSION, "kind": "DiffusionWorkflow", "metadata": {"name": "x"}}
    return DiffusionWorkflow.model_validate(head | {"spec": {"models": models}})


def arguments_on_a_machine(
    role: Role, engine: Engine, *, threads: int | None = None, device: str | None = None
) -> tuple[str, ...]:
    one = workflow(role, engine)
    processes = plan_models(
        [one],
        model_root=Path("models"),
        addresses={identity(model): ("127.0.0.1:1", "127.0.0.1:2") for model in one.spec.models},
        threads=threads,
        device=device,
        cores=2,
        gpus=0,
        compute_lock=Path("/lock"),
        shared_memory=None,
        log_format="json",
    )
    (argv,) = (process.argv for process in processes if process.role == role)
    return argv


def test_every_option_has_values_in_this_test() -> None:
    assert VALUES.keys() == Engine.model_fields.keys()


@settings(deadline=None)
@given(served)
def test_a_server_parses_the_options_that_operator_and_embedded_runtime_write(one: tuple[Role, Engine]) -> None:
    for arguments in (arguments_in_a_pod(*one), arguments_on_a_machine(*one)):
        assert node.parse([argument.replace("$(POD_IP)", "10.1.2.3") for argument in arguments]).engine == one[1]


def test_options_at_their_defaults_are_not_written() -> None:
    engine = Engine(device="cpu", max_running=4)
    arguments = [*arguments_in_a_pod(Role.DENOISER, engine), *arguments_on_a_machine(Role.DENOISER, engine)]
    assert not [argument for argument in arguments if argument.startswith("--engine")]


@pytest.mark.parametrize("role", list(Role))
def test_options_for_every_model_reach_the_roles_that_use_them(role: Role) -> None:
    engine = node.parse(list(arguments_on_a_machine(role, Engine(), threads=3, device="cuda"))).engine
    assert engine == (Engine() if role is Role.LORA_STORE else Engine(threads=3, device="cuda"))


@pytest.mark.parametrize(
    ("role", "options", "message"),
    [
        (
            "LoRAStore",
            '{"maxRunning": 2}',
            "engine.maxRunning is an option of TextEncoder, Denoiser, ControlNet, VAE, not of",
        ),
        ("LoRAStore", '{"device": "cuda"}', "is an option of TextEncoder, Denoiser, ControlNet, VAE, not of LoRAStore"),
        ("Denoiser", '{"maxRunning": 65}', "maxRunning: Input should be less than or equal to 64"),
        ("Denoiser", '{"max_running": 2}', "maxRunning: Extra inputs are not permitted"),
        ("Denoiser", '{"device": "tpu"}', "device: 'tpu' is not a device; devices are cpu, cuda and cuda:N"),
        ("Denoiser", "maxRunning=2", "Invalid JSON"),
        ("Denoiser", "[]", "Input should be an object"),
    ],
)
def test_a_server_refuses_an_option_with_its_name_and_the_roles_that_use_it(
    capsys: pytest.CaptureFixture[str], role: str, options: str, message: str
) -> None:
    with pytest.raises(SystemExit):
        node.parse([f"--role={role}", "--uri=shapes", f"--engine={options}"])
    assert message in capsys.readouterr().err


def identities() -> list[str]:
    """Of every model of every example."""
    examples = [one for path in sorted(EXAMPLES.glob("*.yaml")) for one in load_workflows(path)]
    return [one for example in examples for one in placed(example).values()]


DECLARATION = """
    pause_seconds: float = field(
        default=0.0, ge=0, le=9, description="Pause before a forward pass in seconds.", limits=Limits(roles=[Role.DENOISER])
    )

    def options("""
USE = """

def pause(node: NodeSettings) -> float:
    return node.engine.pause_seconds
"""
CHECKS = """
import json
from tests.api import test_engine_options as here
from latentflow.api import parts
from latentflow.api.types import Engine, Role
from latentflow_nodes import settings as node
from latentflow_operator.crds import crds

found = {"file": parts.__file__}
spec = crds()["diffusionworkflows.yaml"]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
found["crd"] = spec["properties"]["models"]["items"]["properties"]["engine"]["properties"]["pauseSeconds"]
found["pod"] = node.pause(node.parse(here.arguments_in_a_pod(Role.DENOISER, Engine(pause_seconds=3))))
found["machine"] = node.pause(node.parse(list(here.arguments_on_a_machine(Role.DENOISER, Engine(pause_seconds=3)))))
found["default"] = node.pause(node.parse(["--role=Denoiser", "--uri=shapes"]))
found["identities"] = here.identities()
try:
    here.workflow(Role.VAE, Engine(pause_seconds=3))
except ValueError as error:
    found["refusal"] = str(error)
print(json.dumps(found))
"""


def test_a_new_engine_option_takes_two_edits_its_declaration_and_its_use(tmp_path: Path) -> None:
    for folder in ("client", "nodes", "operator", "local", "scheduler", "tests/api", "tests/support", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    declared = tmp_path / "client/latentflow/api/parts.py"
    declared.write_text(declared.read_text().replace("\n    def options(", DECLARATION, 1))
    with (tmp_path / "nodes/latentflow_nodes/settings.py").open("a") as settings:
        settings.write(USE)
    components = ("client", "nodes", "operator", "local", "scheduler", "tests", ".")
    path = os.pathsep.join(str(tmp_path / component) for component in components)
    finished = subprocess.run(
        [sys.executable, "-c", CHECKS],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert found["file"].startswith(str(tmp_path))
    assert found["crd"]["type"] == "number"
    assert found["crd"]["description"].startswith("Pause before a forward pass in seconds.")
    assert (found["crd"]["minimum"], found["crd"]["maximum"]) == (0, 9)
    assert (found["pod"], found["machine"], found["default"]) == (3, 3, 0)
    assert "engine.pauseSeconds is an option of Denoiser, not of VAE; remove it" in found["refusal"]
    assert found["identities"] == identities()
