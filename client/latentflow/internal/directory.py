"""The directory: workflows and the addresses of their models' replicas, in a file that the embedded runtime writes and the
gateway reads.

The file is replaced as a whole, so that a reader sees one version or the next.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentflow.api.types import DiffusionWorkflow, Role
from latentflow.errors import InvalidRequestError
from latentflow.internal import replacing


class Replicas(BaseModel):
    """The replicas of one model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Role
    replicas: tuple[str, ...] = Field(description="host:port of every replica.")


class Directory(BaseModel):
    """Workflows, and the replicas of their models by identity."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workflows: tuple[DiffusionWorkflow, ...] = ()
    models: dict[str, Replicas] = Field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Directory:
        """The directory in a file. InvalidRequestError where the file is missing or damaged."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise InvalidRequestError(f"The directory file {path} cannot be read: {error.strerror}.") from None
        except ValidationError as error:
            raise InvalidRequestError(f"The directory file {path} is damaged: {error}") from None

    def write(self, path: Path) -> None:
        """Replaces the file by this directory."""
        replacing.write(path, self.model_dump_json(by_alias=True, exclude_none=True))
