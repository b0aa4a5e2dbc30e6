"""Frames on the wire: whether a tenant exists is said only by who has asked the log, and never by who does not know it."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pytest

from outrider.v1.event_pb2 import Event
from outrider_server.api.frames import FrameReader
from outrider_server.domain.access import Caller, Role
from outrider_server.domain.errors import Unavailable
from outrider_server.pipeline.homes import Homes
from outrider_server.pipeline.match import Directory
from outrider_server.policy.assignment import NodeView, ShardView, View

ADMIN = Caller("admin", Role.SYSTEM_ADMIN, None)
OF_ACME = Caller("acme", Role.PUBLISHER, 1)
ACME = [Event(tenant="acme", type="invoice.posted", data=b"{}")]
TWO = NodeView("two", "127.0.0.1:2", live=True)


class Log:
    """One tenant, acme. `asked` is called while it is looked up."""

    def __init__(self) -> None:
        self.homes = Homes("one", self.find)
        self.homes.looked(View((ShardView(5, 1, "two", live=True, dead=False),), (TWO,)))
        self.directory = Directory()
        self.asked: Callable[[], None] = lambda: None

    async def find(
        self, names: Collection[str], ids: Collection[int]
    ) -> list[tuple[int, str, tuple[int, ...]]]:
        self.asked()
        return [(1, "acme", (5,))] if "acme" in names or 1 in ids else []

    def reader(self, caller: Caller = ADMIN) -> FrameReader:
        return FrameReader(
            caller, self.directory, self.homes, holds=lambda _shard: False, now_us=lambda: 0
        )


async def test_a_tenant_that_is_not_known_is_looked_up_and_its_events_go_to_its_home() -> None:
    split = await Log().reader().read(ACME, "", "producer")
    assert list(split.elsewhere) == ["127.0.0.1:2"]
    assert not split.portion.refusals


async def test_a_tenant_that_the_log_does_not_have_is_refused() -> None:
    events = [Event(tenant="other", type="invoice.posted", data=b"{}"), *ACME]
    split = await Log().reader().read(events, "", "producer")
    (refusal,) = split.portion.refusals
    assert (refusal.index, refusal.reason) == (0, "UNKNOWN_TENANT")


async def test_what_is_forgotten_while_another_is_looked_up_is_not_refused_but_comes_again() -> (
    None
):
    log = Log()
    reader = log.reader()
    await reader.read(ACME, "", "producer")
    log.asked = lambda: log.homes.forget(["acme"])
    events = [Event(tenant="other", type="invoice.posted", data=b"{}"), *ACME]
    with pytest.raises(Unavailable, match="does not live here"):
        await reader.read(events, "", "producer")


@pytest.mark.parametrize("caller", [ADMIN, OF_ACME], ids=["any tenant", "its own tenant"])
def test_a_portion_for_a_tenant_that_left_is_not_refused_but_sent_back(caller: Caller) -> None:
    """The node that passes it on may not know yet; here nothing at all is known of the tenant any more."""
    with pytest.raises(Unavailable, match="does not live here"):
        Log().reader(caller).read_here(ACME, "", [])
