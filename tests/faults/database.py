"""A Postgres that no node owns: the embedded programs over a copy of the template's data, at an address of its own."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import asyncpg
from tests.faults.network import Place
from tests.support.service import POLL_SECONDS, Template, temporary_folder

from outrider_server.embedded.account import UNPRIVILEGED, account_for
from outrider_server.embedded.binaries import find_binaries, reachable_binaries
from outrider_server.embedded.defaults import DEFAULT_SETTINGS
from outrider_server.embedded.launcher import free_port
from outrider_server.embedded.state import StateFolder

START_SECONDS = 30.0
CONNECTIONS_MAX = 200


class Database:
    """One Postgres at `place`."""

    def __init__(self, folder: Path, place: Place) -> None:
        self._state = StateFolder(folder)
        self._place = place
        self._port = free_port()
        self._account = account_for(UNPRIVILEGED, self._state.data)
        self._binaries = reachable_binaries(find_binaries(), self._account, self._state.copies)
        self._process: subprocess.Popen[bytes] | None = None
        with (self._state.data / "pg_hba.conf").open("a") as rules:
            rules.write(f"host all all {place.address}/16 scram-sha-256\n")

    @property
    def dsn(self) -> str:
        password = quote(self._state.password(), safe="")
        return f"postgresql://outrider:{password}@{self._place.address}:{self._port}/outrider"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start it and wait until it answers."""
        settings = {
            **DEFAULT_SETTINGS,
            "max_connections": str(CONNECTIONS_MAX),
            "listen_addresses": self._place.address,
            "port": str(self._port),
            "unix_socket_directories": "",
        }
        # It ends with us, however we end: nothing else would stop it.
        command = ["setpriv", "--pdeathsig", "QUIT"] if shutil.which("setpriv") else []
        if self._account.drops:
            assert command, "setpriv is needed to run Postgres as another than root"
            command += [f"--reuid={self._account.uid}", f"--regid={self._account.gid}"]
            command += ["--clear-groups"]
        command += [str(self._binaries.postgres), "-D", str(self._state.data)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        with self._state.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._place.prefix, *command],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                connection = await self.connect()
            except (OSError, asyncpg.PostgresError):
                assert self._process.poll() is None, self._state.log.read_text()[-3000:]
                assert time.monotonic() < deadline, self._state.log.read_text()[-3000:]
                await asyncio.sleep(POLL_SECONDS)
            else:
                await connection.close()
                return

    async def connect(self) -> asyncpg.Connection[asyncpg.Record]:
        """A connection of the test's own."""
        return await asyncpg.connect(
            self.dsn, server_settings={"application_name": "the test"}, timeout=10
        )

    def end(self, number: int = signal.SIGQUIT) -> None:
        """End it by a signal (SIGINT: fast, SIGKILL: as a crash) and wait for it."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
            self._process.wait(30)


@contextmanager
def database(template: Template, place: Place) -> Iterator[Database]:
    """A database with the template's schema and key, not started yet."""
    with temporary_folder() as folder:
        state = folder / "state"
        # As root its files belong to another account, and must go on doing so.
        subprocess.run(["cp", "-a", str(template.state), str(state)], check=True)
        made = Database(state, place)
        try:
            yield made
        finally:
            made.end()
