"""Which workflows there are and where their models' replicas listen: a file, written by the embedded runtime and read
by the gateway.

The file is replaced as a whole, never edited, so that a reader sees one state or the next.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentflow.api.types import Role
from latentflow.api.workflow import DiffusionWorkflow
from latentflow.errors import InvalidRequestError


class Replicas(BaseModel):
    """Where one model is served."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Role
    replicas: tuple[str, ...] = Field(description="host:port of every replica.")


class Directory(BaseModel):
    """The workflows, and by identity their models' replicas."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workflows: tuple[DiffusionWorkflow, ...] = ()
    models: dict[str, Replicas] = Field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Directory:
        """InvalidRequestError where the file is missing or not a directory."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise InvalidRequestError(f"The directory file {path} cannot be read: {error.strerror}.") from None
        except ValidationError as error:
            raise InvalidRequestError(f"The directory file {path} is damaged: {error}") from None

    def write(self, path: Path) -> None:
        """Replaces the file."""
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w") as stream:
            stream.write(self.model_dump_json(by_alias=True, exclude_none=True))
        os.replace(temporary, path)
