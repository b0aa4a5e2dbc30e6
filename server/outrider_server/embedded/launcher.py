"""Runs one Postgres in a state folder: creates it once, starts it, waits until it answers, ends it.

start:  lock the folder -> end what an earlier run left -> programs the account can run -> create or check the data
        -> guard and Postgres -> wait until it answers (crash recovery included)
It never touches a folder that it did not make or that does not fit: each such case is an error that says what to do.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from outrider_server.embedded import guard
from outrider_server.embedded.account import UNPRIVILEGED, Account, account_for
from outrider_server.embedded.binaries import Binaries, find_binaries, reachable_binaries
from outrider_server.embedded.defaults import DEFAULT_SETTINGS, RESERVED_SETTINGS
from outrider_server.embedded.errors import (
    PortTaken,
    SettingRefused,
    StartFailed,
    StillRunning,
    explain_os_error,
    explain_output,
)
from outrider_server.embedded.processes import end_leftovers, read_pid_file
from outrider_server.embedded.state import StateFolder

HOST = "127.0.0.1"
SUPERUSER = "outrider"
DATABASE = "outrider"

# Below the range from which systems take the ports of outgoing connections (32768 up on Linux, 49152 up on macOS):
# in that range our own deliveries could take the port while Postgres restarts.
_PORTS = range(15_000, 32_000)
_PORT_ATTEMPTS = 50
_POLL_SECONDS = 0.01
_RETRY_SECONDS = 0.2
_INITDB_SECONDS = 180.0
_QUIT_SECONDS = 10.0  # an immediate shutdown ends stubborn backends itself after 5 s
_OUTPUT_BYTES_MAX = 64 << 10
_SSL_REQUEST = (8).to_bytes(4, "big") + (80877103).to_bytes(4, "big")


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where the running server is found, and as whom. The password stays out of the text form."""

    port: int
    socket_folder: Path
    user: str
    password: str = field(repr=False)
    database: str
    version: str

    @property
    def dsn(self) -> str:
        """Over the unix socket: quicker than TCP, and reachable by our own account only."""
        host = quote(str(self.socket_folder), safe="/")
        return f"postgresql://{self._credentials}@/{self.database}?host={host}&port={self.port}"

    @property
    def tcp_dsn(self) -> str:
        return f"postgresql://{self._credentials}@{HOST}:{self.port}/{self.database}"

    @property
    def _credentials(self) -> str:
        return f"{quote(self.user, safe='')}:{quote(self.password, safe='')}"


def free_port(chance: random.Random | None = None) -> int:
    """A port that nobody listens on at this moment. Postgres cannot choose one itself."""
    draw = chance or random.SystemRandom()
    for _ in range(_PORT_ATTEMPTS):
        port = draw.choice(_PORTS)
        if port_is_free(port):
            return port
    raise PortTaken(
        f"None of {_PORT_ATTEMPTS} ports tried on {HOST} is free: configure a port for Postgres."
    )


def port_is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As Postgres does: connections of an earlier server that linger do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


class EmbeddedPostgres:
    """One Postgres server in one state folder.

    `start` and `stop` may be called from any thread, also from one that ends right afterwards; `stop` also ends a
    `start` that is still waiting. `settings` are Postgres settings by name, over DEFAULT_SETTINGS; they go on the
    command line, so they win over ALTER SYSTEM. `user` is whom Postgres runs as when we are root.
    """

    def __init__(
        self,
        state_folder: Path,
        *,
        bin_folder: Path | None = None,
        port: int | None = None,
        settings: Mapping[str, str] | None = None,
        user: int | str = UNPRIVILEGED,
        start_seconds: float = 300.0,  # crash recovery of 4 GB of WAL takes minutes on a slow disk
        stop_seconds: float = 30.0,
        log_bytes_max: int = 10 << 20,
        find: Callable[[Path | None], Binaries] = find_binaries,
        choose_port: Callable[[], int] = free_port,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        new_password: Callable[[], str] = lambda: secrets.token_urlsafe(24),
    ) -> None:
        if reserved := RESERVED_SETTINGS & set(settings or {}):
            raise SettingRefused(
                f"The Postgres setting {min(reserved)} is set by the launcher: remove it from the configuration."
            )
        self._settings = {**DEFAULT_SETTINGS, **(settings or {})}
        self._state_folder = state_folder
        self._bin_folder = bin_folder
        self._fixed_port = port
        self._user = user
        self._start_seconds = start_seconds
        self._stop_seconds = stop_seconds
        self._log_bytes_max = log_bytes_max
        self._find = find
        self._choose_port = choose_port
        self._monotonic = monotonic
        self._sleep = sleep
        self._new_password = new_password

        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._state: StateFolder | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._pid: int | None = None
        self._address: ServerAddress | None = None

    @property
    def address(self) -> ServerAddress | None:
        """Of the last start; stays the same over a restart."""
        return self._address

    @property
    def pid(self) -> int | None:
        """The postmaster's process id of the last start."""
        return self._pid

    @property
    def log(self) -> Path:
        return StateFolder(self._state_folder).log

    @property
    def returncode(self) -> int | None:
        """None while the server runs; else how it ended, -9 for SIGKILL and so on, as subprocess has it."""
        return None if self._guard is None else self._guard.poll()

    @property
    def running(self) -> bool:
        return self._guard is not None and self._guard.poll() is None

    def wait(self, timeout_seconds: float | None = None) -> int | None:
        """Wait for the server's end, wanted or not, and say how it ended; None when it outlasts the timeout."""
        running = self._guard
        if running is None:
            return None
        try:
            return running.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return None

    def start(self) -> ServerAddress:
        """Start the server, or say where it is if it runs. After its death this is also the restart."""
        with self._lock:
            self._stopping.clear()
            return self._start()

    def stop(self) -> None:
        """End the server, after the limit without its closing work: then the next start recovers."""
        self._stopping.set()
        with self._lock:
            self._stop()

    def restart(self) -> ServerAddress:
        """Stop what still runs and start again at the same address."""
        with self._lock:
            self._stopping.clear()
            self._end_guard()
            return self._start()

    def __enter__(self) -> ServerAddress:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> ServerAddress:
        if self.running and self._address is not None:
            return self._address
        try:
            if self._state is None:
                state = StateFolder(self._state_folder)
                state.open()
                self._state = state
            self._address = self._start_in(self._state)
        except OSError as error:
            self._stop()
            raise explain_os_error(error, self._state_folder) from error
        except BaseException:
            self._stop()  # an interrupted start leaves neither a server nor a lock
            raise
        return self._address

    def _start_in(self, state: StateFolder) -> ServerAddress:
        account = account_for(self._user, state.data)
        self._end_leftovers(state)
        found = self._find(self._bin_folder)
        existing = state.has_data(found.major)
        state.admit(account)
        binaries = reachable_binaries(found, account, state.copies)
        socket_folder = state.socket_folder(account)
        if not existing:
            self._create(state, binaries, account, socket_folder)
        password = state.password()

        def launch(port: int) -> ServerAddress:
            deadline = self._monotonic() + self._stop_seconds
            while True:
                try:
                    self._launch(state, binaries, account, socket_folder, port)
                    break
                except StillRunning:
                    # Backends of a killed postmaster that we could not see end by themselves, soon.
                    if self._monotonic() > deadline:
                        raise
                    self._sleep(_RETRY_SECONDS)
            return ServerAddress(port, socket_folder, SUPERUSER, password, DATABASE, found.version)

        if self._fixed_port is not None:
            return launch(self._fixed_port)
        if self._address is not None and self._address.port:
            return launch(
                self._address.port
            )  # whoever holds the address must find the server again
        for _ in range(2):
            with contextlib.suppress(PortTaken):  # taken between the look and the start
                return launch(self._choose_port())
        return launch(self._choose_port())

    def _create(
        self, state: StateFolder, binaries: Binaries, account: Account, scratch: Path
    ) -> None:
        password = self._new_password()
        staging = state.staging(account)
        password_file = scratch / "initial-password"  # the account must read it; gone again below
        password_file.touch(0o600)
        password_file.write_text(password)
        account.give(password_file)
        # Checksums tell a rotten page from a good one; the C locale needs no library and sorts by bytes.
        options = ["--data-checksums", "--encoding=UTF8", "--locale=C", "--auth=scram-sha-256"]
        if self._settings["fsync"] != "on":
            options.append("--no-sync")
        who = [f"--username={SUPERUSER}", f"--pwfile={password_file}"]
        try:
            self._run([str(binaries.initdb), "-D", str(staging), *options, *who], state, account)
        finally:
            password_file.unlink(missing_ok=True)
        fsync = ["-c", f"fsync={self._settings['fsync']}"]
        said = self._run(
            [str(binaries.postgres), "--single", "-D", str(staging), *fsync, "template1"],
            state,
            account,
            given=f"CREATE DATABASE {DATABASE}\n",
        )
        if "ERROR:" in said:  # single-user mode ends well whatever happened
            raise explain_output(said, state.folder, None, state.log)
        state.adopt(staging, password)

    def _run(
        self, command: Sequence[str], state: StateFolder, account: Account, given: str = ""
    ) -> str:
        """Run one of the programs to its end as the account, and say what it said."""
        try:
            ran = subprocess.run(  # noqa: S603 - programs of the found folder, no shell
                command,
                input=given,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd="/",
                env=_environment(),
                umask=0o077,
                timeout=_INITDB_SECONDS,
                start_new_session=True,  # Ctrl-C is ours to handle
                check=False,
                user=account.uid if account.drops else None,
                group=account.gid if account.drops else None,
                extra_groups=[] if account.drops else None,
            )
        except subprocess.TimeoutExpired as error:
            raise StartFailed(
                f"{command[0]} did not end within {_INITDB_SECONDS:.0f} s: look at the disk under {state.folder}."
            ) from error
        if ran.returncode != 0:
            state.log.write_text(ran.stdout)
            raise explain_output(ran.stdout, state.folder, None, state.log)
        return ran.stdout

    def _launch(
        self,
        state: StateFolder,
        binaries: Binaries,
        account: Account,
        socket_folder: Path,
        port: int,
    ) -> None:
        """Start the guard, which starts Postgres, and return when it answers."""
        settings = {
            **self._settings,
            "listen_addresses": HOST,
            "port": str(port),
            "unix_socket_directories": str(socket_folder),
        }
        self._close_guard()
        log = os.open(state.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        begin = os.fstat(log).st_size
        uid, gid = (account.uid, account.gid) if account.drops else (-1, -1)
        try:
            self._guard = subprocess.Popen(  # noqa: S603 - ourselves, no shell
                [sys.executable, "-I", "-S", guard.__file__]
                + [str(number) for number in (os.getpid(), uid, gid, self._log_bytes_max)]
                + [str(self._stop_seconds), str(state.log), str(binaries.postgres)]
                + ["-D", str(state.data)]
                + [part for name, value in settings.items() for part in ("-c", f"{name}={value}")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd="/",
                env=_environment(),
                start_new_session=True,  # a Ctrl-C in the terminal must not end the database under our feet
            )
        finally:
            os.close(log)
        deadline = self._monotonic() + self._start_seconds
        told = self._guard.stdout.readline() if self._guard.stdout else b""
        self._pid = int(told) if told.strip().isdigit() else None
        while not self._answers(state, socket_folder, port):
            if self._guard.poll() is not None:
                raise explain_output(_tail(state.log, begin), state.folder, port, state.log)
            if self._stopping.is_set():
                raise StartFailed("The start of Postgres was interrupted: start again when wanted.")
            if self._monotonic() > deadline:
                raise StartFailed(
                    f"Postgres did not become ready within {self._start_seconds:.0f} s:"
                    f" look into {state.log}, or allow it more time."
                )
            self._sleep(_POLL_SECONDS)

    def _answers(self, state: StateFolder, socket_folder: Path, port: int) -> bool:
        """Ready by its own word, then asked: the greeting is answered by a process made for this connection."""
        file = read_pid_file(state.data)
        if file is None or file.pid != self._pid or file.status != "ready":
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(5.0)
                probe.connect(str(socket_folder / f".s.PGSQL.{port}"))
                probe.sendall(_SSL_REQUEST)
                return probe.recv(1) in (b"N", b"S")
        except OSError:
            return False

    def _stop(self) -> None:
        self._end_guard()
        if self._state is None:
            return
        state, self._state = self._state, None
        try:
            if self._guard is not None:  # was it killed, the server may still be there
                self._end_leftovers(state)
        finally:
            state.close()

    def _end_leftovers(self, state: StateFolder) -> None:
        end_leftovers(
            state.data,
            fast_seconds=self._stop_seconds,
            monotonic=self._monotonic,
            sleep=self._sleep,
        )

    def _end_guard(self) -> None:
        if self._guard is None:
            return
        for order, limit in ((b"I", self._stop_seconds), (b"Q", _QUIT_SECONDS), (b"K", None)):
            try:
                if self._guard.stdin is not None and self._guard.poll() is None:
                    self._guard.stdin.write(order)
                    self._guard.stdin.flush()
                self._guard.wait(limit)
                break
            except BrokenPipeError:
                self._guard.wait()
                break
            except subprocess.TimeoutExpired:
                continue
        self._close_guard()

    def _close_guard(self) -> None:
        """Give back the pipes of a guard that has ended; its return code stays readable."""
        if self._guard is not None:
            for pipe in (self._guard.stdin, self._guard.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()


def _environment() -> dict[str, str]:
    """What Postgres needs of ours: nothing that could change where it listens or how it speaks."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}


def _tail(log: Path, begin: int) -> str:
    """What was logged since `begin`, its last part if long."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        since = begin if begin <= size else 0  # the guard may have shortened the log meanwhile
        file.seek(max(since, size - _OUTPUT_BYTES_MAX))
        return file.read().decode(errors="replace")
