"""How requests name a ControlNet of a workflow, or one of its nets: MODEL or MODEL/NET. Neither part has a slash. Pure."""

from __future__ import annotations


def written(model: str, net: str) -> str:
    """The name of a net of a model; an empty net is that of the model's source."""
    return f"{model}/{net}" if net else model


def split(name: str) -> tuple[str, str]:
    """Model and net of a name."""
    model, _, net = name.partition("/")
    return model, net
