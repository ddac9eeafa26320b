"""A model's folder on this machine: a diffusers pipeline, one component, or a single file, and where a role finds its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SourceFolder:
    """A source's folder on this machine.

    Attributes:
        pipeline: The diffusers pipeline folder.
        component: The one component folder that `subfolder` named, or None.
        variant: The variant of the weight files, or None.
        single_file: The file that holds all weights of a model, or None; the pipeline is the folder around it.
    """

    pipeline: Path
    component: Path | None = None
    variant: str | None = None
    single_file: Path | None = None

    @property
    def is_pipeline(self) -> bool:
        """Whether a pipeline is there, around the component if the source names one."""
        return self.single_file is None and (self.pipeline / "model_index.json").is_file()

    @property
    def alone(self) -> Path:
        """The folder that holds the model itself, where no pipeline is around it."""
        return self.component or self.pipeline

    def part(self, name: str) -> Path:
        """The folder of a part of the pipeline.

        Returns the component that `subfolder` names, where the source names one; the source itself, where it is a component;
        and the single file, where the source is one.
        """
        if self.single_file is not None:
            return self.single_file
        if self.component is not None:
            return self.component
        folder = self.pipeline / name
        is_component = not folder.is_dir() and (self.pipeline / "config.json").is_file()
        return self.pipeline if is_component else folder

    def beside(self, name: str) -> Path:
        """Folder of a part that belongs to the model whichever component the source names, such as a tokenizer."""
        if self.is_pipeline or self.single_file is not None:
            return self.pipeline / name
        return self.alone / name if (self.alone / name).is_dir() else self.alone


def is_present(index: Mapping[str, Any], name: str) -> bool:
    """Whether a model_index.json names a part, instead of leaving it out or empty."""
    entry = index.get(name)
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
