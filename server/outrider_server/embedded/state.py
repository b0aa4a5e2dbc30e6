"""The state folder: what lies where, and that one launcher at a time uses it.

<state>/postgres/           the data, owned by the account Postgres runs as
<state>/postgres.password   the superuser's password, readable by us alone
<state>/postgres.log        what Postgres says; postgres.log.1 is the part before it
<state>/postgres.lock       locked by the launcher that uses the folder, with its process id
<state>/postgres.run/       the unix socket, unless its path would be too long
<state>/postgres.binaries/  a copy of the programs, where the account cannot reach the originals
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from outrider_server.embedded.account import Account, private_parent
from outrider_server.embedded.errors import (
    DataFolderForeign,
    DataFolderVersion,
    PasswordMissing,
    StateFolderInUse,
    StateFolderUnusable,
)

# sockaddr_un holds 108 bytes on Linux and 104 on macOS, one of them the closing zero.
SOCKET_PATH_BYTES_MAX = 107 if sys.platform == "linux" else 103


class StateFolder:
    """One state folder, locked from `open` to `close`. It decides on names and rights and starts nothing."""

    def __init__(self, folder: Path) -> None:
        # Neither links nor the working folder may change what the name means later.
        self.folder = folder.resolve()
        self.data = self.folder / "postgres"
        self.log = self.folder / "postgres.log"
        self.copies = self.folder / "postgres.binaries"
        self._password = self.folder / "postgres.password"
        self._lock = self.folder / "postgres.lock"
        self._lock_descriptor: int | None = None

    def open(self) -> None:
        """Make the folder if need be, and lock it against other launchers."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip()
            os.close(descriptor)
            raise StateFolderInUse(
                f"The state folder {self.folder} is in use by process {holder or 'unknown'}:"
                " stop that one, or choose another state folder."
            ) from None
        self._lock_descriptor = descriptor
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)

    def close(self) -> None:
        """Let another launcher in. The file stays: removing it would let two lock two files of one name."""
        if self._lock_descriptor is not None:
            os.close(self._lock_descriptor)
            self._lock_descriptor = None

    def admit(self, account: Account) -> None:
        """Let the account pass this folder, without reading it; what lies on the way here is not ours to open."""
        if not account.drops:
            return
        if (
            self.folder.stat().st_uid == os.geteuid()
            and private_parent(self.folder, account) == self.folder
        ):
            os.chown(self.folder, -1, account.gid)
            self.folder.chmod(self.folder.stat().st_mode & 0o7777 | 0o010)
        blocked = private_parent(self.folder, account)
        if blocked is not None:
            raise StateFolderUnusable(
                f"Postgres does not run as root, and user {account.uid} cannot pass {blocked}: choose a state"
                f" folder outside of it, for example /var/lib/outrider, or start as an ordinary user."
            )

    def has_data(self, major: int) -> bool:
        """Whether there is a data folder of this major version; False when there is none or an empty one."""
        if not self.data.exists() or (self.data.is_dir() and not any(self.data.iterdir())):
            return False
        try:
            made_by = (self.data / "PG_VERSION").read_text().strip()
        except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
            raise DataFolderForeign(
                f"{self.data} holds something that is not Postgres data:"
                " move it away, or choose another state folder."
            ) from None
        if made_by != str(major):
            raise DataFolderVersion(
                f"The data in {self.data} was made by Postgres {made_by} and the programs found are Postgres"
                f" {major}: configure the bin folder of a Postgres {made_by}, or dump the data with it and"
                " load it into a new state folder."
            )
        return True

    def staging(self, account: Account) -> Path:
        """An empty folder to make the data in.

        It takes its final name only when complete, so that being killed halfway leaves nothing that looks like data.
        Its name is new each time: an initdb that outlived us may still be writing into the last one.
        """
        for old in self.folder.glob("postgres.new-*"):
            shutil.rmtree(old, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix="postgres.new-", dir=self.folder))
        account.give(staging)
        return staging

    def adopt(self, staging: Path, password: str) -> None:
        """The new data and its password, both on the disk before the data's name appears."""
        unfinished = self._password.with_suffix(".new")
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(descriptor, password.encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        unfinished.replace(self._password)
        staging.replace(self.data)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def password(self) -> str:
        try:
            password = self._password.read_text().strip()
        except FileNotFoundError:
            password = ""
        if not password:
            raise PasswordMissing(
                f"The password file {self._password} of the data in {self.data} is missing or empty:"
                " put it back, or move the data away to begin with none."
            )
        return password

    def socket_folder(self, account: Account) -> Path:
        """An own folder, empty, for the unix socket: here, or where a path is short enough for a socket."""
        name = f"outrider-{hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:12]}"
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        bases = [] if account.drops or not runtime else [Path(runtime)]
        bases += [Path(tempfile.gettempdir()), Path("/tmp")]  # noqa: S108 - see below
        for folder in [self.folder / "postgres.run", *(base / name for base in bases)]:
            longest = len(os.fsencode(folder / ".s.PGSQL.65535"))
            if longest > SOCKET_PATH_BYTES_MAX:
                continue
            if account.drops and private_parent(folder.parent, account) is not None:
                continue
            try:
                folder.mkdir(mode=0o700)
                account.give(folder)
            except FileExistsError:
                if folder.parent == self.folder and folder.is_dir() and not folder.is_symlink():
                    account.give(
                        folder
                    )  # made for another account that the data never came to have
            # In a shared folder anybody may have made that name before us, to see our connections.
            found = folder.lstat()
            if not folder.is_dir() or folder.is_symlink() or found.st_uid != account.uid:
                raise StateFolderUnusable(
                    f"{folder} for the unix socket belongs to somebody else:"
                    " remove it, or choose another state folder."
                )
            folder.chmod(0o700)
            for left in folder.iterdir():  # nobody runs: left by a server that was killed
                left.unlink()
            return folder
        raise StateFolderUnusable(
            f"No folder was found whose path is short enough for a unix socket, {self.folder} included:"
            " choose a state folder with a shorter path."
        )
