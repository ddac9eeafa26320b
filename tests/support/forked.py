"""Processes of tests, forked from the fork server of `latentflow up`: torch and diffusers are imported once, not in each."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from latentflow_local import processes


def context() -> ForkServerContext:
    """The fork server's. One runs for each process of tests, from the first use on."""
    processes.prepare()
    return multiprocessing.get_context("forkserver")


def start(target: Callable[..., None], *arguments: Any, environment: Mapping[str, str]) -> ForkServerProcess:
    """A process that runs a function with variables added to its environment."""
    process = context().Process(target=_run, args=(target, arguments, dict(environment)))
    process.start()
    return process


def fetch_vae(uri: str, cache: Path, begun: Event) -> None:
    """Fetches a remote pack's VAE as its server does."""
    from latentflow.internal.metrics import NODE, Instruments
    from latentflow_nodes.weights.fetching import Progress
    from latentflow_nodes.weights.source import locate

    begun.set()
    locate(
        uri=uri,
        subfolder=None,
        revision=None,
        role="VAE",
        parts=["vae"],
        model_root=Path(),
        cache=cache,
        progress=Progress(Instruments(NODE, model="m", role="VAE"), source="s"),
    )


def _run(target: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    from huggingface_hub import constants

    os.environ.update(environment)
    # Read when the library was imported, which the fork server has done.
    constants.HF_HUB_CACHE = environment.get("HF_HUB_CACHE", constants.HF_HUB_CACHE)
    target(*arguments)
