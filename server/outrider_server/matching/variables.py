"""The variables a filter sees, by the names that a checked AST knows them by.

`_e.order` is the top-level field `order` of the event's JSON, `_e.data` the whole of it, `_e.event.type` a field of
the envelope. The container in front keeps fields named as types or functions apart from the language's own names.
"""

from __future__ import annotations

from collections.abc import Mapping

CONTAINER = "_e"
DATA = "data"
EVENT = "event"

EVENT_FIELDS: Mapping[str, str] = {
    "type": "string",
    "source": "string",
    "subject": "string",
    "key": "string",
    "organization": "string",
    "actor": "string",
    "time": "timestamp",
    "timestamp": "timestamp",
    "attributes": "attributes",
}
"""Fields of `event` and their kinds. `event` holds no id: an event has none before it is in the log."""
