"""What a publisher tells of its work: a report a frame, and counts. Plain values, made when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class FrameReport(NamedTuple):
    """What `on_ack` is told of one acknowledged frame; times are those of the publisher's clock.

    `tenants` counts the frame's events by tenant. Within a tenant, events are reported in the order they were sent:
    so if a report says 3 of one, they are the oldest 3 of it not reported yet. Frames count per `line`, of which 0 is
    the first; over several lines the order of reports is not that of sending.
    """

    number: int
    events: int
    frame_bytes: int
    opened_at: float
    sent_at: float
    acked_at: float
    rejected: int
    duplicate: bool
    line: int
    tenants: Mapping[str, int]


class Stats(NamedTuple):
    """Plain counts of a publisher since its start, over all its lines, and what it holds now."""

    events_acked: int
    events_rejected: int
    frames_acked: int
    frames_refused: int
    frames_resent: int
    streams_opened: int
    events_held: int
    bytes_held: int
    streams_open: int
