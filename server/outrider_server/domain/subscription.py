"""Subscriptions: which events an endpoint gets."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class SubscriptionState(IntEnum):
    """Whether a subscription's deliveries are sent. A paused one still matches: its deliveries are owed."""

    ACTIVE = 1
    PAUSED = 2
    DELETED = 3


@dataclass(frozen=True, slots=True)
class Subscription:
    """One subscription at its current revision.

    `types` are type patterns: an exact name, `prefix.*` for every type below a prefix, or `*`. `filter_text` is the
    CEL filter as written (empty: every event of the types); `filter_ast` its checked form, from which nodes load it
    without the CEL engine's parser.
    """

    id: int
    tenant: int
    name: str
    endpoint: int
    types: tuple[str, ...]
    filter_text: str = ""
    filter_ast: bytes | None = None
    state: SubscriptionState = SubscriptionState.ACTIVE
    version: int = 1
