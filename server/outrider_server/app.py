"""One node: builds every object once, runs them in one group of tasks, and takes them down in reverse.

The tenure loop is its heart: hold the lease, serve, and when something fails that memory depends on, forget all and begin
again. `Node.run` returns after a clean drain; what it raises cannot be cured by trying again.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import structlog

from outrider.v1 import (
    api_key_service_pb2_grpc,
    endpoint_service_pb2_grpc,
    event_type_service_pb2_grpc,
    ingest_service_pb2_grpc,
    subscription_service_pb2_grpc,
    tenant_service_pb2_grpc,
)
from outrider_server.access.keys import KeyRing
from outrider_server.access.nodes import NodeAuthenticator
from outrider_server.api.api_key_service import ApiKeyService
from outrider_server.api.endpoint_service import EndpointService
from outrider_server.api.event_type_service import EventTypeService
from outrider_server.api.ingest_service import IngestService
from outrider_server.api.interceptors import CallInterceptor, Nodes
from outrider_server.api.limits import Limits as ApiLimits
from outrider_server.api.links import Portions
from outrider_server.api.peers import Peers
from outrider_server.api.publish_stream import StreamLimits
from outrider_server.api.routing import Router
from outrider_server.api.server import ApiServer, ListenError, Service, build_server
from outrider_server.api.subscription_service import SubscriptionService
from outrider_server.api.tenancy import Tenancy
from outrider_server.api.tenant_service import TenantService
from outrider_server.domain.access import Caller
from outrider_server.domain.errors import OutriderError, Unauthenticated
from outrider_server.domain.tenant import TenantConfiguration
from outrider_server.pipeline.admission import Admission, LargeRoom, Room
from outrider_server.pipeline.clock import DatabaseClock
from outrider_server.pipeline.deliver import DeliverLimits
from outrider_server.pipeline.homes import Homes
from outrider_server.pipeline.ingest import IngestLimits
from outrider_server.pipeline.large import LargeEvents
from outrider_server.pipeline.match import Directory
from outrider_server.pipeline.persist import GroupLimits
from outrider_server.pipeline.tenure import Tenure, TenureParts, open_tenure
from outrider_server.policy.assignment import Assignment, View
from outrider_server.policy.plans import Limits
from outrider_server.secrets import keys as sealing_keys
from outrider_server.secrets.errors import SecretsError
from outrider_server.secrets.sealing import Sealer
from outrider_server.settings import Settings, join_address, split_address
from outrider_server.storage import configuration, endpoints, owed, tenants
from outrider_server.storage.database import (
    Database,
    DedicatedConnection,
    connect,
    is_unavailable,
    until_lost,
)
from outrider_server.storage.migrate import migrate
from outrider_server.storage.shards import LeaseLost, is_fenced
from outrider_server.telemetry.logs import PipelineLog
from outrider_server.telemetry.metrics import Metrics, otlp_reader
from outrider_server.transport.webhook import Form, WebhookSender
from outrider_server.upkeep import disk, jobs
from outrider_server.upkeep.lease import Lease
from outrider_server.upkeep.moves import Moves
from outrider_server.upkeep.prune import Pruner, Retention
from outrider_server.web.admin import AdminServer, start_admin, start_admin_socket, stop_admin

BACK_OFF_SECONDS = (0.05, 0.1, 0.2, 0.5)
SECRETS_CHECK_SECONDS = 30.0
OWED_COUNT_SECONDS = 2.0
CHANGES_CHECK_SECONDS = 0.5
SETTLE_SECONDS = 5.0
COLLECTOR_THRESHOLD = 50_000
"""New objects between two collections. The path makes hundreds of thousands a second and hardly a cycle among them; most are
gone by themselves before this many are there."""

LANES_SHARE = 0.75
"""Of the node's payload bytes: for lanes. The rest is for what is on its way into the log, a third of it for large frames
and a third for what other nodes pass on."""

WRITER_STATEMENT_SECONDS = 60.0


class Node:
    """One node over one database. `database_folder`: where the database's files are, if they are on this machine."""

    def __init__(self, settings: Settings, dsn: str, *, database_folder: Path | None) -> None:
        self.settings = settings
        self.port = 0
        self.metrics: Metrics
        self._dsn = dsn
        self._database_folder = database_folder
        self._boot = str(uuid.uuid4())
        self._clock = DatabaseClock()
        self._stop = asyncio.Event()
        self._ready = asyncio.Event()
        self._problem = "starting"
        self._unsettled_since = 0.0
        self._owed = 0
        self._held_back = 0
        self._log = structlog.get_logger()
        self._directory = Directory()
        self._changed_unread: set[int] = set()
        self._unreadable: set[int] = set()
        self._orderly = False
        self._admission: Admission
        self._ingest: IngestService
        self._keys: KeyRing
        self._api: ApiServer
        self._database: Database
        self._sealer: Sealer
        self._lease: Lease
        self._homes: Homes
        self._peers: Peers
        self._sealing_keys: sealing_keys.KeyRing
        self._moves: Moves | None = None

    def stop(self) -> None:
        """Drain and end."""
        self._stop.set()

    async def ready(self) -> None:
        """Wait until the node holds its shards for the first time and serves."""
        await self._ready.wait()

    async def run(self) -> None:
        """Run until `stop`."""
        settings = self.settings
        gc.set_threshold(COLLECTOR_THRESHOLD)
        readers = []
        if settings.otlp_endpoint is not None:
            readers.append(otlp_reader(str(settings.otlp_endpoint), settings.otlp_interval_seconds))
        self.metrics = Metrics(node=settings.node_name, readers=readers)
        await self._prepare()
        async with contextlib.AsyncExitStack() as stack:
            self._database = await stack.enter_async_context(
                Database(self._dsn, node=settings.node_name, boot=self._boot)
            )
            self._keys = KeyRing(self._database)
            limits = IngestLimits(
                event_bytes_max=settings.event_bytes_max,
                json_depth_max=settings.json_depth_max,
                large_event_bytes=settings.large_event_bytes,
            )
            large = LargeEvents(limits, self.metrics.match)
            stack.push_async_callback(large.close)
            ingest_bytes = int(settings.node_payload_bytes_max * (1 - LANES_SHARE) / 3)
            self._admission = Admission(
                directory=self._directory,
                limits=limits,
                room=Room(ingest_bytes),
                large_room=LargeRoom(ingest_bytes),
                forwarded_room=Room(ingest_bytes),
                large=large,
                metrics=self.metrics,
                monotonic=time.monotonic,
                now_us=self._clock.now_us,
            )
            self._homes = Homes(settings.node_name, self._find_homes)
            self._build_api()
            stack.push_async_callback(self._peers.close)
            sender = WebhookSender(monotonic=time.monotonic, form=Form.DIRECT)
            stack.push_async_callback(sender.close)
            self._lease = Lease(
                node=settings.node_name,
                boot=self._boot,
                address=self._own_address,
                lease_seconds=settings.lease_seconds,
                renew_seconds=settings.lease_renew_seconds,
                margin_seconds=settings.lease_margin_seconds,
                clock=self._clock,
                monotonic=_lease_clock,
            )
            stack.push_async_callback(stop_admin, await self._start_admin())
            await self._api.start()
            stack.push_async_callback(self._api.stop, 1.0)
            parts = self._parts(sender)
            self._set_gauges(parts)
            async with asyncio.TaskGroup() as tasks:
                beside = [
                    tasks.create_task(self._watch_keys()),
                    tasks.create_task(self._watch_secrets()),
                    tasks.create_task(self._watch_owed()),
                    tasks.create_task(self._watch_changes()),
                ]
                if self._database_folder is not None:
                    beside.append(
                        tasks.create_task(
                            disk.watch(
                                self._database_folder,
                                settings.free_disk_bytes_min,
                                settings.free_disk_check_seconds,
                                self._tell_disk,
                            )
                        )
                    )
                await self._hold_tenures(parts)
                for task in beside:
                    task.cancel()
        await asyncio.to_thread(self.metrics.close)

    async def _start_admin(self) -> AdminServer:
        settings = self.settings
        exposition = self.metrics.exposition if settings.metrics_enabled else None
        if settings.admin_socket is not None:
            return await start_admin_socket(
                settings.admin_socket, readiness=self.readiness, exposition=exposition
            )
        host, port = split_address(settings.admin_address)
        try:
            return await start_admin(host, port, readiness=self.readiness, exposition=exposition)
        except OSError as error:
            raise ListenError(
                f"cannot listen on the admin address {settings.admin_address}: {error.strerror or error}; "
                "stop what uses it or choose another one"
            ) from None

    async def _prepare(self) -> None:
        """Migrate, and read the keys that what is in the database is sealed under."""
        connection = await connect(
            self._dsn,
            "migrate",
            node=self.settings.node_name,
            boot=self._boot,
            statement_seconds_max=600,
        )
        try:
            for name in await migrate(connection):
                self._log.info("migration.applied", migration=name)
            in_use = await configuration.holds_sealed(connection)
            self._sealing_keys = _sealing_keys(self.settings, in_use=in_use)
            self._sealer = Sealer(self._sealing_keys, os.urandom)
        finally:
            await connection.close()

    def _build_api(self) -> None:
        settings = self.settings
        authenticator = NodeAuthenticator(
            [key.key for key in self._sealing_keys.keys],
            now_us=self._clock.now_us,
            random=os.urandom,
        )
        self._peers = Peers(authenticator)
        tenancy = Tenancy(self._database, self._changed, self._epoch)
        limits = ApiLimits(retry_window_seconds_max=settings.retry_window_hours_max * 3600)
        self._ingest = IngestService(
            admission=self._admission,
            limits=StreamLimits(
                frames_max=settings.stream_frames_in_flight_max,
                bytes_max=settings.stream_credit_bytes,
                frame_events_max=settings.frame_events_max,
                frame_bytes_max=settings.frame_bytes_max,
            ),
            homes=self._homes,
            peers=self._peers,
            wrong_home=self._wrong_home,
            counters=self.metrics.homes,
            now_us=self._clock.now_us,
            seconds=time.monotonic,
            node=self._own_address,
        )
        services: list[tuple[str, Any, Callable[[Any, Any], None]]] = [
            (
                "IngestService",
                self._ingest,
                ingest_service_pb2_grpc.add_IngestServiceServicer_to_server,
            ),
            (
                "EndpointService",
                EndpointService(tenancy, self._sealer, limits, os.urandom),
                endpoint_service_pb2_grpc.add_EndpointServiceServicer_to_server,
            ),
            (
                "SubscriptionService",
                SubscriptionService(tenancy, self._sealer, limits, os.urandom),
                subscription_service_pb2_grpc.add_SubscriptionServiceServicer_to_server,
            ),
            (
                "EventTypeService",
                EventTypeService(tenancy, limits),
                event_type_service_pb2_grpc.add_EventTypeServiceServicer_to_server,
            ),
            (
                "TenantService",
                TenantService(tenancy, self._keys, os.urandom),
                tenant_service_pb2_grpc.add_TenantServiceServicer_to_server,
            ),
            (
                "ApiKeyService",
                ApiKeyService(tenancy, self._keys, limits, os.urandom),
                api_key_service_pb2_grpc.add_ApiKeyServiceServicer_to_server,
            ),
        ]
        self._api = build_server(
            [Service(f"outrider.v1.{name}", servicer, add) for name, servicer, add in services],
            [settings.listen_address, settings.own_address],
            interceptor=CallInterceptor(
                self._keys,
                observe=lambda method, code, _: self.metrics.api.calls.add(method, code),
                clock=time.monotonic,
                random=os.urandom,
                nodes=Nodes(
                    authenticator,
                    self._peers,
                    Router(
                        self._directory,
                        self._homes,
                        self._admission.holds,
                        self._least_used_shards,
                        time.monotonic,
                    ),
                    self._own_address,
                    self.metrics.homes,
                ),
            ),
            handlers=[Portions(self._admission, self._ingest.reader, self.metrics.homes).handler()],
            reuse_port=self._is_worker(),
        )
        self.port = self._api.ports[0]

    def _parts(self, sender: WebhookSender) -> TenureParts:
        settings = self.settings
        return TenureParts(
            connect=self._connect,
            clock=self._clock,
            directory=self._directory,
            sender=sender,
            metrics=self.metrics,
            log=PipelineLog(
                clock=time.monotonic,
                counters=self.metrics.telemetry,
                lines_per_second=settings.log_lines_per_second_max,
            ),
            lease_holds=self._lease.holds,
            random=random.random,
            monotonic=time.monotonic,
            limits=Limits(
                lane_deliveries_max=settings.lane_deliveries_max,
                lane_bytes_max=settings.lane_bytes_max,
                held_bytes_max=int(settings.node_payload_bytes_max * LANES_SHARE),
                window_us_max=int(settings.window_seconds_max * 1e6),
                window_events_max=settings.window_events_max,
            ),
            groups=GroupLimits(
                events_max=settings.publish_group_events_max,
                bytes_max=settings.publish_group_bytes_max,
                idempotency_hours=settings.idempotency_hours,
            ),
            deliver=DeliverLimits(
                requests_in_flight_max=settings.requests_in_flight_max,
                outcomes_unrecorded_max=settings.outcomes_unrecorded_max,
            ),
            record_interval_seconds=settings.record_interval_ms / 1000,
            catch_up_deliveries_max=settings.catch_up_page_deliveries_max,
            catch_up_bytes_max=settings.catch_up_page_bytes_max,
        )

    async def _hold_tenures(self, parts: TenureParts) -> None:
        """One tenure after another until the node stops; a failure to begin one is tried again ever more slowly."""
        failures = 0
        while not self._stop.is_set():
            try:
                await self._hold_tenure(parts)
            except Exception as error:  # noqa: BLE001 - see _tenure_ended
                for leaf in _leaves(error):
                    if isinstance(leaf, LeaseLost | SecretsError):
                        raise leaf from None
                self._tenure_ended(_leaves(error)[0])
            began = self._admission.tenure is not None
            self._close_door()
            failures = 0 if began else min(failures + 1, len(BACK_OFF_SECONDS) - 1)
            await self._pause(BACK_OFF_SECONDS[failures])
        await self._end_lease()

    async def _end_lease(self) -> None:
        """Whatever became of the last tenure: nobody needs to wait for this node any more."""
        with contextlib.suppress(Exception):
            connection = await self._connect("lease", durable=True)
            try:
                await self._lease.end(connection)
            finally:
                await connection.close()

    async def _pause(self, seconds: float) -> bool:
        """Let time pass; true, at once, when the node is to stop."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        return self._stop.is_set()

    def _waiting(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            self._log.warning("node.waiting", why=problem)

    def _is_worker(self) -> bool:
        """Whether this node shares its host, and its public port, with others of one supervisor."""
        return self.settings.admin_socket is not None

    def _epoch(self, shard: int) -> int | None:
        """The epoch under which this node holds a shard; None where it does not."""
        tenure = self._admission.tenure
        if tenure is None or not self._admission.holds(shard) or not self._lease.holds():
            return None
        return tenure.obligations.windows[shard].epoch

    def _wrong_home(self, names: Sequence[str]) -> None:
        """What was known of homes was not so: look again."""
        self._homes.forget(names)
        if self._moves is not None:
            self._moves.look_soon()

    async def _least_used_shards(self) -> list[tuple[int, int]]:
        async with self._database.connection() as connection:
            return await tenants.least_used_shards(connection)

    async def _find_homes(
        self, names: Collection[str], ids: Collection[int]
    ) -> list[tuple[int, str, tuple[int, ...]]]:
        async with self._database.connection() as connection:
            return await tenants.find_homes(connection, names, ids)

    def _tenure_ended(self, error: BaseException) -> None:
        """The log is the truth; starting anew from it is the cure, whatever it was. What nobody foresaw is told in full."""
        self._problem = f"taking the shards up again: {type(error).__name__}"
        expected = isinstance(error, OutriderError) or is_unavailable(error) or is_fenced(error)
        self._orderly = expected
        self._log.warning(
            "tenure.ended",
            error=type(error).__name__,
            detail=str(error),
            exc_info=None if expected else error,
        )

    async def _hold_tenure(self, parts: TenureParts) -> None:
        async with contextlib.AsyncExitStack() as stack:

            async def connection(role: str) -> DedicatedConnection:
                made = await self._connect(role, durable=True)
                stack.callback(made.terminate)
                return made

            lease = await connection("lease")
            if not await self._lease.begin(lease, self._pause, self._waiting):
                return
            pruning, cancelling = await connection("prune"), await connection("jobs")
            moving = await connection("moves")
            pruner = Pruner(
                connection=pruning,
                clock=self._clock,
                retention=Retention(
                    self.settings.retention_days,
                    self.settings.retention_bytes_max,
                    self.settings.partition_hours,
                    self.settings.idempotency_hours,
                ),
                counters=self.metrics.prune,
                window_seconds=self.settings.window_seconds_max,
            )
            await pruner.make_ahead()
            self._directory.clear()

            async def upkeep(tenure: Tenure, tasks: asyncio.TaskGroup) -> None:
                moves = self._moves = self._moves_of(tenure, moving)
                tasks.create_task(until_lost((lease, pruning, cancelling, moving)))
                tasks.create_task(self._lease.run(lease, tenure.epochs))
                tasks.create_task(moves.run())
                tasks.create_task(pruner.run(tenure.obligations, tenure.recorder))
                tasks.create_task(
                    jobs.cancel_deleted(tenure.obligations, tenure.recorder, cancelling)
                )

            async with open_tenure(parts, upkeep) as tenure:
                await self._serve(tenure, lease)

    def _moves_of(self, tenure: Tenure, connection: DedicatedConnection) -> Moves:
        settings = self.settings

        async def load(shards: Collection[int]) -> list[TenantConfiguration]:
            return await configuration.load_shards(connection, self._sealer, shards)

        def settled(view: View) -> None:
            self._looked(tenure, view)

        return Moves(
            tenure=tenure,
            lease=self._lease,
            assignment=Assignment(
                settings.node_name,
                settings.workers_expected if self._is_worker() else 1,
                settings.lease_renew_seconds,
            ),
            homes=self._homes,
            connection=connection,
            load=load,
            monotonic=time.monotonic,
            renew_seconds=settings.lease_renew_seconds,
            crash_seconds=settings.crash_seconds,
            orderly=self._orderly,
            counters=self.metrics.homes,
            settled=settled,
        )

    def _looked(self, tenure: Tenure, view: View) -> None:
        """After each look at who holds what: the door opens with the first after which all that is due is here."""
        if self._admission.tenure is tenure or self._stop.is_set():
            return
        held = tenure.obligations.windows
        if not held and not any(shard.live for shard in view.shards):
            self._waiting("another node holds the shards")
            return
        self._settle_memory()
        self._admission.tenure = tenure
        self._problem = ""
        self._api.health.set_serving(True)
        self._log.info("tenure.began", shards=len(held), address=self._own_address())
        self._ready.set()

    async def _serve(self, tenure: Tenure, lease: DedicatedConnection) -> None:
        await self._stop.wait()
        self._log.info("node.draining")
        # Others are told first: who is sent away can go somewhere else at once. Whoever is here is served to the end.
        self._admission.draining = True
        self._lease.draining = True
        await self._lease.renew(lease, tenure.epochs)
        self._api.health.set_serving(False)
        with contextlib.suppress(Exception):
            await self._ingest.go_away()
        assert self._moves is not None
        await self._moves.drain(self.settings.drain_seconds)

    def _close_door(self) -> None:
        self._admission.tenure = None
        if not self._stop.is_set():
            self._api.health.set_serving(False)

    async def _connect(self, role: str, *, durable: bool) -> DedicatedConnection:
        connection = await connect(
            self._dsn,
            role,
            node=self.settings.node_name,
            boot=self._boot,
            statement_seconds_max=WRITER_STATEMENT_SECONDS,
        )
        if not durable:
            await connection.execute("SET synchronous_commit = off")
        return connection

    async def _changed(self, tenant: int) -> None:
        """A tenant's configuration was changed: use it before the change is answered."""
        tenure = self._admission.tenure
        if (
            tenure is None
        ):  # the next one reads it, for its epochs are raised after this was committed
            return
        try:
            await self._changed_in(tenure, tenant)
        except BaseException:
            # It is committed all the same, though whoever asked for it may be gone.
            self._changed_unread.add(tenant)
            raise

    async def _watch_changes(self) -> None:
        """Read again what could not be read when it was changed; settle memory once changes have come to rest."""
        while True:
            await asyncio.sleep(CHANGES_CHECK_SECONDS)
            if self._unsettled_since and time.monotonic() > self._unsettled_since + SETTLE_SECONDS:
                self._settle_memory()
            with contextlib.suppress(OutriderError):
                await self._look_at_split_tenants()
            for tenant in list(self._changed_unread):
                self._changed_unread.discard(tenant)
                await self._read_again(tenant)

    async def _look_at_split_tenants(self) -> None:
        """A split tenant's configuration is changed at its home; the owners of its other shards learn of it here."""
        tenure = self._admission.tenure
        if tenure is None:
            return
        async with self._database.connection() as connection:
            versions = await tenants.find_split(connection, tenure.obligations.windows)
        for tenant, version in versions.items():
            entry = self._directory.by_id.get(tenant)
            if entry is None or entry.version != version:
                self._changed_unread.add(tenant)
        gone = [
            entry.id
            for entry in self._directory.by_id.values()
            if len(entry.everywhere) > 1 and entry.id not in versions
        ]
        self._changed_unread.update(gone)

    async def _read_again(self, tenant: int) -> None:
        """A tenant that cannot be read keeps what it had, is tried again, and costs no other tenant anything."""
        try:
            await self._changed(tenant)
        except OutriderError:
            pass  # the database is away: it was noted again
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this tenant's alone
            if tenant not in self._unreadable:
                self._unreadable.add(tenant)
                self._log.error(
                    "configuration.unreadable",
                    tenant=tenant,
                    error=type(error).__name__,
                    detail=str(error),
                    exc_info=None if isinstance(error, SecretsError) else error,
                )
        else:
            self._unreadable.discard(tenant)

    async def _changed_in(self, tenure: Tenure, tenant: int) -> None:
        async with self._database.connection() as connection:
            loaded = await configuration.load_tenant(connection, self._sealer, tenant)
        self._unsettled_since = time.monotonic()
        if loaded is None:
            tenure.remove(tenant)
        elif not tenure.obligations.windows.keys().isdisjoint(loaded.tenant.everywhere):
            tenure.configure(loaded)

    async def _watch_keys(self) -> None:
        """Learn of revoked and expired keys, and end their streams."""

        def why(caller: Caller) -> Unauthenticated:
            try:
                self._keys.require_valid(caller)
            except Unauthenticated as error:
                return error
            return Unauthenticated("INVALID_API_KEY", "the API key does not hold any more")

        while True:
            await asyncio.sleep(self.settings.revocation_check_seconds)
            with contextlib.suppress(OutriderError):
                await self._keys.revalidate()
            self._ingest.end_streams(lambda caller: not self._keys.is_valid(caller), why)

    async def _watch_secrets(self) -> None:
        """Secrets whose overlap ended sign no more."""
        since_us = self._clock.now_us()
        while True:
            await asyncio.sleep(SECRETS_CHECK_SECONDS)
            until_us = self._clock.now_us()
            with contextlib.suppress(OutriderError):
                async with self._database.connection() as connection:
                    ended = await endpoints.find_ended_secrets(connection, since_us, until_us)
                self._changed_unread.update(ended)
                since_us = until_us

    async def _watch_owed(self) -> None:
        """Count what is owed, for the metrics."""
        self.metrics.gauges.owed_deliveries = lambda: self._owed
        self.metrics.gauges.held_back_deliveries = lambda: self._held_back
        while True:
            with contextlib.suppress(OutriderError):
                tenure = self._admission.tenure
                shards = [] if tenure is None else list(tenure.obligations.windows)
                async with self._database.connection() as connection:
                    self._owed, self._held_back = await owed.total(connection, shards)
            await asyncio.sleep(OWED_COUNT_SECONDS)

    def _settle_memory(self) -> None:
        """Take the configuration out of the garbage collector's sight.

        It is most of what lives long, and walking it in every full collection would hold up every acknowledgement.
        """
        self._unsettled_since = 0.0
        gc.collect()
        gc.freeze()

    def _tell_disk(self, full: bool) -> None:  # noqa: FBT001 - what is told is just this
        if full != self._admission.disk_full:
            self._log.warning("disk.floor", full=full)
        self._admission.disk_full = full

    def readiness(self) -> tuple[bool, str]:
        """Whether this node takes work, and if not, why not."""
        closed = self._admission.closed_to_newcomers()
        if closed is None:
            return True, "ready"
        return False, self._problem or closed.message

    def _own_address(self) -> str:
        """Where this node alone is reached."""
        host, _ = split_address(self.settings.own_address)
        return join_address(host, self._api.ports[1])

    def _set_gauges(self, parts: TenureParts) -> None:
        gauges = self.metrics.gauges

        def of(read: Callable[[Tenure], float]) -> Callable[[], float]:
            def reading() -> float:
                tenure = self._admission.tenure
                return read(tenure) if tenure is not None else 0.0

            return reading

        gauges.lanes = of(lambda t: len(t.obligations.lanes))
        gauges.broken_subscriptions = self._directory.broken_subscriptions
        gauges.lanes_deliveries = of(
            lambda t: sum(len(lane.queue) for lane in list(t.obligations.lanes.values()))
        )
        gauges.payload_bytes_held = of(
            lambda t: (
                t.obligations.held_bytes
                + self._admission.room.taken
                + self._admission.large_room.taken
                + self._admission.forwarded_room.taken
            )
        )
        gauges.window_events = of(
            lambda t: sum(len(window) for window in list(t.obligations.windows.values()))
        )
        gauges.requests_in_flight = of(lambda t: t.deliverer.in_flight)
        gauges.outcomes_unrecorded = of(lambda t: t.obligations.unrecorded())
        gauges.persist_events_waiting = of(lambda t: t.persister.waiting())
        gauges.shards_owned = of(lambda t: len(t.obligations.windows))
        gauges.streams_open = lambda: self._ingest.streams
        gauges.lease_remaining_seconds = self._lease.remaining_seconds
        if self._database_folder is not None:
            folder = self._database_folder
            gauges.free_disk_bytes = lambda: disk.free_bytes(folder)


def _lease_clock() -> float:
    """Seconds that go on while the machine sleeps, where there is such a clock: a lease ends then, too."""
    boot_clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot_clock is None else time.clock_gettime(boot_clock)


def _sealing_keys(settings: Settings, *, in_use: bool) -> sealing_keys.KeyRing:
    if settings.sealing_keys is not None:
        return sealing_keys.KeyRing.parse(settings.sealing_keys.get_secret_value())
    path = settings.sealing_key_file or settings.state_folder / "sealing.keys"
    return sealing_keys.load_or_create(path, os.urandom, in_use=in_use)


def _leaves(error: BaseException) -> list[BaseException]:
    """The errors inside nested groups."""
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
