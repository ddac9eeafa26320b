"""The command `latentflow-operator`."""

from __future__ import annotations

import asyncio

from latentflow.errors import LatentflowError
from latentflow.internal import logs, serving
from latentflow.internal.metrics import SCHEDULER, Instruments

from latentflow_operator import handlers, settings
from latentflow_operator.cluster import Cluster
from latentflow_operator.leadership import Lease, LeaseLostError
from latentflow_operator.reconcile import Reconciler
from latentflow_operator.scaling import MANAGER, Scaler


def main(argv: list[str] | None = None) -> None:
    """Runs until a signal. Exits with a message and code 2 for invalid settings, or code 1 if the Lease was lost."""
    try:
        command = settings.parse(argv)
        logs.configure(process="operator", form=command.log_format)
        api = handlers.connect()
        metrics = Instruments(SCHEDULER)
        if command.metrics is not None:
            serving.serve_metrics(metrics, command.metrics)
        reconciler = Reconciler(cluster=Cluster(api), settings=command.settings)
        scaling = command.settings.scaling
        asyncio.run(
            handlers.operate(
                reconciler,
                namespaces=command.namespaces,
                liveness=command.liveness,
                lease=Lease(api, command.lease) if command.lease else None,
                scaler=Scaler(
                    store=reconciler.store,
                    observe=reconciler.observe,
                    cluster=Cluster(api, manager=MANAGER),
                    settings=scaling,
                    metrics=metrics,
                )
                if scaling is not None
                else None,
            )
        )
    except LatentflowError as error:
        code = 1 if isinstance(error, LeaseLostError) else serving.CANNOT_SERVE
        serving.exit_with("latentflow-operator", error, code=code)
