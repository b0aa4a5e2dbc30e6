"""The whole service as a process of its own, in a state folder of its own: to be killed, stopped and started again.

    with template() as fresh, service(fresh, lane_deliveries_max=10) as running:
        running.start()
        await running.ready(10)
        running.kill()                          # SIGKILL, as a crash would
        ...
        status = await running.terminate(20)    # SIGTERM

Every process is addressed by the id that was seen when it was started. Waiting is for a condition, with a limit.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import asyncpg
from tests.support.processes import is_gone

from outrider_server.embedded.launcher import free_port
from outrider_server.storage.ledger import Balance, balance

POLL_SECONDS = 0.02
COMMAND_SECONDS_MAX = 60
ROOT = Path(__file__).resolve().parents[2]
SERVER = (sys.executable, "-m", "outrider_server")


async def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Look at what only looking tells, until it holds; never longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(POLL_SECONDS)


class Service:
    """One `outrider-server serve` at a time over one state folder. `knobs` are settings by name.

    It is reached at `host`. `prefix` stands before every command, `variables` in its environment beside the settings.
    """

    def __init__(
        self,
        folder: Path,
        knobs: dict[str, object],
        *,
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.log = folder / "server.log"
        self.listen_address = f"{host}:{free_port()}"
        self._host = host
        self._prefix = tuple(prefix)
        self._admin_port = free_port()
        self.admin_address = f"{host}:{self._admin_port}"
        given = {
            "state_folder": self.state,
            "listen_address": self.listen_address,
            "admin_address": self.admin_address,
            "node_name": "crash-test",
            "workers": 1,
            "free_disk_bytes_min": 16 * 1024 * 1024,
            "log_lines_per_second_max": 5,
            **knobs,
        }
        self._environment = {
            **{name: value for name, value in os.environ.items() if "OUTRIDER_" not in name},
            **{f"OUTRIDER_{name.upper()}": str(value) for name, value in given.items()},
            **(variables or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None

    # Commands

    def run_command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the server to its end, beside the server or without it."""
        return subprocess.run(
            [*self._prefix, *SERVER, *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS_MAX,
            check=False,
        )

    # The server's process

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, program: Sequence[str] = SERVER) -> None:
        """Start it; `program` takes the place of the server's own command."""
        assert not self.running
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._prefix, *program, "serve"],
                env=self._environment,
                cwd=ROOT,  # programs of the tests are found from here
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def ready(self, seconds: float) -> float:
        """Wait until it may be given work; returns how long that took."""
        began = time.monotonic()
        while not await self._is_ready():
            assert self.running, f"the server ended:\n{self.tail()}"
            took = time.monotonic() - began
            assert took < seconds, f"not ready within {seconds:g} s:\n{self.tail()}"
            await asyncio.sleep(POLL_SECONDS)
        return time.monotonic() - began

    async def _is_ready(self) -> bool:
        try:
            async with asyncio.timeout(1.0):
                reader, writer = await asyncio.open_connection(self._host, self._admin_port)
                writer.write(b"GET /readyz HTTP/1.0\r\n\r\n")
                status = await reader.readline()
                writer.close()
                await writer.wait_closed()
                return status.split()[1:2] == [b"200"]
        except (OSError, TimeoutError):
            return False

    def kill(self) -> None:
        """SIGKILL, and its end waited for. What it started must notice by itself."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    async def terminate(self, seconds: float) -> int:
        """SIGTERM; returns the exit status, which must come within `seconds`."""
        assert self._process is not None
        self._process.terminate()
        return await self.ended(seconds)

    async def ended(self, seconds: float) -> int:
        process = self._process
        assert process is not None
        await until(lambda: process.poll() is not None, seconds, "the server's end\n" + self.tail())
        assert process.returncode is not None
        return process.returncode

    def tail(self, lines: int = 60) -> str:
        """The end of what the server and its database said."""
        said = []
        for log in (self.log, self.state / "postgres.log"):
            if log.exists():
                said += [f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-lines:]]
        return "\n".join(said)

    def lines(self, event: str) -> list[str]:
        """The server's log lines of one kind."""
        if not self.log.exists():
            return []
        return [line for line in self.log.read_text(errors="replace").splitlines() if event in line]

    # The database under it

    def postmaster_pid(self) -> int:
        """The process id of the embedded Postgres, as its own file tells; 0 while there is none."""
        try:
            return int((self.state / "postgres" / "postmaster.pid").read_text().split()[0])
        except (FileNotFoundError, IndexError):
            return 0

    def process_tree(self) -> list[int]:
        """The postmaster and its children."""
        postmaster = self.postmaster_pid()
        children = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = status.read_text().rpartition(") ")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == postmaster:
                children.append(int(status.parent.name))
        return [postmaster, *children]

    def freeze_database(self) -> list[int]:
        """SIGSTOP the postmaster and every process of it; give the result to `thaw`."""
        pids = self.process_tree()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        return pids

    @staticmethod
    def thaw(pids: Sequence[int]) -> None:
        for pid in pids:
            if not is_gone(pid):
                os.kill(pid, signal.SIGCONT)

    async def connect(self) -> asyncpg.Connection[asyncpg.Record]:
        """A connection of the test's own to the embedded database while the server runs."""
        lines = (self.state / "postgres" / "postmaster.pid").read_text().splitlines()
        port, folder = lines[3].strip(), lines[4].strip()
        password = (self.state / "postgres.password").read_text().strip()
        return await asyncpg.connect(
            f"postgresql://outrider:{quote(password, safe='')}@/outrider"
            f"?host={quote(folder, safe='/')}&port={port}",
            server_settings={"application_name": "the test"},
            timeout=10,
        )

    async def backends(self, role: str | None = None) -> dict[str, int]:
        """The process ids of the server's own connections by role (those of its pool share one)."""
        connection = await self.connect()
        try:
            rows = await connection.fetch(
                "SELECT pid, split_part(application_name, '/', 4) AS role FROM pg_stat_activity"
                " WHERE split_part(application_name, '/', 1) = 'outrider'"
            )
        finally:
            await connection.close()
        return {row["role"]: row["pid"] for row in rows if role is None or row["role"] == role}

    async def balances(self) -> dict[str, Balance]:
        """The balance of each tenant now, by the same query as the command's."""
        connection = await self.connect()
        try:
            return {row.tenant: row for row in await balance(connection)}
        finally:
            await connection.close()

    async def settled(self, tenant: str, seconds: float) -> Balance:
        """Wait until nothing of a tenant is open or owed, and everything is accounted for."""
        deadline = time.monotonic() + seconds
        while True:
            found = (await self.balances())[tenant]
            if not found.owed and not found.window and found.holds():
                return found
            assert time.monotonic() < deadline, (
                f"not settled within {seconds:g} s: {found}, off by {found.difference()}\n{self.tail()}"
            )
            await asyncio.sleep(0.1)

    def balance_printed(self) -> dict[str, list[int]]:
        """What `outrider-server balance` prints, which must say that all is accounted for.

        Per tenant: matched, delivered, dead, cancelled, owed, window.
        """
        ran = self.run_command("balance")
        assert ran.returncode == 0, ran.stdout + ran.stderr
        table = {}
        for line in ran.stdout.splitlines()[1:]:
            name, *numbers = line.split()
            assert all(re.fullmatch("[0-9]+", number) for number in numbers), line
            table[name] = [int(number) for number in numbers]
        return table

    def close(self) -> None:
        """End everything, so that nobody writes the files any more."""
        if self.running:
            self.kill()
        deadline = time.monotonic() + 20
        postmaster = self.postmaster_pid()
        if postmaster and not is_gone(postmaster):
            os.kill(postmaster, signal.SIGCONT)  # a test may have failed while it was frozen
        while postmaster and not is_gone(postmaster):
            if time.monotonic() > deadline:
                os.kill(postmaster, signal.SIGQUIT)
                deadline += 20
            time.sleep(POLL_SECONDS)


@dataclass(frozen=True)
class Template:
    """A state folder with a migrated, stopped database, to be copied; and the key of its system admin."""

    state: Path
    key: str = field(repr=False)


@contextmanager
def template() -> Iterator[Template]:
    with temporary_folder() as folder:
        made = Service(folder, {})
        ran = made.run_command("create-admin-key")
        assert ran.returncode == 0, ran.stderr
        yield Template(made.state, ran.stdout.strip().splitlines()[-1])


@contextmanager
def service(
    template: Template, *, variables: Mapping[str, str] | None = None, **knobs: object
) -> Iterator[Service]:
    """A service over a copy of the template, not started yet."""
    with temporary_folder() as folder:
        made = Service(folder, knobs, variables=variables)
        # As root its files belong to another account, and must go on doing so.
        subprocess.run(["cp", "-a", str(template.state), str(made.state)], check=True)
        try:
            yield made
        finally:
            made.close()


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Outside of pytest's folders: as root those are closed to the account Postgres runs as."""
    folder = Path(tempfile.mkdtemp(prefix="outrider-e2e-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
