"""G1 and G2 by the receivers' ledger: the server, the postmaster or one backend is killed under load.

The long form, with as many kills as wanted, is `python -m tests.e2e.crash_loop`.
"""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from tests.e2e.scenario import RESUME_SECONDS, TENANT, scenario
from tests.support.service import Template, until

from outrider.v1 import endpoint_service_pb2, subscription_service_pb2

pytestmark = [pytest.mark.e2e, pytest.mark.postgres, pytest.mark.timeout(120)]

RATE = 500.0
EVENTS = 400
FROZEN_SECONDS = 3.2


async def test_a_killed_server_loses_nothing_and_repeats_only_what_was_open_or_unrecorded(
    fresh_state: Template,
) -> None:
    async with scenario(fresh_state, rate=RATE, seed=11) as running:
        for _ in range(2):
            await running.under_load(EVENTS)
            await running.kill_and_restart()
        await running.under_load(EVENTS)
        await running.end_well()


async def test_a_killed_database_is_started_again_and_nothing_is_lost(
    fresh_state: Template,
) -> None:
    """The postmaster, and a backend: with one of these Postgres ends all connections and recovers."""
    async with scenario(fresh_state, rate=RATE, seed=12) as running:
        pid = running.service.pid
        for victim in ("postmaster", "ingest", "record"):
            await running.under_load(EVENTS)
            backends, tenures = await running.service.backends(), running.tenures()
            backends["postmaster"] = running.service.postmaster_pid()
            with running.fault(f"kill -9 of {victim}"):
                os.kill(backends[victim], signal.SIGKILL)
                await running.comes_back(tenures)
        await running.under_load(EVENTS)
        assert running.service.pid == pid, "the server itself lived on"
        await running.end_well()


async def test_each_connection_that_ends_alone_is_replaced(fresh_state: Template) -> None:
    """An operator or a proxy ends one connection: the others live on, and nothing may wait for the dead one."""
    async with scenario(fresh_state, rate=RATE, seed=14) as running:
        await running.under_load(EVENTS)
        roles = sorted(set(await running.service.backends()) - {"api"})
        assert {"ingest", "ingest_large", "record", "read", "catch_up", "lease"} <= set(roles)
        for role in roles:
            tenures = running.tenures()
            pid = (await running.service.backends())[role]
            with running.fault(f"the end of {role}"):
                connection = await running.service.connect()
                await connection.fetchval("SELECT pg_terminate_backend($1)", pid)
                await connection.close()
                await running.comes_back(tenures)
        await running.under_load(EVENTS)
        await running.end_well()


async def test_a_stop_under_load_ends_in_time_without_loss_and_without_any_duplicate(
    fresh_state: Template,
) -> None:
    async with scenario(fresh_state, rate=RATE, seed=15) as running:
        await running.under_load(EVENTS)
        assert await running.service.terminate(15) == 0, running.service.tail()
        running.service.start()
        await running.service.ready(RESUME_SECONDS)
        await running.under_load(EVENTS)
        found = await running.end_well()
        assert found.duplicates == 0


async def test_a_hung_database_holds_everything_up_and_changes_nothing(
    fresh_state: Template,
) -> None:
    async with scenario(fresh_state, rate=RATE, seed=16) as running:
        await running.under_load(EVENTS)
        tenures = running.tenures()
        frozen = running.service.freeze_database()
        try:
            await asyncio.sleep(
                FROZEN_SECONDS
            )  # the fault itself: longer than the lease is trusted
        finally:
            running.service.thaw(frozen)
        await running.under_load(EVENTS)
        found = await running.end_well()
        assert found.duplicates == 0
        assert running.tenures() == tenures


async def test_a_paused_endpoint_gets_nothing_until_it_is_resumed_and_then_everything(
    fresh_state: Template,
) -> None:
    name = f"tenants/{TENANT}/endpoints/batch"
    async with scenario(fresh_state, rate=RATE, seed=17) as running:
        await running.under_load(EVENTS)
        endpoints = running.client.endpoints
        await endpoints.PauseEndpoint(endpoint_service_pb2.PauseEndpointRequest(name=name))
        requests = running.receiver.requests
        await until(
            lambda: all(r.ended for r in requests if r.path == "/batch"), 5, "its requests' end"
        )
        seen, acked = running.receiver.count("/batch"), running.publisher.stats.events_acked
        await until(lambda: running.publisher.stats.events_acked > acked + EVENTS, 10, "the load")
        assert running.receiver.count("/batch") == seen
        await endpoints.ResumeEndpoint(endpoint_service_pb2.ResumeEndpointRequest(name=name))
        await running.under_load(EVENTS)
        found = await running.end_well()
        assert found.duplicates == 0


async def test_a_subscription_deleted_under_load_has_its_deliveries_cancelled_and_counted(
    fresh_state: Template,
) -> None:
    async with scenario(fresh_state, rate=RATE, seed=18) as running:
        await running.under_load(EVENTS)
        # Its endpoint answers nothing but 500 here, so that much is owed to it.
        await running.client.subscriptions.DeleteSubscription(
            subscription_service_pb2.DeleteSubscriptionRequest(
                name=f"tenants/{TENANT}/subscriptions/asian"
            )
        )
        acked = running.publisher.stats.events_acked
        await until(lambda: running.publisher.stats.events_acked > acked + EVENTS, 10, "the load")
        running.load.stop()
        await running.rest(without=["asian"])
        await running.service.settled(TENANT, 20)
        found = running.judge(without=["asian"])
        assert not found.wrong(), f"{found.wrong()}\n{found}\n{running.service.tail()}"
        assert found.duplicates == 0
        assert running.receiver.count("/down"), "it was tried"
        matched, delivered, dead, cancelled, owed, window = await running.balanced()
        assert (dead, owed, window) == (0, 0, 0)
        assert cancelled > 0
        assert delivered == found.deliveries
        assert matched == delivered + cancelled
