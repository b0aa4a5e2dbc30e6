"""A node keeps what one tenant's or one file's trouble must not cost, and says in one sentence what it cannot go on without."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from tests.support.node import RunningNode, event, running, soon, until
from tests.support.postgres import Database
from tests.support.receiver import Receiver

from outrider.v1 import tenant_service_pb2
from outrider_server.__main__ import _sentence


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as receiver:
        yield receiver


@pytest.fixture
async def node(database: Database, tmp_path: Path) -> AsyncIterator[RunningNode]:
    async with running(database.dsn, tmp_path) as node:
        yield node


def key_file(folder: Path) -> Path:
    return folder / "state" / "sealing.keys"


async def sentence_of_start(node: RunningNode) -> str:
    """What a new node, which must not come up, ends with."""
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - a group or not, the sentence is what counts
        await node.start()
    sentence = _sentence(caught.value, node.settings)
    assert sentence is not None, repr(caught.value)
    return sentence


async def test_a_lost_key_file_is_not_replaced_by_a_new_one(
    node: RunningNode, tmp_path: Path
) -> None:
    await (await node.tenant()).endpoint("hook", "https://example.com/hook")
    await node.stop()
    keys = key_file(tmp_path).read_text()
    key_file(tmp_path).unlink()
    sentence = await sentence_of_start(node)
    assert str(key_file(tmp_path)) in sentence
    assert "missing" in sentence
    assert not key_file(tmp_path).exists()
    key_file(tmp_path).write_text(keys)
    key_file(tmp_path).chmod(0o600)
    await node.start()


async def test_a_database_without_secrets_may_have_a_new_key_file(
    node: RunningNode, tmp_path: Path
) -> None:
    await node.tenant()
    await node.stop()
    key_file(tmp_path).unlink()
    await node.start()
    assert key_file(tmp_path).exists()


async def test_a_foreign_key_ends_the_node_in_one_sentence(
    node: RunningNode, tmp_path: Path
) -> None:
    await (await node.tenant()).endpoint("hook", "https://example.com/hook")
    await node.stop()
    keys = key_file(tmp_path).read_text()
    key_file(tmp_path).write_text("kek_" + "QUFB" * 10 + "QUE=\n")
    assert "this installation does not have" in await sentence_of_start(node)
    key_file(tmp_path).write_text(keys)
    await node.start()


async def test_a_broken_subscription_costs_nobody_else_anything(
    node: RunningNode, receiver: Receiver
) -> None:
    demo, other = await node.tenant(), await node.tenant("other")
    for tenant in (demo, other):
        endpoint = await tenant.endpoint("hook", receiver.url(f"/{tenant.name}"))
        await tenant.subscription(endpoint, "good", filter_="total == 1")
    await demo.subscription(f"tenants/{demo.name}/endpoints/hook", "bad", filter_="total < 9")
    await node.fetch("UPDATE subscription SET filter_ast = 'x' WHERE name = 'bad'")
    with capture_logs() as told:
        await node.restart()
        assert node.node.metrics.snapshot()["outrider_broken_subscriptions"] == 1
        await demo.publish(event())
        await other.publish(event())
        await soon(receiver.wait_for_deliveries(2))
        before = node.tenure
        await node.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name LIKE 'outrider/test/%/record'"
        )
        await node.next_tenure(before)
    broken = [each for each in told if each["event"] == "subscription.broken"]
    assert [each["tenant"] for each in broken] == ["demo"]
    stored = await node.stored()
    assert [len(row["targets"]) for row in stored.values()] == [1]
    balance = await node.balance_when(lambda b: b.delivered == 1)
    assert balance.matched == 1


async def test_a_tenant_that_cannot_be_read_again_keeps_what_it_had_and_ends_nothing(
    node: RunningNode, receiver: Receiver
) -> None:
    demo = await node.tenant()
    await demo.subscription(await demo.endpoint("hook", receiver.url("/hook")))
    (row,) = await node.fetch("SELECT id, tenant, sealed FROM endpoint")
    await node.fetch("UPDATE endpoint SET sealed = 'damaged'")
    tenure = node.tenure
    with capture_logs() as told:

        def unreadable() -> list[Any]:
            return [each for each in told if each["event"] == "configuration.unreadable"]

        node.node._changed_unread.add(row["tenant"])
        await until(unreadable)
        await demo.publish(event())
        await soon(receiver.wait_for_deliveries(1))
        await node.fetch("UPDATE endpoint SET sealed = $1", row["sealed"])
        await until(lambda: not node.node._changed_unread and not node.node._unreadable)
    assert [each["tenant"] for each in unreadable()] == [row["tenant"]]
    assert node.tenure is tenure
    # A change of it is made, and used, as before.
    await node.admin.call(
        "UpdateTenant",
        tenant_service_pb2.UpdateTenantRequest(
            tenant={"name": "tenants/demo", "strict_types": True},
            update_mask={"paths": ["strict_types"]},
        ),
    )
    assert node.node._directory.by_name["demo"].strict
