"""A real Postgres of our own: found, created, started, watched and ended. Blocking code, standard library only.

`EmbeddedPostgres` runs the server from any folder of Postgres programs; `find_binaries` finds such a folder.
Between us and Postgres stands a small process of ours, `guard.py`, so that Postgres ends cleanly when we are
killed. Call from asyncio through `asyncio.to_thread`.
"""

from outrider_server.embedded.account import obstacle
from outrider_server.embedded.binaries import Binaries, find_binaries
from outrider_server.embedded.errors import EmbeddedPostgresError
from outrider_server.embedded.launcher import EmbeddedPostgres, ServerAddress

__all__ = [
    "Binaries",
    "EmbeddedPostgres",
    "EmbeddedPostgresError",
    "ServerAddress",
    "find_binaries",
    "obstacle",
]
