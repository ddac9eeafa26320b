"""Limits of fields beyond their types: the roles that use them, the values that this version serves, values without effect.

Types declare such fields with `field`. The limits reach the descriptions in CRDs and reference, the refusals of `latentflow
validate` and of the API server (`latentflow_operator.rules`), identities and conditions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

ANY = "any value"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a field.

    Attributes:
        roles: Of an engine option, the roles whose servers use it.
        only: The values that this version serves, None standing for an absent field; empty: all.
        without_effect: The values that are accepted and have no effect in this version; `ANY` stands for all.
    """

    roles: Sequence[str] = ()
    only: Sequence[Any] = ()
    without_effect: Sequence[Any] = ()

    @property
    def refusal(self) -> str:
        """The part of a refusal that follows the name of the field."""
        if list(self.only) == [None]:
            return "not served by this version; remove it"
        return f"this version serves only {_words(self.only)}"

    def explain(self, description: str) -> str:
        """A field's description, with its limits."""
        if self.roles:
            description += f" Used by {', '.join(self.roles)}."
        if list(self.only) == [None]:
            description += " Not served by this version."
        elif self.only:
            description += f" This version serves only {_words(self.only)}."
        if list(self.without_effect) == [ANY]:
            description += " No effect in this version."
        elif self.without_effect:
            description += f" In this version {_words(self.without_effect)} has no effect."
        return description


def field(*, description: str, limits: Limits, default: Any = None, **constraints: Any) -> Any:
    """A field with limits. `constraints` as of pydantic's Field."""
    extra = {name: value for name, value in asdict(limits).items() if value not in ((), None)}
    return Field(default=default, description=limits.explain(description), json_schema_extra=extra, **constraints)


def limits_of(info: FieldInfo) -> Limits:
    """The limits of a field, of pydantic's `model_fields`."""
    return Limits(**info.json_schema_extra) if isinstance(info.json_schema_extra, dict) else Limits()  # type: ignore[arg-type]


def unserved(value: BaseModel) -> Iterator[str]:
    """A refusal for each field whose value this version does not serve. Fields of nested types are left to those types."""
    for name, info in type(value).model_fields.items():
        limits = limits_of(info)
        if limits.only and getattr(value, name) not in limits.only:
            yield f"{info.alias}: {limits.refusal}"


def without_effect(value: BaseModel, path: str = "") -> Iterator[str]:
    """The paths of all fields, at any depth, whose values have no effect, such as models[base].parallelism.latent."""
    for name, info in type(value).model_fields.items():
        found, here = getattr(value, name), f"{path}{info.alias}"
        idle = limits_of(info).without_effect
        if found in idle or (list(idle) == [ANY] and found is not None):
            yield here
        elif isinstance(found, BaseModel):
            yield from without_effect(found, f"{here}.")
        elif isinstance(found, list):
            for index, one in enumerate(found):
                if isinstance(one, BaseModel):
                    yield from without_effect(one, f"{here}[{getattr(one, 'name', index)}].")


def _words(values: Sequence[Any]) -> str:
    words = [str(value).lower() if isinstance(value, bool) else str(value) for value in values]
    return " and ".join(words)
