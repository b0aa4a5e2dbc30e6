"""The sequence: a clock that numbers events.

`sequence = (microseconds since 1970 UTC << 10) + shard`, strictly increasing per shard. It is the event's id, the
key its table is partitioned by, a time and a start position, so none of these needs a column or an index more.
"""

from __future__ import annotations

SHARD_COUNT = 64
"""Slices of the log, fixed for ever: a tenant's shard number is stored with it."""

SHARD_BITS = 10
SEQUENCE_MAX = (1 << 63) - 1


def sequence_of(microseconds: int, shard: int) -> int:
    """The sequence of `shard` at `microseconds` since 1970 UTC."""
    return (microseconds << SHARD_BITS) + shard


def shard_of(sequence: int) -> int:
    """The shard that gave out `sequence`."""
    return sequence & ((1 << SHARD_BITS) - 1)


def microseconds_of(sequence: int) -> int:
    """When `sequence` was given out, in microseconds since 1970 UTC."""
    return sequence >> SHARD_BITS


class SequenceClock:
    """Gives out the sequences of one shard: the larger of now and the previous plus one microsecond.

    `last` is the largest sequence of the shard that is known to be stored; nothing at or below it is given out again.
    """

    __slots__ = ("_microseconds", "_shard")

    def __init__(self, shard: int, last: int) -> None:
        self._shard = shard
        self._microseconds = microseconds_of(last)

    def take(self, now_us: int, count: int) -> int:
        """Reserve `count` sequences, each one microsecond after the other; return the first.

        The others are `first + (i << SHARD_BITS)`.
        """
        first = max(now_us, self._microseconds + 1)
        self._microseconds = first + count - 1
        return sequence_of(first, self._shard)

    def known(self, sequence: int) -> None:
        """A sequence of the shard is stored: only larger ones are given out from now on."""
        self._microseconds = max(self._microseconds, microseconds_of(sequence))

    def last(self) -> int:
        """The largest sequence given out or known."""
        return sequence_of(self._microseconds, self._shard)
