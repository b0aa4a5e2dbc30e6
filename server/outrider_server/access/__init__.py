"""Who calls and what they may do: API keys, the roles that methods need, and the first key of an installation."""

from outrider_server.access.keys import KeyRing, create_admin_key
from outrider_server.access.policy import authorize, require_role

__all__ = ["KeyRing", "authorize", "create_admin_key", "require_role"]
