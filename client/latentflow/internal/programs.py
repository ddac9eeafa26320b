"""The servers' programs: each starts the component that serves, or reports which packages an installation without it lacks.

The client's installation has these programs too, because one distribution contains all components.
"""

from __future__ import annotations

from importlib import import_module

from latentflow.errors import FailedPreconditionError
from latentflow.internal import serving


def node() -> None:
    """The program `latentflow-node`."""
    _run("latentflow-node", module="latentflow_nodes.server", extra="nodes")


def gateway() -> None:
    """The program `latentflow-gateway`."""
    _run("latentflow-gateway", module="latentflow_gateway.server", extra="gateway")


def operator() -> None:
    """The program `latentflow-operator`."""
    _run("latentflow-operator", module="latentflow_operator.command", extra="operator")


def _run(program: str, *, module: str, extra: str) -> None:
    """Runs `main` of a module. Exits with CANNOT_SERVE where a package of the extra is not installed."""
    try:
        main = import_module(module).main
    except ModuleNotFoundError as problem:
        missing = FailedPreconditionError(
            f"It needs packages that are not installed ({problem}). Install them in a clone of the repository: "
            f"pip install '.[{extra}]'"
        )
        serving.exit_with(program, missing)
    main()
