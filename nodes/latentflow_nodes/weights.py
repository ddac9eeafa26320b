"""Where a model's weights lie and whether they may be loaded: resolves a source, refuses what is broken or pickled.

Roles ask `locate` for the folder and `check` for its component folders before diffusers reads them, so that a user gets
one sentence about the file instead of a loader's traceback.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from latentflow.errors import DataLossError, FailedPreconditionError
from safetensors import SafetensorError, safe_open

from latentflow_nodes.fetching import Progress, wanted

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_BLOCK = 1 << 20


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
        """Folder of a part of the pipeline, or the one component that was named instead, or that the source itself is."""
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
    model_root: Path,
    cache: Path,
    progress: Progress,
) -> Source:
    """Finds a source's folder; downloads what the role reads of it for `hf://` and `s3://`.

    Args:
        cache: Where downloads from buckets are kept; those from hubs are where huggingface_hub keeps them.
        progress: Is told how far a download is.

    Raises:
        FailedPreconditionError: There is no such folder, or it cannot be fetched.
    """
    scheme = urlparse(uri).scheme
    # Imported here: only such sources need them.
    if scheme == "hf":
        from latentflow_nodes import hub

        root = hub.fetch(uri, revision=revision, wanted=wanted(role, subfolder), progress=progress)
    elif scheme == "s3":
        from latentflow_nodes import bucket

        root = bucket.fetch(uri, wanted=wanted(role, subfolder), cache=cache, progress=progress)
    elif scheme == "file":
        root = Path(urlparse(uri).path)
    elif scheme == "":
        root = model_root / uri
        if not root.resolve().is_relative_to(model_root.resolve()):
            raise FailedPreconditionError(
                f"Source {uri!r} leads out of the model root {model_root}; name a folder under it, or use file:///…",
                reason="WEIGHTS_UNAVAILABLE",
            )
    else:
        raise FailedPreconditionError(
            f"This server cannot read {scheme}:// sources ({uri!r}); use a folder, file:///…, hf://org/repo or "
            "s3://bucket/path.",
            reason="WEIGHTS_UNAVAILABLE",
        )
    folder = root / subfolder if subfolder else root
    if not folder.is_dir():
        raise FailedPreconditionError(
            f"There is no weights folder {folder} (source {uri!r}); check the uri, the subfolder and the model root.",
            reason="WEIGHTS_UNAVAILABLE",
        )
    return Source(pipeline=root, component=folder if subfolder else None)


def config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A component's configuration. FailedPreconditionError where it is missing or not JSON."""
    path = folder / name
    try:
        loaded = json.loads(path.read_text())
    except FileNotFoundError:
        raise FailedPreconditionError(
            f"{path} is missing; {folder} is not a diffusers component folder.", reason="WEIGHTS_UNAVAILABLE"
        ) from None
    except (OSError, ValueError) as error:
        raise DataLossError(f"{path} cannot be read: {error}. Fetch the folder again.") from None
    if not isinstance(loaded, dict):
        raise DataLossError(f"{path} holds no JSON object. Fetch the folder again.")
    return loaded


def check(folder: Path) -> list[Path]:
    """The safetensors files of a component folder, each proven whole. Pickles are refused."""
    if not folder.is_dir():
        raise FailedPreconditionError(
            f"The component folder {folder} is missing; check the source.", reason="WEIGHTS_UNAVAILABLE"
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        if pickles:
            raise FailedPreconditionError(
                f"{folder} holds a pickle ({pickles[0]}) and no safetensors. Weights load from safetensors only: "
                "a pickle can run code. Convert it, for instance with diffusers' save_pretrained.",
                reason="PICKLE_REFUSED",
            )
        raise FailedPreconditionError(
            f"{folder} holds no *.safetensors file; check the source.", reason="WEIGHTS_UNAVAILABLE"
        )
    for path in files:
        check_file(path)
    return files


def check_file(path: Path) -> None:
    """DataLossError unless the file's header parses and all the data it promises is there."""
    try:
        with safe_open(path, framework="pt") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise DataLossError(
            f"{path} is damaged or cut off ({error}; {path.stat().st_size} bytes). Fetch the file again."
        ) from None


def digest(files: list[Path]) -> str:
    """SHA-256 over files' contents, in the order of their names within the model; lower-case hex."""
    total = hashlib.sha256()
    for path in files:
        one = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                one.update(block)
        total.update(one.digest())
    return total.hexdigest()


def family(pipeline: Path) -> str:
    """The model family of a pipeline folder: "sd" or "sdxl"."""
    name = str(config(pipeline, "model_index.json").get("_class_name", ""))
    if name.startswith("StableDiffusionXL"):
        return "sdxl"
    if name.startswith("StableDiffusion") and not name.startswith("StableDiffusion3"):
        return "sd"
    raise FailedPreconditionError(
        f"{pipeline} holds a {name or 'pipeline without a class name'}; this server runs Stable Diffusion 1.x, 2.x and XL.",
        reason="UNSUPPORTED_FAMILY",
    )
