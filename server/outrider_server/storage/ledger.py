"""The ledger's sum: what matched and what became of it."""

from __future__ import annotations

from dataclasses import dataclass

from outrider_server.storage.database import Connection
from outrider_server.storage.queries import load


@dataclass(frozen=True, slots=True)
class Balance:
    """One tenant's deliveries, by what became of them. `window`: those that are open above the checkpoint."""

    tenant: str
    matched: int
    delivered: int
    dead: int
    cancelled: int
    owed: int
    window: int

    def difference(self) -> int:
        """What matched and is nowhere; 0 at any moment, or something was lost or counted twice."""
        return self.matched - (
            self.delivered + self.dead + self.cancelled + self.owed + self.window
        )

    def holds(self) -> bool:
        """Whether everything that matched is accounted for."""
        return self.difference() == 0


async def balance(connection: Connection) -> list[Balance]:
    """Every tenant's balance, in one snapshot."""
    return [Balance(*row) for row in await connection.fetch(load("balance"))]
