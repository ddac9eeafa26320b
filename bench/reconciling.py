"""The cost of the operator to a cluster: many workflows created at once over a real API server, then rest, then a restart.

Writes are counted by the API server's own audit log. A load has ended when every object is applied and every workflow's
status names the models that serve it; no controller and no node is there, so no pod starts. The last line is JSON.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import ranges  # noqa: E402
from kube.conftest import install_crds  # noqa: E402
from latentflow.api import API_VERSION  # noqa: E402
from rich.console import Console  # noqa: E402
from support.apiserver import ApiServer, running  # noqa: E402
from support.kubectl import Namespace, new_namespace  # noqa: E402

AGENTS = ("latentflow-operator", "kopf")
REST_SECONDS = 60
SETTLED_SECONDS = 3
SMALL, LARGE = 30, 300


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one load.

    Attributes:
        steady_state_writes: Writes during REST_SECONDS after everything was applied.
        restart_writes: Writes of a new operator process about the objects that are there.
        peak_mib: Most resident memory of the operator's process.
    """

    seconds_per_workflow: float
    calls_per_workflow: float
    steady_state_writes: int
    restart_writes: int
    peak_mib: float


def workflow(index: int, distinct: int) -> dict[str, Any]:
    """A workflow of three models, out of `distinct` models that all workflows share."""
    models = [
        {"name": name, "role": role, "source": {"uri": f"{name}-{index % (distinct // 3)}"}}
        for name, role in (("text", "TextEncoder"), ("base", "Denoiser"), ("pixels", "VAE"))
    ]
    return {
        "apiVersion": API_VERSION,
        "kind": "DiffusionWorkflow",
        "metadata": {"name": f"workflow-{index}"},
        "spec": {"models": models},
    }


def measure(count: int, distinct: int, *, console: Console) -> Cost:
    """Creates `count` workflows at once over a new API server."""
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as server:
        install_crds(server)
        with new_namespace(server, "bench") as namespace, new_namespace(server, "later") as later:
            process = start(server)
            settle(later, 1, 3)
            before = len(server.writes(*AGENTS))
            started = time.perf_counter()
            settle(namespace, count, distinct)
            seconds = time.perf_counter() - started
            creation = writes_until_rest(server) - before
            console.print(f"{count} workflows over {distinct} models: {seconds:.1f} s; {REST_SECONDS} s of rest follow")
            time.sleep(REST_SECONDS)
            steady = len(server.writes(*AGENTS)) - before - creation
            peak = peak_mib(process.pid)
            process.kill()
            process.wait()
            before = len(server.writes(*AGENTS))
            process = start(server)
            # The operator reaches a workflow that is created after its start only after those that are there.
            settle(later, 2, 6)
            restart = sum(write[1] == namespace.name for write in server.writes(*AGENTS)[before:])
            peak = max(peak, peak_mib(process.pid))
            process.terminate()
            process.wait()
    return Cost(
        seconds_per_workflow=seconds / count,
        calls_per_workflow=creation / count,
        steady_state_writes=steady,
        restart_writes=restart,
        peak_mib=peak,
    )


def writes_until_rest(server: ApiServer) -> int:
    """Number of writes once none was added for SETTLED_SECONDS: Events and last statuses follow the applied objects."""
    writes = -1
    while writes != (now := len(server.writes(*AGENTS))):
        writes = now
        time.sleep(SETTLED_SECONDS)
    return writes


def start(server: ApiServer) -> subprocess.Popen[bytes]:
    """The operator's process."""
    config = server.folder / "operator.yaml"
    config.write_text("nodeImage: latentflow-node:bench\nmodelRoot: {emptyDir: {}}\n")
    with (server.folder / "operator.log").open("ab") as log:
        return subprocess.Popen(
            [str(Path(sys.executable).parent / "latentflow-operator"), f"--config={config}"],
            env=os.environ | {"KUBECONFIG": str(server.kubeconfig)},
            stdout=log,
            stderr=log,
        )


def settle(namespace: Namespace, count: int, distinct: int) -> None:
    """Creates the workflows that are missing; returns when everything they need is applied and in their status."""
    present = namespace.list("DiffusionWorkflow")
    bodies = [workflow(i, distinct) for i in range(count) if f"workflow-{i}" not in present]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(namespace.create, bodies))
    names = {body["metadata"]["name"] for body in bodies}
    namespace.until(
        "DiffusionWorkflow",
        lambda found: all("models" in found[name].get("status", {}) for name in names),
        seconds=600,
    )
    for kind in ("DiffusionModel", "Deployment", "Service", "PodDisruptionBudget"):
        namespace.until(kind, lambda found: len(found) >= min(distinct, 3 * count), seconds=600)
    namespace.until(
        "DiffusionModel", lambda found: all("conditions" in m.get("status", {}) for m in found.values()), seconds=600
    )


def peak_mib(pid: int) -> float:
    """The most memory that a process has had resident."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def figures_of(small: Cost, large: Cost) -> dict[str, float]:
    """The figures of both loads."""
    return {
        f"seconds_per_workflow_{SMALL}": round(small.seconds_per_workflow, 4),
        f"seconds_per_workflow_{LARGE}": round(large.seconds_per_workflow, 4),
        "seconds_per_workflow_growth": round(large.seconds_per_workflow / small.seconds_per_workflow, 3),
        "api_calls_per_workflow": round(max(small.calls_per_workflow, large.calls_per_workflow), 2),
        "steady_state_writes": small.steady_state_writes + large.steady_state_writes,
        "restart_writes": small.restart_writes + large.restart_writes,
        "peak_mib": round(max(small.peak_mib, large.peak_mib), 1),
    }


def main() -> int:
    """Measures both loads; returns 1 where a figure is outside its range."""
    console = Console()
    console.print(f"load {os.getloadavg()[0]:.1f}")
    figures = figures_of(*(measure(count, count // 2, console=console) for count in (SMALL, LARGE)))
    return ranges.conclude(
        figures, ranges.load("operator"), title="The operator, on a real API server", console=console
    )


if __name__ == "__main__":
    sys.exit(main())
