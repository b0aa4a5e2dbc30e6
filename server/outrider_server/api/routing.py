"""Routing: which node a single call belongs to. Everything of a tenant is answered at its home."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from outrider_server.domain.access import Caller
from outrider_server.pipeline.homes import Homes
from outrider_server.pipeline.match import Directory

PASSED_ON_IN_PARTS = frozenset(
    {"/outrider.v1.IngestService/Publish", "/outrider.v1.IngestService/PublishStream"}
)
"""Calls whose servicer splits them itself."""

CREATE_TENANT = "/outrider.v1.TenantService/CreateTenant"
HERE = ""
LATELY_SECONDS = 3.0
_TENANTS = "tenants/"


class Router:
    """Finds the address of the node that a call belongs to.

    `tenants_of` gives the shards with the number of their tenants; `seconds` is monotonic.
    """

    def __init__(
        self,
        directory: Directory,
        homes: Homes,
        holds: Callable[[int], bool],
        tenants_of: Callable[[], Awaitable[list[tuple[int, int]]]],
        seconds: Callable[[], float],
    ) -> None:
        self._directory = directory
        self._homes = homes
        self._holds = holds
        self._tenants_of = tenants_of
        self._seconds = seconds
        self._lately: deque[tuple[float, str]] = deque()

    async def address_of(self, method: str, request: Any, caller: Caller) -> str | None:
        """Where the call is to be answered; None for here, also where nobody knows better."""
        if method in PASSED_ON_IN_PARTS or not isinstance(request, Message):
            return None
        if method == CREATE_TENANT:
            return await self._emptiest()
        tenant = tenant_of(request)
        if tenant is None or tenant in self._directory.by_name:
            entry = self._directory.by_name.get(tenant or "")
            return None if entry is None else self._elsewhere(entry.shard)
        home = self._homes.by_name.get(tenant)
        if home is None and caller.tenant is not None:
            # A key of one tenant asks for another or for its own: only the latter is worth a look.
            home = self._homes.by_id.get(caller.tenant)
            if home is None:
                await self._homes.look_up(ids=[caller.tenant])
            home = self._homes.by_name.get(tenant)
        elif home is None:
            await self._homes.look_up([tenant])
            home = self._homes.by_name.get(tenant)
        return None if home is None else self._elsewhere(home.shards[0])

    async def _emptiest(self) -> str | None:
        """The node with the fewest tenants; None for this one.

        Those that were sent somewhere just now may not be counted in the log yet.
        """
        tenants: Counter[str] = Counter()
        for shard, count in await self._tenants_of():
            address = HERE if self._holds(shard) else self._homes.address_of(shard)
            if address is not None:
                tenants[address] += count
        now = self._seconds()
        while self._lately and self._lately[0][0] < now - LATELY_SECONDS:
            self._lately.popleft()
        for _, address in self._lately:
            if address in tenants:
                tenants[address] += 1
        if not tenants:
            return None
        chosen = min(tenants, key=lambda address: (tenants[address], address))
        self._lately.append((now, chosen))
        return None if chosen == HERE else chosen

    def _elsewhere(self, shard: int) -> str | None:
        return None if self._holds(shard) else self._homes.address_of(shard)


def tenant_of(request: Message) -> str | None:
    """The tenant that a request names: in `parent`, in `name`, or in the name of the resource it carries."""
    fields = request.DESCRIPTOR.fields_by_name
    for field in ("parent", "name"):
        if field in fields:
            return _tenant_in(getattr(request, field))
    for descriptor in request.DESCRIPTOR.fields:
        if (
            descriptor.type == FieldDescriptor.TYPE_MESSAGE
            and not descriptor.is_repeated
            and descriptor.message_type is not None
            and "name" in descriptor.message_type.fields_by_name
        ):
            return _tenant_in(getattr(request, descriptor.name).name)
    return None


def _tenant_in(name: object) -> str | None:
    if not isinstance(name, str) or not name.startswith(_TENANTS):
        return None
    return name.removeprefix(_TENANTS).split("/", 1)[0] or None
