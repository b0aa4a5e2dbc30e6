"""Who calls, and what a caller may do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Role(IntEnum):
    """What an API key may do; a higher number includes the lower ones. Stored as its number."""

    PUBLISHER = 1
    INTEGRATION_ADMIN = 2
    SYSTEM_ADMIN = 3


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller. `tenant` is the one tenant its key reaches, None for all (system admin)."""

    key_id: str
    role: Role
    tenant: int | None

    def reaches(self, tenant: int) -> bool:
        """Whether the caller's key reaches `tenant`."""
        return self.tenant is None or self.tenant == tenant
