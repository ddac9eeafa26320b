"""Fields of the wire that this version does not serve, and that would change a result if it did.

Gateways and model servers refuse messages that set one of them, so that a caller never gets another result than it
requested. Fields that are safe to ignore are not listed; the comments of the protos name both kinds.
"""

from __future__ import annotations

from google.protobuf.message import Message

from latentflow.errors import UnimplementedError

_PACKAGE = "latentflow.v1."
FIELDS = frozenset(
    {
        "ControlNetRef.stale",
    }
)


def refuse(message: Message) -> None:
    """Raises UnimplementedError if the message, or one inside it, sets a field of `FIELDS` to a value other than zero."""
    for field, value in message.ListFields():
        name = field.full_name.removeprefix(_PACKAGE)
        if name in FIELDS and value:
            raise UnimplementedError(f"This version does not serve {name}; leave the field unset.")
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            continue
        for inner in value if field.is_repeated else [value]:
            refuse(inner)
