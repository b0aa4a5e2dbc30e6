"""Outrider's client: publish events durably, verify webhooks.

Public names are loaded when they are first used, so that a receiver that only verifies webhooks (`from outrider import
Webhook`) loads neither grpc nor protobuf.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outrider.client import Client, connect
    from outrider.errors import EventRejected, OutriderError, PublisherClosed, SessionSuperseded
    from outrider.publisher import Ack, FrameReport, Handle, Publisher
    from outrider.spool import Spool
    from outrider.threads import ThreadHandle, ThreadPublisher
    from outrider.v1.event_pb2 import Event
    from outrider.webhooks import Delivery, Webhook, WebhookError

__all__ = [
    "Ack",
    "Client",
    "Delivery",
    "Event",
    "EventRejected",
    "FrameReport",
    "Handle",
    "OutriderError",
    "Publisher",
    "PublisherClosed",
    "SessionSuperseded",
    "Spool",
    "ThreadHandle",
    "ThreadPublisher",
    "Webhook",
    "WebhookError",
    "connect",
]

_HOMES = {
    "Ack": "outrider.publisher",
    "Client": "outrider.client",
    "Delivery": "outrider.webhooks",
    "Event": "outrider.v1.event_pb2",
    "EventRejected": "outrider.errors",
    "FrameReport": "outrider.publisher",
    "Handle": "outrider.publisher",
    "OutriderError": "outrider.errors",
    "Publisher": "outrider.publisher",
    "PublisherClosed": "outrider.errors",
    "SessionSuperseded": "outrider.errors",
    "Spool": "outrider.spool",
    "ThreadHandle": "outrider.threads",
    "ThreadPublisher": "outrider.threads",
    "Webhook": "outrider.webhooks",
    "WebhookError": "outrider.webhooks",
    "connect": "outrider.client",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'outrider' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
