"""Structured logs, the same in every process: one line an event, with the request's id and trace where there is one.

A server calls `configure` once, binds `request_id` and `trace_id` with `structlog.contextvars` when a call arrives, and
logs with `structlog.get_logger()`; everything below it in the same task carries them.
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
        process: Name on every line: the model's name, "gateway", "up".
        form: "console" for people, "json" for collectors.
        level: A standard level's name; None: LATENTFLOW_LOG_LEVEL of the environment, or INFO.
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
