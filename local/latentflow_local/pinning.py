"""Which commits `hf://` sources mean, asked once when workflows are served, so that every process started since loads the same."""

from __future__ import annotations

import functools
import os
from urllib.parse import urlparse

import structlog
from latentflow.api import DiffusionWorkflow, Source

_log = structlog.get_logger()


def pinned(workflows: list[DiffusionWorkflow]) -> list[DiffusionWorkflow]:
    """The workflows with the commits of their hub sources; blocks.

    A hub that is out of reach names those that it named before, from huggingface_hub's cache. Where it names none, the
    source stays as it is, and its server says why it cannot be fetched.
    """
    commit = functools.cache(_commit)

    def of(workflow: DiffusionWorkflow) -> DiffusionWorkflow:
        models = [
            model.model_copy(update={"source": commit(model.source)})
            if model.source and urlparse(model.source.uri).scheme == "hf"
            else model
            for model in workflow.spec.models
        ]
        return workflow.model_copy(update={"spec": workflow.spec.model_copy(update={"models": models})})

    return [of(workflow) for workflow in workflows]


def _commit(source: Source) -> Source:
    # Imported here: only such sources need it.
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionResolutionError

    parsed = urlparse(source.uri)
    try:
        # Read now, as the library reads it when it is imported.
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        found = api.resolve_revision(parsed.netloc + parsed.path, revision=source.revision)
    except (HfHubHTTPError, HFValidationError, RevisionResolutionError, httpx2.HTTPError, OSError) as error:
        _log.warning("could not pin a revision", source=source.uri, revision=source.revision, error=str(error)[:300])
        return source
    return source.model_copy(update={"revision": found.resolved})
