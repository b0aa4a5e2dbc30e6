"""Everything of a service that outlives its nodes: the embedded Postgres, the public port, and the workers.

Rule: nothing here imports gRPC or holds an event, so there is next to nothing that could fail in it; what it starts ends
when it ends, however it ends.
"""

from outrider_server.supervisor.address import AddressUnusable, require_free
from outrider_server.supervisor.postgres import embedded_postgres, embedded_postgres_for_command

__all__ = [
    "AddressUnusable",
    "embedded_postgres",
    "embedded_postgres_for_command",
    "require_free",
]
