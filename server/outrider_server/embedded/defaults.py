"""The settings the embedded Postgres starts with. A given setting replaces the one here by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

DEFAULT_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        # Holds the hot end of the log and its indexes; small enough for a laptop.
        "shared_buffers": "256MB",
        # Checkpoints rewrite full pages; spaced out, ingest writes about half the WAL. Costs up to 4 GB of disk
        # and a longer recovery after a crash.
        "max_wal_size": "4GB",
        "checkpoint_timeout": "15min",
        # One server without standby: nothing reads the WAL but crash recovery, so write no more than that needs.
        "wal_level": "minimal",
        "max_wal_senders": "0",
        # An acknowledged event is on the disk. These two are the promise and never a knob for speed.
        "fsync": "on",
        "synchronous_commit": "on",
        # Full pages compress well; pglz is the only method that every build has.
        "wal_compression": "pglz",
        # A few pools per node; each connection costs memory even when idle.
        "max_connections": "100",
        # Our statements are short; compiling them would cost more than it saves.
        "jit": "off",
        # Answers and log lines must not depend on the machine's zone or language.
        "timezone": "UTC",
        "log_timezone": "UTC",
        "lc_messages": "C",
        # To standard error, which is the log file; the guard keeps its size. Postgres' own collector would not:
        # it truncates a file only when rotating by time.
        "logging_collector": "off",
        "log_destination": "stderr",
    }
)

# Set by the launcher itself: they say where the server is found, and a wrong one would only hide it from us.
RESERVED_SETTINGS = frozenset(
    {"port", "listen_addresses", "unix_socket_directories", "data_directory", "logging_collector"}
)
