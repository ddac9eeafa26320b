"""Loading DiffusionWorkflow files: which are accepted, and the messages with which others are refused."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentflow.api import Role, load_workflows, parse_workflows
from latentflow.errors import InvalidRequestError

EXAMPLES = Path(__file__).parents[2] / "examples"
GOOD = (EXAMPLES / "shapes.yaml").read_text()


def problems(text: str) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        parse_workflows(text, origin="file.yaml")
    return caught.value.message


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_valid(path: Path) -> None:
    assert load_workflows(path)


def test_a_workflow_is_read_with_its_defaults_filled_in() -> None:
    (workflow,) = parse_workflows(GOOD)
    assert workflow.full_name == "default/shapes"
    assert [model.name for model in workflow.of_role(Role.CONTROL_NET)] == ["edges", "layout"]
    assert workflow.spec.models[0].engine.max_running == 4


def test_a_file_may_hold_several_workflows() -> None:
    names = [workflow.full_name for workflow in load_workflows(EXAMPLES / "shapes-shared.yaml")]
    assert names == ["default/plain", "default/traced"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "role: VAE",
            "rol: VAE",
            "file.yaml:18:22: spec.models[5].rol: 'rol' is not a field here; did you mean 'role'?",
        ),
        ("role: VAE", "role: Vae", "spec.models[5].role: input should be 'TextEncoder', 'Denoiser'"),
        ("name: layout", "name: edges", "two models are named 'edges'"),
        ("role: VAE,", "role: TextEncoder,", "several models have the role TextEncoder; a workflow needs exactly one"),
        ("attachTo: base, source: {uri: shapes, subfolder: loras}", "source: {uri: shapes}", "needs attachTo"),
        (
            "attachTo: base, source: {uri: shapes, subfolder: loras}",
            "attachTo: x, source: {uri: y}",
            "names no denoiser",
        ),
        ("steps: 20", "steps: 0", "spec.defaults.steps: input should be greater than or equal to 1, not 0"),
        ("steps: 20", "steps: 5000", "less than or equal to 1000"),
        ("steps: 20", "steps: many", "spec.defaults.steps"),
        ("guidanceScale: 3.0", "guidanceScale: .nan", "spec.defaults.guidanceScale"),
        ("width: 64", "width: 65", "multiple of 8"),
        ("width: 64", "width: 0", "spec.defaults.width"),
        ("latencyScale: 2.0", "latencyScale: 2.0, latencySeconds: 3", "exactly one of latencyScale and latencySeconds"),
        ("uri: shapes}}", 'uri: "ftp://x/y"}}', "the scheme 'ftp' is unknown"),
        (
            "uri: shapes}}",
            'uri: "https://huggingface.co/a/b/tree/main"}}',
            "is the address of a web page; for the repository of a hub, write hf://a/b",
        ),
        ("uri: shapes}}", 'uri: "https://huggingface.co/a"}}', "the scheme 'https' is unknown"),
        ("uri: shapes}}", "uri: ../shapes}}", "a relative URI stays under the model root"),
        ("uri: shapes}}", "uri: 'hf://only'}}", "hf://org/repo"),
        ("subfolder: loras", "subfolder: ../loras", "without '..'"),
        ("name: shapes", "name: Shapes", "'Shapes' is not a name of lower-case letters"),
        ("task: TextToImage", "task: TextToVideo", "spec.task"),
        ("task: TextToImage", "stages: []", "stages is reserved"),
        ("v1alpha1", "v2", "apiVersion: 'latentflow.io/v2' is not known"),
        ("kind: DiffusionWorkflow", "kind: Deployment", "kind: 'Deployment' is not served"),
        ("task: TextToImage", "task: TextToImage\n  task: TextToImage", "duplicate key"),
        ("spec:", "spec: [", "file.yaml:"),
    ],
)
def test_a_problem_is_reported_with_its_position(old: str, new: str, message: str) -> None:
    assert old in GOOD
    assert message in problems(GOOD.replace(old, new))


def test_all_problems_of_a_file_are_reported_at_once() -> None:
    text = GOOD.replace("steps: 20", "steps: 0").replace("width: 64", "width: 65").replace("role: VAE", "rol: VAE")
    assert len(problems(text).splitlines()) >= 4


def test_two_workflows_of_one_name_are_refused() -> None:
    assert "default/shapes is already defined at" in problems(f"{GOOD}\n---\n{GOOD}")


@pytest.mark.parametrize("text", ["", "---\n", "# nothing"])
def test_an_empty_file_is_refused(text: str) -> None:
    assert "the file is empty" in problems(text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"absent\.yaml: the file cannot be read"):
        load_workflows(tmp_path / "absent.yaml")


def test_aliases_that_blow_up_are_refused() -> None:
    bomb = "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
    for above, below in zip("bcdefg", "abcdef", strict=True):
        bomb += f"{above}: &{above} [{', '.join(['*' + below] * 10)}]\n"
    text = "apiVersion: latentflow.io/v1alpha1\nkind: DiffusionWorkflow\nmetadata: {name: x}\nspec:\n"
    text += "".join(f"  {line}\n" for line in bomb.splitlines())
    assert "too large or too deep" in problems(text)


@given(st.text())
def test_no_text_makes_the_loader_fail_otherwise(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        parse_workflows(text)


@given(st.data())
def test_no_damage_to_a_good_file_makes_the_loader_fail_otherwise(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(GOOD)))
    end = data.draw(st.integers(start, min(len(GOOD), start + 20)))
    text = GOOD[:start] + data.draw(st.text(max_size=10)) + GOOD[end:]
    with contextlib.suppress(InvalidRequestError):
        assert parse_workflows(text)
