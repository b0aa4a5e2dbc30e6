"""API keys: their text, and the ring that authenticates callers by them.

    ork_<name>_<52 characters: 256 random bits>_<7 characters: checksum>

The checksum refuses a mistyped or cut off key without asking the database; the name tells people, and whoever scans
for leaked keys, which one it is. The database holds the SHA-256 of the whole text: 256 random bits need no slow hash.

Rule: the database's clock alone decides whether a key holds. The ring remembers the keys that held, and asks about
all of them at once about each second (`revalidate`), so a key that ended ends its open streams, too.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from outrider_server.domain.access import Caller, Role
from outrider_server.domain.errors import AlreadyExists, InvalidArgument, Unauthenticated
from outrider_server.domain.names import ID_PATTERN, ID_RULE, is_id
from outrider_server.storage import api_keys
from outrider_server.storage.api_keys import StoredApiKey
from outrider_server.storage.database import Connection, Database, translated

KEYS_REMEMBERED_MAX = 4_096
LOOK_UPS_MAX = 2
"""Keys looked up at once. Anybody can make up well-formed keys; they must not take the whole pool."""

SECRET_BYTES = 32
ADMIN_KEY_NAME_BYTES = 5
NAME_SHOWN_CHARACTERS_MAX = 100

RandomBytes = Callable[[int], bytes]
"""A source of random bytes such as `os.urandom`."""

_TEXT = re.compile(rf"(ork_{ID_PATTERN}_[a-z2-7]{{52}})_([a-z2-7]{{7}})")


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key's text, told once, and the row it became."""

    text: str
    stored: StoredApiKey


def make_text(name: str, random: RandomBytes) -> str:
    """The text of a new key."""
    body = f"ork_{name}_{_base32(random(SECRET_BYTES))}"
    return f"{body}_{_checksum(body)}"


def is_well_formed(text: str) -> bool:
    """Whether `text` can be a key at all: its form, and its checksum."""
    parts = _TEXT.fullmatch(text)
    return parts is not None and _checksum(parts[1]) == parts[2]


def digest(text: str) -> bytes:
    """What the database holds in place of the text."""
    return hashlib.sha256(text.encode()).digest()


async def create_key(
    connection: Connection,
    random: RandomBytes,
    *,
    tenant: int | None,
    name: str,
    role: Role,
    display_name: str = "",
    expires_at: datetime | None = None,
) -> NewKey | None:
    """Make a key; None where the tenant has one of this name."""
    text = make_text(name, random)
    stored = await api_keys.create(
        connection,
        tenant=tenant,
        name=name,
        role=role,
        digest=digest(text),
        display_name=display_name,
        expires_at=expires_at,
    )
    return None if stored is None else NewKey(text, stored)


def require_key_id(name: str) -> None:
    """Raise InvalidArgument where a key of this id could never be told from a mistyped one."""
    if not is_id(name):
        raise InvalidArgument(
            "INVALID_ARGUMENT",
            f"no API key can be called {name[:NAME_SHOWN_CHARACTERS_MAX]!r}: {ID_RULE}",
            violations=[("api_key_id", ID_RULE)],
        )


async def create_admin_key(
    connection: Connection, random: RandomBytes, *, name: str = "", display_name: str = ""
) -> str:
    """Make a system admin's key and return its text. For whoever holds the database: it asks for no other key."""
    chosen = name or "admin-" + _base32(random(ADMIN_KEY_NAME_BYTES))
    require_key_id(chosen)
    with translated():
        made = await create_key(
            connection,
            random,
            tenant=None,
            name=chosen,
            role=Role.SYSTEM_ADMIN,
            display_name=display_name,
        )
    if made is None:
        raise AlreadyExists(
            "RESOURCE_EXISTS",
            f"there is an API key {chosen} already; choose another name",
            metadata={"resource": f"apiKeys/{chosen}"},
        )
    return made.text


class KeyRing:
    """The callers known to this node, by their keys.

    Remembers `remembered_max` keys that held, the least recently used forgotten first, and those of open streams.
    """

    def __init__(self, database: Database, *, remembered_max: int = KEYS_REMEMBERED_MAX) -> None:
        self._database = database
        self._remembered_max = remembered_max
        self._look_ups = asyncio.Semaphore(LOOK_UPS_MAX)
        self._callers: OrderedDict[bytes, Caller] = OrderedDict()
        self._held: dict[str, int] = {}
        # Of keys in `_callers` or `_held` alone, so it is bounded as they are. True: revoked, False: expired.
        self._ended: dict[str, bool] = {}
        self._unreported: set[str] = set()
        # Counts the ends told to this node, so that a look-up can tell one that came while it waited.
        self._ends = 0

    async def authenticate(self, text: str) -> Caller:
        """The caller whose key this is; Unauthenticated (INVALID_API_KEY, REVOKED_API_KEY) where it does not hold."""
        if not is_well_formed(text):
            # One answer for malformed, unknown and expired keys: it tells a guesser nothing.
            raise _invalid()
        hashed = digest(text)
        caller = self._callers.get(hashed)
        if caller is None:
            caller = await self._look_up(hashed)
        else:
            self._callers.move_to_end(hashed)
        self.require_valid(caller)
        return caller

    def is_valid(self, caller: Caller) -> bool:
        """Whether the caller's key still holds, as of the last check. Asked by streams, which must be held (`hold`)."""
        return caller.key_id not in self._ended

    def require_valid(self, caller: Caller) -> None:
        """Raise the Unauthenticated that tells why the caller's key does not hold any more, if so."""
        if not self.is_valid(caller):
            raise self.why_ended(caller)

    def why_ended(self, caller: Caller) -> Unauthenticated:
        """The error for a caller whose key does not hold any more."""
        return _revoked() if self._ended.get(caller.key_id, True) else _invalid()

    @contextmanager
    def hold(self, caller: Caller) -> Iterator[None]:
        """Go on checking the caller's key while a stream of it is open, however many other keys come by."""
        self._held[caller.key_id] = self._held.get(caller.key_id, 0) + 1
        try:
            yield
        finally:
            self._held[caller.key_id] -= 1
            if not self._held[caller.key_id]:
                del self._held[caller.key_id]
                self._tidy()

    async def revalidate(self) -> frozenset[str]:
        """Ask the database which known keys ended, in one query.

        Returns the ids of all that ended since the last time, those that `end` told of too, each once.
        """
        asked = sorted(self._known() - self._ended.keys())
        if asked:
            async with self._database.connection() as connection:
                ended = await api_keys.find_ended(connection, asked)
            for key, revoked in ended.items():
                self.end(key, revoked=revoked)
        reported, self._unreported = frozenset(self._unreported), set()
        return reported

    def end(self, key_id: str, *, revoked: bool = True) -> None:
        """Take note that a key ended, without waiting for the next check: of a revocation by this node itself."""
        self._ends += 1
        if key_id in self._known() and key_id not in self._ended:
            self._ended[key_id] = revoked
            self._unreported.add(key_id)

    async def _look_up(self, hashed: bytes) -> Caller:
        while True:
            ends = self._ends
            async with self._look_ups, self._database.connection() as connection:
                found = await api_keys.find(connection, hashed)
            # A key that ended while its row was on the way would be remembered as one that holds, and an end that was
            # told of a key nobody knew yet is not kept. So ask again.
            if ends == self._ends:
                break
        if found is None:
            raise _invalid()
        if found.revoked:
            raise _revoked()
        if found.expired:
            raise _invalid()
        caller = Caller(found.id, found.role, found.tenant)
        self._callers[hashed] = caller
        while len(self._callers) > self._remembered_max:
            self._callers.popitem(last=False)
        self._tidy()
        return caller

    def _tidy(self) -> None:
        if self._ended:
            known = self._known()
            self._ended = {key: why for key, why in self._ended.items() if key in known}
            self._unreported &= known

    def _known(self) -> set[str]:
        return {caller.key_id for caller in self._callers.values()} | self._held.keys()


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()


def _checksum(body: str) -> str:
    return _base32(zlib.crc32(body.encode()).to_bytes(4, "big"))


def _invalid() -> Unauthenticated:
    return Unauthenticated("INVALID_API_KEY", "the API key is malformed, unknown or expired")


def _revoked() -> Unauthenticated:
    return Unauthenticated("REVOKED_API_KEY", "the API key was revoked")
