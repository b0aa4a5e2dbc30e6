"""Runs the demo: starts everything in order, shows it, and takes it down in reverse."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, cast

from outrider.errors import OutriderError
from outrider.publisher import Publisher
from outrider_server.access.keys import create_admin_key
from outrider_server.app import Node
from outrider_server.demo import configuration
from outrider_server.demo.commands import find_tools, to_try
from outrider_server.demo.errors import DemoError
from outrider_server.demo.folder import (
    Choice,
    bytes_used,
    choose_folder,
    hold,
    load_kept,
    save_kept,
)
from outrider_server.demo.ledger import STORAGE_ERRORS, LedgerReader
from outrider_server.demo.logs import BoundedLog
from outrider_server.demo.receiver import SampleReceiver
from outrider_server.demo.scenario import (
    ENDPOINTS,
    EVENT_TYPES,
    EXAMPLE_TO_PUBLISH,
    SUBSCRIPTIONS,
    TENANT,
    SampleEvents,
)
from outrider_server.demo.screen import Figures, ReaderGone, Screen
from outrider_server.demo.setup import PARENT, Place, complete_secrets, set_up
from outrider_server.demo.traffic import DiskBound, Traffic, watch_disk
from outrider_server.embedded.account import obstacle
from outrider_server.embedded.errors import explain_os_error
from outrider_server.settings import Settings
from outrider_server.storage.database import DedicatedConnection, connect
from outrider_server.supervisor import embedded_postgres, require_free
from outrider_server.telemetry.logs import configure

DEFAULT_FOLDER = "run"
MIB = 1024 * 1024
FLUSH_SECONDS_MAX = 5.0
STALLED_SECONDS = 3.0
SAY_SECONDS = 10.0
WINDOW_EVENTS = 2_000
PRODUCER = "demo"
LOG = "demo.log"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the command line asks of the demo. `seconds` 0: until Ctrl-C."""

    rate: float
    seconds: float
    disk_bytes_max: int

    @classmethod
    def of(cls, options: argparse.Namespace) -> Wishes:
        """From parsed options; DemoError where a number makes no sense."""
        rate, seconds, disk_mib = options.rate, options.seconds, options.disk_mib
        for name, value in (("--rate", rate), ("--seconds", seconds)):
            if not 0 <= value < float("inf"):
                raise DemoError(f"{name} is a number from 0 up, not {value}: correct it.")
        if disk_mib < 256:
            raise DemoError(f"--disk-mib is at least 256, not {disk_mib}: give it more.")
        return cls(rate, seconds, disk_mib * MIB)


async def run_demo(settings: Settings, options: argparse.Namespace) -> None:
    """Run until Ctrl-C, or for as long as was asked."""
    wishes = Wishes.of(options)
    choice = _choose(settings)
    stop = asyncio.Event()
    with _stopped_by_signals(stop), hold(choice.folder):
        configured = configuration.demo_settings(settings, choice.folder)
        require_free(configured.listen_address, "--listen-address")
        require_free(configured.admin_address, "--admin-address")
        configuration.require_room(choice.folder, configured.free_disk_bytes_min)
        try:
            log = BoundedLog(choice.folder / LOG)
        except OSError as error:
            raise explain_os_error(error, choice.folder) from error
        with log:
            configure(configured.log_level, "console", cast(TextIO, log))
            try:
                await _Demo(configured, wishes, choice, Screen(sys.stdout), stop).run()
            except* ReaderGone:
                # A way to say stop. Nothing more can be written, not even by the interpreter at its end.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            finally:
                configure(configured.log_level, "console", sys.stderr)


def _choose(settings: Settings) -> Choice:
    if settings.origin("state_folder") != "default":
        return Choice(settings.state_folder)
    default = Path.cwd() / DEFAULT_FOLDER
    if settings.database_url is not None:
        return Choice(default)
    return choose_folder(default, lambda folder: obstacle(folder, settings.postgres_user_id))


@contextlib.contextmanager
def _stopped_by_signals(stop: asyncio.Event) -> Iterator[None]:
    """Set `stop` at the first signal; at the second end at once, as KeyboardInterrupt."""
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    forced = False

    def signalled() -> None:
        nonlocal forced
        forced = stop.is_set()
        stop.set()
        if forced:
            task.cancel()

    for number in SIGNALS:
        loop.add_signal_handler(number, signalled)
    try:
        yield
    except asyncio.CancelledError:
        if forced:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)


class _Demo:
    """One run of the demo: what it holds, in the order in which it is started."""

    def __init__(
        self,
        settings: Settings,
        wishes: Wishes,
        choice: Choice,
        screen: Screen,
        stop: asyncio.Event,
    ) -> None:
        self._settings = settings
        self._wishes = wishes
        self._choice = choice
        self._folder = choice.folder
        self._screen = screen
        self._stop = stop
        self._boot = str(uuid.uuid4())
        self._kept = load_kept(choice.folder)
        self._disk = DiskBound(wishes.disk_bytes_max)
        self._receiver = SampleReceiver(random.random)

    async def run(self) -> None:
        new_secrets = complete_secrets(self._kept, os.urandom)
        for each in ENDPOINTS:
            self._receiver.expect(each.name, self._kept.secrets[each.name], each.share_failed)
        await self._say_where()
        async with self._receiver.listening(self._kept.receiver_port):
            self._kept.receiver_port = self._receiver.port
            save_kept(self._folder, self._kept)
            async with self._database() as (dsn, files):
                if self._stop.is_set():
                    return
                ledger = LedgerReader(lambda: self._connect(dsn), TENANT, time.monotonic)
                await ledger.begin()
                node = Node(self._settings, dsn, database_folder=files)
                async with asyncio.TaskGroup() as tasks:
                    running = tasks.create_task(node.run())
                    if await self._is_ready(node, running, tasks):
                        await self._set_up(dsn, node, new_secrets)
                        await self._greet(node, ledger)
                        await self._serve(node, ledger)
                        await self._screen.say(
                            "Stopping: what is under way is finished and recorded."
                        )
                    node.stop()
                await self._say_goodbye(ledger)
        await self._screen.say("Stopped.")

    @contextlib.asynccontextmanager
    async def _database(self) -> AsyncIterator[tuple[str, Path | None]]:
        if self._settings.database_url is not None:
            yield self._settings.database_url.get_secret_value(), None
            return
        async with embedded_postgres(self._settings, configuration.POSTGRES_SETTINGS) as database:
            yield database

    async def _connect(self, dsn: str) -> DedicatedConnection:
        return await connect(dsn, "demo", node=self._settings.node_name, boot=self._boot)

    async def _is_ready(
        self, node: Node, running: asyncio.Task[None], tasks: asyncio.TaskGroup
    ) -> bool:
        """Wait until the node serves; False where it is to stop before that."""
        ready = tasks.create_task(node.ready())
        stopped = tasks.create_task(self._stop.wait())
        waited = 0.0
        while not (
            await asyncio.wait(
                (running, ready, stopped),
                timeout=SAY_SECONDS,
                return_when=asyncio.FIRST_COMPLETED,
            )
        )[0]:
            waited += SAY_SECONDS
            await self._screen.say(
                f"The node does not serve yet, after {waited:.0f} s: see {_short(self._folder / LOG)}"
            )
        became_ready = ready.done()
        ready.cancel()
        stopped.cancel()
        return became_ready and not self._stop.is_set()

    async def _set_up(self, dsn: str, node: Node, new_secrets: set[str]) -> None:
        async def make_admin_key() -> str:
            connection = await self._connect(dsn)
            try:
                return await create_admin_key(
                    connection, os.urandom, display_name="Made by the demo"
                )
            finally:
                await connection.close()

        place = Place(
            target=self._target(node),
            make_admin_key=make_admin_key,
            url=self._receiver.url,
            save=lambda kept: save_kept(self._folder, kept),
        )
        try:
            await set_up(place, self._kept, new_secrets)
        except OutriderError as error:
            raise DemoError(
                f"The demo could not be set up ({error}): look into {self._folder / LOG}, or begin anew with another"
                " --state-folder."
            ) from error

    async def _serve(self, node: Node, ledger: LedgerReader) -> None:
        """Publish and show until it is time to stop."""
        publisher = Publisher(
            self._target(node),
            self._kept.publisher_key,
            PRODUCER,
            tenant=TENANT,
            linger_ms=20.0,
            window_events=WINDOW_EVENTS,
        )
        traffic = Traffic(
            send=publisher.send,
            next_event=SampleEvents(random.Random()).next,  # noqa: S311 - sample data
            rate=self._wishes.rate,
            disk=self._disk,
            monotonic=time.monotonic,
        )
        show = _Show(self._screen, node, publisher, traffic, ledger, self._disk, self._receiver)
        try:
            async with asyncio.TaskGroup() as tasks:
                jobs = [
                    tasks.create_task(watch_disk(self._disk, lambda: bytes_used(self._folder))),
                    tasks.create_task(ledger.run()),
                    tasks.create_task(traffic.run()),
                    tasks.create_task(show.run()),
                ]
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._wishes.seconds or None):
                        await self._stop.wait()
                for job in jobs:
                    job.cancel()
        finally:
            # What is left unacknowledged is said by the figures; a failed publisher has shown its sentence already.
            with contextlib.suppress(OutriderError):
                await publisher.close(FLUSH_SECONDS_MAX)
        await self._screen.show(show.figures())

    def _target(self, node: Node) -> str:
        return configuration.local_target(self._settings.listen_address, node.port)

    async def _say_where(self) -> None:
        where = f"Outrider starts, with its data in {_short(self._folder)}"
        if self._choice.blocked_by is not None:
            where += (
                f" (its database does not run as root and cannot pass {self._choice.blocked_by})"
            )
        await self._screen.say(where)

    async def _greet(self, node: Node, ledger: LedgerReader) -> None:
        kept, target = self._kept, self._target(node)
        commands = to_try(
            find_tools(Path(sys.executable).parent, Path.cwd()),
            target,
            publisher_key=kept.publisher_key,
            integration_key=kept.integration_key,
            tenant=TENANT,
            event=EXAMPLE_TO_PUBLISH,
        )
        earlier = ledger.at_start
        before = (
            f"{earlier.recorded} deliveries recorded by earlier runs, {earlier.owed} owed"
            if earlier.recorded or earlier.owed
            else "new data"
        )
        lines = [
            "",
            f"  address        {target} (gRPC, with reflection)",
            f"  admin address  http://{self._settings.admin_address} (/metrics, /healthz, /readyz)",
            f"  tenant         {PARENT}: {len(ENDPOINTS)} endpoints, {len(SUBSCRIPTIONS)} subscriptions,"
            f" {len(EVENT_TYPES)} event types; {before}",
            f"  log            {_short(self._folder / LOG)}",
            "",
            f"  keys, kept in {_short(self._folder / 'demo.json')}:",
            f"  system admin       {kept.admin_key}",
            f"  integration admin  {kept.integration_key}",
            f"  publisher          {kept.publisher_key}",
            "",
            "  To paste into another terminal:",
            *(f"  {command}" for command in commands),
            "",
            f"  {self._wishes.rate:g} sample events a second are published. Ctrl-C stops; the data stays.",
            "",
        ]
        await self._screen.say("\n".join(lines))

    async def _say_goodbye(self, ledger: LedgerReader) -> None:
        """What the ledger says at the end: read after the node's last record, while the database still runs."""
        try:
            await ledger.read()
        except STORAGE_ERRORS:
            return
        finally:
            ledger.close()
        left = ledger.now.owed
        text = f"Recorded {ledger.recorded} deliveries in this run, {ledger.now.recorded} in all; "
        text += f"{left} are owed and go out after the next start." if left else "none is owed."
        if not ledger.now.holds:
            text += " The ledger does not add up: please report this."
        await self._screen.say(text)


class _Show:
    """Collects the figures and shows them for ever."""

    def __init__(
        self,
        screen: Screen,
        node: Node,
        publisher: Publisher,
        traffic: Traffic,
        ledger: LedgerReader,
        disk: DiskBound,
        receiver: SampleReceiver,
    ) -> None:
        self._screen = screen
        self._node = node
        self._publisher = publisher
        self._traffic = traffic
        self._ledger = ledger
        self._disk = disk
        self._receiver = receiver
        self._began = self._acked_at = time.monotonic()
        self._acked = 0

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._screen.refresh_seconds)
            await self._screen.show(self.figures())

    def figures(self) -> Figures:
        now = time.monotonic()
        stats = self._publisher.stats
        if stats.events_acked > self._acked or not stats.events_held:
            self._acked, self._acked_at = stats.events_acked, now
        return Figures(
            seconds=now - self._began,
            published=stats.events_acked,
            matched=self._node.metrics.match.targets,
            delivered=self._receiver.deliveries,
            recorded=self._ledger.recorded,
            owed=self._ledger.now.owed,
            failed=sum(each.failed_on_purpose for each in self._receiver.received.values()),
            disk_bytes=self._disk.used,
            disk_bytes_max=self._disk.bytes_max,
            problem=self._problem(now),
            endpoints=self._receiver.received,
        )

    def _problem(self, now: float) -> str:
        if self._traffic.problem:
            return self._traffic.problem
        if self._disk.passed:
            return (
                f"publishing waits: the folder is at its bound of {self._disk.bytes_max // MIB} MiB"
            )
        if now - self._acked_at > STALLED_SECONDS:
            return f"the node has acknowledged nothing for {now - self._acked_at:.0f} s, see {LOG}"
        return ""


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
