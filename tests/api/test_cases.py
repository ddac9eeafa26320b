"""`latentflow validate` on the table of cases that the API server is held to as well."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from kube.cases import BAD, BASE, GOOD, Case
from latentflow.api import API_VERSION, DiffusionWorkflow, parse_workflows
from latentflow.api.fields import without_effect
from latentflow.api.types import PATTERNS, ModelSpec
from latentflow.errors import InvalidRequestError


def workflow(spec: dict[str, Any]) -> str:
    """JSON is YAML."""
    return json.dumps({"apiVersion": API_VERSION, "kind": "DiffusionWorkflow", "metadata": {"name": "x"}, "spec": spec})


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_a_bad_spec_is_refused_with_the_words_of_the_table(case: Case) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_workflows(workflow(case.spec()))
    assert case.words in caught.value.message


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case.name)
def test_an_unusual_good_spec_is_taken(case: Case) -> None:
    assert parse_workflows(workflow(case.spec()))


@pytest.mark.parametrize(
    ("former", "present"), [("inside", "host"), ("companions", "colocated"), ("near", "preferredHost")]
)
def test_a_renamed_field_of_a_model_is_refused_with_its_present_name(former: str, present: str) -> None:
    with pytest.raises(ValueError, match=f"the field {former} was renamed; write {present}"):
        ModelSpec.model_validate({"role": "VAE", "source": {"uri": "shapes"}, former: {}})


def test_every_pattern_of_a_field_is_explained_in_words() -> None:
    schema = json.dumps(DiffusionWorkflow.model_json_schema())
    patterns = {json.loads(found) for found in re.findall(r'"pattern": ("(?:[^"\\\\]|\\\\.)*")', schema)}
    assert patterns == PATTERNS.keys()


def test_no_value_of_a_choice_is_another_type_in_the_yaml_of_kubectl() -> None:
    """kubectl reads YAML 1.1, in which Off is a boolean."""
    schema = DiffusionWorkflow.model_json_schema()
    choices = {value for found in re.findall(r'"enum": (\[[^]]*\])', json.dumps(schema)) for value in json.loads(found)}
    assert "Auto" in choices
    assert not {value.lower() for value in choices} & {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "~"}


def test_fields_without_effect_are_named_by_their_paths() -> None:
    spec = Case("", ("slo",), {"latencyScale": 2, "priority": 3}).spec() | {"editing": {}}
    spec["models"][1]["parallelism"] = {"latent": 2, "tensor": "Auto", "context": "Auto"}
    (found,) = parse_workflows(workflow(spec))
    base = "models[base].parallelism"
    assert list(without_effect(found.spec)) == [f"{base}.tensor", f"{base}.context", "slo", "editing"]
    (plain,) = parse_workflows(workflow(BASE))
    assert not list(without_effect(plain.spec))
