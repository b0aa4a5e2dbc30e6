"""The demo: a node with a sample company, a sample receiver and sample traffic, and figures that show it at work.

    folder -> node (embedded Postgres) -> set-up through the API -> traffic through the real client -> figures, until Ctrl-C

Rule: what makes the demo go is what any user has: keys, the API, the client, HTTP. Only the first admin key comes from the
database, as `create-admin-key` makes it.
"""

from __future__ import annotations

from outrider_server.demo.errors import DemoError
from outrider_server.demo.run import run_demo

__all__ = ["DemoError", "run_demo"]
