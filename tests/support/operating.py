"""The operator as a process, over a real API server, as the ServiceAccount that the chart makes for it."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import yaml
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

from support.paths import ROOT

CONFIG = {
    "nodeImage": "latentflow-node:test",
    "modelRoot": {"hostPath": {"path": "/srv/models"}},
    "drainSeconds": 1,
    "retireSeconds": 1,
}


class Operator:
    """An operator's process.

    Args:
        kubeconfig: Holds the account that it runs as.
        folder: Gets its configuration and its log.
        options: Further arguments of its command line.
        config: Further settings of its configuration.
    """

    def __init__(self, kubeconfig: Path, folder: Path, *options: str, **config: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.log = folder / "operator.log"
        self._environment = os.environ | {"KUBECONFIG": str(kubeconfig)}
        self._options = options
        self._config = folder / "operator.yaml"
        self._config.write_text(yaml.safe_dump(CONFIG | config))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(ROOT / ".venv/bin/latentflow-operator"), f"--config={self._config}", *self._options],
                env=self._environment,
                stdout=log,
                stderr=log,
            )

    def stop(self, sign: signal.Signals = signal.SIGTERM) -> int:
        """Stops the process; returns its exit code."""
        assert self._process is not None
        self._process.send_signal(sign)
        return self._process.wait(30)

    def wait(self, seconds: float) -> int:
        """Waits until the process exits by itself; returns its exit code."""
        assert self._process is not None
        return self._process.wait(seconds)

    @retry(retry=retry_if_exception_type(AssertionError), stop=stop_after_delay(30), wait=wait_fixed(0.1), reraise=True)
    def wait_for_log(self, words: str) -> None:
        """Returns when the log contains these words; AssertionError after 30 s."""
        assert words in self.log.read_text()
