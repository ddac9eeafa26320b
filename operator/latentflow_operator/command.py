"""The command `latentflow-operator`."""

from __future__ import annotations

import asyncio
import sys

from latentflow import logs
from latentflow.errors import LatentflowError

from latentflow_operator import handlers, settings


def main(argv: list[str] | None = None) -> None:
    """Runs until a signal. Exits 2 with one line where the settings are wrong."""
    try:
        command = settings.parse(argv)
        logs.configure(process="operator", form=command.log_format)
        asyncio.run(
            handlers.operate(
                handlers.connect(command.settings), namespaces=command.namespaces, liveness=command.liveness
            )
        )
    except LatentflowError as error:
        print(f"latentflow-operator: {error.message}", file=sys.stderr)
        sys.exit(2)
