"""`latentflow validate` on the table of cases that the API server is held to as well."""

from __future__ import annotations

import json
from typing import Any

import pytest
from kube.cases import BAD, GOOD, Case
from latentflow.api import API_VERSION, parse_workflows
from latentflow.api.model import ModelSpec
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
