"""`latentflow describe`, `models`, `validate` and `version`."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from latentflow.api import identity, load_workflows
from latentflow.api.fields import without_effect
from latentflow.cli import options, warnings
from latentflow.errors import InvalidRequestError
from latentflow.internal import control_names
from latentflow.internal.tables import print_table

_stdout = Console()
_stderr = Console(stderr=True)


def describe(
    workflow: options.Workflow = None,
    target: options.Target = None,
    kube: options.Kube = False,
    namespace: options.Namespace = None,
    timeout: options.Timeout = 30.0,
    api_key: options.ApiKey = None,
    tls_ca: options.TlsCa = None,
    as_json: options.Json = False,
) -> None:
    """Print a workflow's inputs: models, defaults, samplers and limits."""
    with options.client(
        target, timeout=timeout, api_key=api_key, tls_ca=tls_ca, kube=kube, namespace=namespace, workflow=workflow
    ) as (client, named):
        found = client.describe(named)
    if as_json:
        print(json.dumps(asdict(found)))
        return
    state = "[green]ready[/]" if found.ready else "[yellow]not ready[/]"
    _stdout.print(f"[bold]{found.name}[/]  {found.task}, family {found.family or 'unknown'}, {state}", soft_wrap=True)
    table = Table("input", "value", box=None, pad_edge=False)
    for name, value in found.defaults.items():
        table.add_row(name.replace("_", " "), f"{value:g} by default")
    table.add_row("samplers", ", ".join(found.samplers) or "unknown")
    for model in found.models:
        if model.role == "ControlNet":
            for net in ("", *model.nets):
                name = control_names.written(model.name, net)
                table.add_row(f"control image {name!r}", f"--control {name}=FILE")
        if model.role == "LoRAStore":
            table.add_row("LoRAs", escape(", ".join(model.adapters)) or ("none" if model.content_digest else "unknown"))
            for name, problem in model.unusable_adapters.items():
                table.add_row(escape(f"unusable LoRA {name!r}"), escape(problem))
    for name, value in found.limits.items():
        table.add_row(name.replace("_", " "), str(value))
    print_table(table, console=_stdout)


def models(
    target: options.Target = None,
    timeout: options.Timeout = 30.0,
    api_key: options.ApiKey = None,
    tls_ca: options.TlsCa = None,
    as_json: options.Json = False,
) -> None:
    """Print the models that are served, and the workflows that use each of them."""
    with options.client(target, timeout=timeout, api_key=api_key, tls_ca=tls_ca) as (client, _):
        found = [client.describe(name) for name in client.workflows()]
    shared: dict[str, dict[str, object]] = {}
    for workflow in found:
        for model in workflow.models:
            entry = shared.setdefault(
                model.model,
                {
                    "model": model.model,
                    "role": model.role,
                    "ready_replicas": model.ready_replicas,
                    "content_digest": model.content_digest,
                    "workflows": [],
                },
            )
            uses = entry["workflows"]
            if isinstance(uses, list):
                uses.append(f"{workflow.name}:{model.name}")
    if as_json:
        print(json.dumps(list(shared.values())))
        return
    table = Table("model", "role", "ready", "weights", "used as", box=None, pad_edge=False)
    for entry in shared.values():
        uses = entry["workflows"]
        table.add_row(
            str(entry["model"]),
            str(entry["role"]),
            str(entry["ready_replicas"]),
            str(entry["content_digest"])[:12] or "-",
            ", ".join(uses) if isinstance(uses, list) else "",
        )
    print_table(table, console=_stdout)


def validate(
    files: Annotated[list[Path], typer.Argument(help="DiffusionWorkflow files.")],
    model_root: Annotated[
        Path | None,
        typer.Option(
            "--model-root", help="Folder in which to look for relative sources.", show_default="not looked for"
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Check DiffusionWorkflow files, without a gateway or a cluster. Warnings leave the exit code 0."""
    problems: list[str] = []
    workflows = []
    for path in files:
        try:
            workflows += load_workflows(path)
        except InvalidRequestError as error:
            problems += error.message.splitlines()
    found = {workflow.full_name: warnings.of(workflow, model_root=model_root) for workflow in workflows}
    unchecked = {workflow.full_name: warnings.unchecked(workflow, model_root=model_root) for workflow in workflows}
    if as_json:
        print(json.dumps({"workflows": list(found), "problems": problems, "warnings": found, "not_checked": unchecked}))
    else:
        for problem in problems:
            _stderr.print(problem, highlight=False, markup=False, soft_wrap=True)
        for workflow in workflows:
            distinct = {identity(model) for model in workflow.spec.models}
            _stdout.print(f"{workflow.full_name}: valid, {len(distinct)} models", highlight=False, soft_wrap=True)
            for field in without_effect(workflow.spec):
                _stdout.print(f"  {field} has no effect in this version", highlight=False, markup=False, soft_wrap=True)
            for warning in found[workflow.full_name]:
                _stdout.print(f"  warning: {warning}", highlight=False, markup=False, soft_wrap=True)
            for one in unchecked[workflow.full_name]:
                _stdout.print(f"  not checked: {one}", highlight=False, markup=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)


def version(as_json: options.Json = False) -> None:
    """Print the version."""
    number = installed_version("latentflow")
    print(json.dumps({"version": number}) if as_json else f"latentflow {number}")


def print_version(wanted: bool) -> None:
    """The option --version of the program."""
    if wanted:
        version()
        raise typer.Exit
