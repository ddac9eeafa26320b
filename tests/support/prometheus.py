"""A real Prometheus server, scraping every second."""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from support.apiserver import Program


@dataclass(frozen=True, kw_only=True)
class Prometheus:
    """A running server."""

    url: str
    program: Program


@contextlib.contextmanager
def scraping(folder: Path, targets: Sequence[str], **labels: str) -> Iterator[Prometheus]:
    """Runs a server while entered; it may not be ready yet.

    Args:
        targets: host:port of the processes to scrape.
        labels: Added to every sample.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise RuntimeError("prometheus is not installed; on Debian: tools/debian")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "pods", "static_configs": [{"targets": list(targets), "labels": labels}]}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    options = {"config.file": folder / "prometheus.yaml", "storage.tsdb.path": folder / "tsdb"}
    arguments = [f"--{key}={value}" for key, value in options.items()] + [f"--web.listen-address={address}"]
    running = Program(Path(program), arguments, folder)
    try:
        yield Prometheus(url=f"http://{address}", program=running)
    finally:
        running.stop()
