"""Resolves the revisions of `hf://` sources to commits once, so that every process started later loads the same weights."""

from __future__ import annotations

import functools
import os
from urllib.parse import urlparse

import structlog
from latentflow.api import DiffusionWorkflow, Source
from latentflow.internal import source_uri

_log = structlog.get_logger()


def pinned(workflows: list[DiffusionWorkflow]) -> list[DiffusionWorkflow]:
    """The workflows with commits as the revisions of their hub sources. Blocks.

    If the hub is unreachable, the commit comes from huggingface_hub's cache. If there is none, the source stays
    unchanged, and its server reports why it cannot download it.
    """
    resolve = functools.cache(_resolve)

    def pin(workflow: DiffusionWorkflow) -> DiffusionWorkflow:
        models = [
            model.with_sources({name: resolve(source) for name, source in model.sources().items()})
            for model in workflow.spec.models
        ]
        return workflow.model_copy(update={"spec": workflow.spec.model_copy(update={"models": models})})

    return [pin(workflow) for workflow in workflows]


def _resolve(source: Source) -> Source:
    if urlparse(source.uri).scheme != "hf":
        return source
    # Imported here because only hub sources need it.
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionResolutionError

    try:
        # The variable is read here because the library reads it only when it is imported.
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        found = api.resolve_revision(source_uri.repository(source.uri), revision=source.revision)
    except (HfHubHTTPError, HFValidationError, RevisionResolutionError, httpx2.HTTPError, OSError) as error:
        _log.warning(
            "could not resolve a revision to a commit",
            source=source.uri,
            revision=source.revision,
            error=str(error)[:300],
        )
        return source
    return source.model_copy(update={"revision": found.resolved})
