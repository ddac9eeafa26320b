"""Where a model's weights are: resolves a source to a folder on this machine, and downloads it where it is remote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse

from latentflow.errors import FailedPreconditionError, LatentflowError
from latentflow.internal import source_uri, weight_files, weight_names
from latentflow.internal.source_folder import SourceFolder
from latentflow.reasons import Reason

from latentflow_nodes.weights.fetching import Progress, wanted, wanted_beside


def locate(
    *,
    uri: str,
    subfolder: str | None,
    revision: str | None,
    variant: str | None = None,
    role: str,
    parts: Sequence[str],
    model_root: Path,
    cache: Path,
    progress: Progress,
) -> SourceFolder:
    """Finds a source's folder; downloads what the role reads of it for `hf://` and `s3://`.

    Args:
        variant: The variant of the weight files; None: the files without a variant in their names.
        role: The role that reads it.
        parts: The folders of a pipeline that the role may read.
        cache: Where downloads from buckets are kept; those from hubs are where huggingface_hub keeps them.
        progress: Receives the progress of a download.

    Raises:
        FailedPreconditionError: There is no such folder, or it cannot be fetched.
    """
    scheme = urlparse(uri).scheme
    # A single file's path below what a hub or a bucket gives.
    inside = source_uri.path_in_repository(uri) if scheme == "hf" else uri.rpartition("/")[2]
    is_single_file = source_uri.is_single_file(uri)
    if is_single_file:
        _check_single_file(uri, subfolder=subfolder, variant=variant, role=role)
        remote = wanted_beside(inside, parts=parts)
    else:
        remote = wanted(role, subfolder, parts=parts, variant=variant)
    # Imported here, because only such sources need them.
    if scheme == "hf":
        from latentflow_nodes.weights import hub

        root = hub.fetch(uri, revision=revision, wanted=remote, progress=progress)
        if not is_single_file and (bare := _bare(root, role)):
            raise _refusal(uri, bare, hub.names(uri, revision=revision), variant)
    elif scheme == "s3":
        from latentflow_nodes.weights import bucket

        root = bucket.fetch(uri, wanted=remote, cache=cache, progress=progress)
        if not is_single_file and (bare := _bare(root, role)):
            raise _refusal(uri, bare, bucket.names(uri), variant)
    elif scheme == "file":
        try:
            root = source_uri.file_path(uri)
        except ValueError as error:
            raise FailedPreconditionError(
                f"Source {uri!r} cannot be read: {error}.", reason=Reason.WEIGHTS_UNAVAILABLE
            ) from None
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
    meant = source_uri.hub_of_missing(uri, model_root) if scheme == "" else ""
    if is_single_file:
        file = root / inside if scheme in ("hf", "s3") else root
        if not file.is_file():
            raise FailedPreconditionError(
                f"There is no file {file} (source {uri!r}); {_what_to_check(scheme, 'the uri')}{meant}.",
                reason=Reason.WEIGHTS_UNAVAILABLE,
            )
        return SourceFolder(pipeline=file.parent, single_file=file)
    folder = root / subfolder if subfolder else root
    if folder.is_file():
        raise weight_names.refusal_of_file(str(folder))
    if not folder.is_dir():
        raise FailedPreconditionError(
            f"There is no weights folder {folder} (source {uri!r}); {_what_to_check(scheme, 'the uri', 'the subfolder')}{meant}.",
            reason=Reason.WEIGHTS_UNAVAILABLE,
        )
    if role != "LoRAStore" and subfolder is None and (only := weight_files.only_file(folder)):
        _check_single_file(uri, subfolder=None, variant=variant, role=role)
        return SourceFolder(pipeline=folder, single_file=only)
    return SourceFolder(pipeline=root, component=folder if subfolder else None, variant=variant)


def _what_to_check(scheme: str, *fields: str) -> str:
    checked = [*fields, *(["the model root (--model-root)"] if scheme == "" else [])]
    return "check " + " and ".join([", ".join(checked[:-1]), checked[-1]] if len(checked) > 1 else checked)


def _check_single_file(uri: str, *, subfolder: str | None, variant: str | None, role: str) -> None:
    problem = ""
    if role == "LoRAStore":
        problem = "a LoRA store reads a folder; name the folder of the file"
    elif subfolder or variant:
        problem = f"it is a file and has no {'subfolder' if subfolder else 'variant'}; remove that field"
    if problem:
        raise FailedPreconditionError(f"Source {uri!r}: {problem}.", reason=Reason.WEIGHTS_UNAVAILABLE)


def _bare(root: Path, role: str) -> str | None:
    """The path of a downloaded component folder without weight files; None where every component has some.

    ".", the path of the download itself, where it contains no configuration at all.
    """
    if role == "LoRAStore":
        return None
    folders = sorted(path.parent for path in root.rglob("config.json"))
    if not folders and not (root / "model_index.json").is_file():
        return "."
    return next((str(f.relative_to(root)) for f in folders if not any(f.glob(f"*{weight_names.SUFFIX}"))), None)


def _refusal(uri: str, folder: str, paths: Sequence[str], variant: str | None) -> LatentflowError:
    """Why a component of a remote source came without weights, by the paths of all its files."""
    prefix = "" if folder == "." else f"{folder}/"
    inside = [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]
    return weight_names.refusal(f"{uri}/{prefix}".rstrip("/"), inside, variant=variant)
