"""The typed workflow API: a DiffusionWorkflow is read, checked and compared without a cluster."""

from __future__ import annotations

from latentflow.api.identity import distinct_models, identity, merge_scaling, placed
from latentflow.api.loading import load_workflows, parse_workflows
from latentflow.api.model import DiffusionModel
from latentflow.api.parts import API_VERSION, Engine, Role, Scaling, Source
from latentflow.api.workflow import Defaults, DiffusionWorkflow, Model, WorkflowSpec

__all__ = [
    "API_VERSION",
    "Defaults",
    "DiffusionModel",
    "DiffusionWorkflow",
    "Engine",
    "Model",
    "Role",
    "Scaling",
    "Source",
    "WorkflowSpec",
    "distinct_models",
    "identity",
    "load_workflows",
    "merge_scaling",
    "parse_workflows",
    "placed",
]
