"""Where a model's weights are: resolves a source to a folder on this machine, and downloads it where it is remote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from latentflow.errors import FailedPreconditionError
from latentflow.reasons import Reason

from latentflow_nodes.weights.fetching import Progress, wanted


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source's folder on this machine.

    Attributes:
        pipeline: The diffusers pipeline folder.
        component: The one component folder that `subfolder` named, or None.
    """

    pipeline: Path
    component: Path | None = None

    def part(self, name: str) -> Path:
        """Folder of a part of the pipeline, or the one component that `subfolder` named, or the source itself if it is one."""
        if self.component is not None:
            return self.component
        folder = self.pipeline / name
        is_component = not folder.is_dir() and (self.pipeline / "config.json").is_file()
        return self.pipeline if is_component else folder


def locate(
    *,
    uri: str,
    subfolder: str | None,
    revision: str | None,
    role: str,
    parts: Sequence[str],
    model_root: Path,
    cache: Path,
    progress: Progress,
) -> Source:
    """Finds a source's folder; downloads what the role reads of it for `hf://` and `s3://`.

    Args:
        role: The role that reads it.
        parts: The folders of a pipeline that the role may read.
        cache: Where downloads from buckets are kept; those from hubs are where huggingface_hub keeps them.
        progress: Receives the progress of a download.

    Raises:
        FailedPreconditionError: There is no such folder, or it cannot be fetched.
    """
    scheme = urlparse(uri).scheme
    # Imported here, because only such sources need them.
    if scheme == "hf":
        from latentflow_nodes.weights import hub

        root = hub.fetch(uri, revision=revision, wanted=wanted(role, subfolder, parts=parts), progress=progress)
    elif scheme == "s3":
        from latentflow_nodes.weights import bucket

        root = bucket.fetch(uri, wanted=wanted(role, subfolder, parts=parts), cache=cache, progress=progress)
    elif scheme == "file":
        root = Path(urlparse(uri).path)
    elif scheme == "":
        root = model_root / uri
        if not root.resolve().is_relative_to(model_root.resolve()):
            raise FailedPreconditionError(
                f"Source {uri!r} leaves the model root {model_root}; name a folder under it, or use file:///…",
                reason=Reason.WEIGHTS_UNAVAILABLE,
            )
    else:
        raise FailedPreconditionError(
            f"This server cannot read {scheme}:// sources ({uri!r}); use a folder, file:///…, hf://org/repo or "
            "s3://bucket/path.",
            reason=Reason.WEIGHTS_UNAVAILABLE,
        )
    folder = root / subfolder if subfolder else root
    if not folder.is_dir():
        raise FailedPreconditionError(
            f"There is no weights folder {folder} (source {uri!r}); check the uri, the subfolder and the model root.",
            reason=Reason.WEIGHTS_UNAVAILABLE,
        )
    return Source(pipeline=root, component=folder if subfolder else None)
