"""Structured logs, configured the same in every process: one line for each event.

A server calls `configure` once. `latentflow.internal.calls` binds the request id and the trace of each call to the log
context, so that every line of the call carries them.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Any, Literal

import structlog


def configure(*, process: str, form: Literal["console", "json"] = "console", level: str | None = None) -> None:
    """Sets up logging to stderr.

    Args:
        process: The process's name on every line: a model's identity, "gateway", "up".
        form: "console" for people, "json" for log collectors.
        level: Name of a standard level; None: LATENTFLOW_LOG_LEVEL of the environment, or INFO.
    """

    level = level or os.environ.get("LATENTFLOW_LOG_LEVEL") or "INFO"

    def name_process(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["process"] = process
        return event

    renderer: Any = structlog.processors.JSONRenderer()
    if form == "console":
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            name_process,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info if form == "json" else structlog.processors.StackInfoRenderer(),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format=f"{process}: %(name)s: %(message)s", force=True
    )
