"""The command `latentflow up`, which serves workflows on this machine until Ctrl-C."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer
from latentflow.api import DiffusionWorkflow, load_workflows
from latentflow.errors import InvalidRequestError
from latentflow.internal import hosts, logs, serving
from latentflow.internal.rpc import Tls
from latentflow.internal.tables import print_whole
from latentflow_gateway.settings import GatewaySettings, Limits
from rich.console import Console
from rich.table import Table

from latentflow_local import addresses, planning
from latentflow_local.runtime import Runtime, run
from latentflow_local.supervisor import State, Supervised

_console = Console(stderr=True)
_READY_SECONDS = 600.0
_HTTP = "127.0.0.1:8402"
# Only the started processes import these. Where they are missing, the command line reports how to install them.
for _package in ("torch", "cachetools"):
    if find_spec(_package) is None:
        raise ModuleNotFoundError(f"No module named {_package!r}", name=_package)


def up(
    files: Annotated[list[Path], typer.Argument(help="DiffusionWorkflow files.")],
    model_root: Annotated[
        Path, typer.Option("--model-root", help="Folder that contains the relative sources.", file_okay=False)
    ] = Path("models"),
    listen: Annotated[str, typer.Option("--listen", help="host:port of the gateway.")] = "127.0.0.1:8400",
    http: Annotated[
        str | None,
        typer.Option(
            "--http-listen",
            help="host:port of the gateway's HTTP API (OpenAI's images API), or none.",
            show_default=f"{_HTTP}, or a free port if another process uses it",
        ),
    ] = None,
    cors_origins: Annotated[
        list[str] | None,
        typer.Option(
            "--http-cors-origin",
            help="Origin of web pages that may use the HTTP API, or * for all; may be repeated.",
            show_default="none",
        ),
    ] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            "--api-keys",
            file_okay=False,
            help="Folder with one file for each client, which holds its API key.",
            show_default="clients need no key",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            "--tls-cert",
            help="Certificate shown to clients, PEM; turns TLS on, for gRPC and HTTP.",
            show_default="without TLS",
        ),
    ] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="Key of --tls-cert, PEM.")] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            "--max-pixels",
            min=1,
            help="Most pixels of an image, width times height.",
            show_default="4 times the default width and height, at most 2048x2048",
        ),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(
            "--max-steps", min=1, help="Most denoising steps of a request.", show_default=str(Limits.max_steps)
        ),
    ] = None,
    max_images: Annotated[
        int | None,
        typer.Option("--max-images", min=1, help="Most images of a request.", show_default=str(Limits.max_images)),
    ] = None,
    request_seconds: Annotated[
        float | None,
        typer.Option(
            "--request-seconds",
            min=0.1,
            help="Longest time of a request, whatever its client's deadline is, in seconds.",
            show_default=f"{GatewaySettings.request_seconds:g}",
        ),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            "--metrics", help="host:port of this command's own /metrics; the table lists those of the processes."
        ),
    ] = "127.0.0.1:0",
    targets: Annotated[
        Path | None,
        typer.Option(
            "--prometheus-targets",
            dir_okay=False,
            help="File to write that lists the /metrics of all processes, for file_sd_configs of Prometheus.",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads of every replica.", show_default="all cores")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda (all GPUs, in turn) or cuda:N, for every model.")
    ] = None,
    drain: Annotated[
        float, typer.Option("--drain", min=0, help="Seconds that running requests get when a process is ended.")
    ] = 10.0,
    log_format: Annotated[
        Literal["console", "json"], typer.Option("--log-format", help="Form of log lines.")
    ] = "console",
) -> None:
    """Serve workflows on this machine: processes for each distinct model, and a gateway. Ctrl-C stops them."""
    logs.configure(process="up", form=log_format)
    workflows = [workflow for path in files for workflow in load_workflows(path)]
    asyncio.run(
        _serve(
            workflows,
            model_root=model_root,
            listen=listen,
            http=None if http == "none" else http or addresses.first_choice(_HTTP),
            cors_origins=cors_origins or [],
            api_keys=api_keys,
            tls=_tls(tls_cert, tls_key),
            limits={
                "max-pixels": max_pixels or planning.max_pixels(workflows),
                "max-steps": max_steps,
                "max-images": max_images,
                "request-seconds": request_seconds,
            },
            metrics=metrics,
            targets=targets,
            threads=threads,
            device=device,
            drain=drain,
            log_format=log_format,
        )
    )


async def _serve(
    workflows: list[DiffusionWorkflow],
    *,
    model_root: Path,
    listen: str,
    http: str | None,
    cors_origins: list[str],
    api_keys: Path | None,
    tls: Tls | None,
    limits: Mapping[str, float | None],
    metrics: str,
    targets: Path | None,
    threads: int | None,
    device: str | None,
    drain: float,
    log_format: str,
) -> None:
    stop = serving.stop_signal()
    async with run(
        workflows,
        model_root=model_root,
        listen=listen,
        http=http,
        cors_origins=cors_origins,
        api_keys=api_keys,
        tls=tls,
        limits=limits,
        metrics=metrics,
        targets=targets,
        threads=threads,
        device=device,
        drain=drain,
        log_format=log_format,
    ) as runtime:
        stopped = asyncio.create_task(stop.wait())
        with _console.status(f"starting {len(runtime.supervised) - 1} model servers and a gateway"):
            ready = asyncio.create_task(runtime.supervisor.wait_ready(_READY_SECONDS))
            await asyncio.wait({ready, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not stopped.done():
            ready.result()
            print_whole(_table(runtime), console=_console)
            if runtime.http is not None:
                url = f"{'https' if tls else 'http'}://{_reachable(runtime.http, tls)}/v1"
                _console.print(f"\nOpenAI API: {url}", highlight=False, soft_wrap=True)
            name = workflows[0].name if len(workflows) > 1 else None
            target = _reachable(runtime.target, tls)
            hint = _hint(target, name, has_keys=api_keys is not None, has_tls=tls is not None)
            _console.print(hint, highlight=False, soft_wrap=True)
            failed = asyncio.create_task(runtime.supervisor.wait_failed())
            await asyncio.wait({failed, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                failed.result()
            failed.cancel()
        ready.cancel()
        _console.print("stopping")


def _table(runtime: Runtime) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("process", "role", "used as", "address", "/metrics", "state", "ready after"):
        table.add_column(column, no_wrap=True)
    for one in runtime.supervised.values():
        table.add_row(
            one.spec.name,
            one.spec.role,
            ", ".join(one.spec.uses),
            one.spec.address,
            one.spec.metrics,
            _state(one),
            _ready_seconds(one),
        )
    table.add_row("up", "", "", "", runtime.metrics, "", "")
    return table


def _state(one: Supervised) -> str:
    return f"[green]{one.state}[/]" if one.state is State.READY else f"[yellow]{one.state}[/]"


def _ready_seconds(one: Supervised) -> str:
    return f"{one.ready_seconds:.1f} s" if one.ready_seconds is not None else "-"


def _tls(certificate: Path | None, key: Path | None) -> Tls | None:
    """InvalidRequestError for one of the files without the other."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise InvalidRequestError("TLS needs both --tls-cert and --tls-key.")
    return Tls(certificate=certificate, key=key)


def _reachable(address: str, tls: Tls | None) -> str:
    """The address; one that means all of this machine's has a host of the certificate, which clients compare with it."""
    host, port = hosts.split(address)
    names = tls.names() if tls and host in ("0.0.0.0", "::") else []
    return hosts.join(names[0], port) if names else address


def _hint(target: str, workflow: str | None, *, has_keys: bool, has_tls: bool) -> str:
    workflow_option = f" -w {workflow}" if workflow else ""
    key_option = " --api-key KEY" if has_keys else ""
    tls_option = " --tls-ca CA" if has_tls else ""
    target_option = "" if target == "127.0.0.1:8400" else f" --target {target}"
    return (
        f"\nTry: {_program(sys.argv[0])} generate 'a large red circle on the left, white background'"
        f"{workflow_option}{key_option}{tls_option}{target_option}"
    )


def _program(started: str) -> str:
    """The command line's program as a shell finds it: by its name alone only where the search path contains it.

    Args:
        started: The program as it was started.
    """
    found = shutil.which("latentflow")
    if Path(started).name != "latentflow" or (found and Path(found).samefile(started)):
        return "latentflow"
    return shlex.quote(started)
