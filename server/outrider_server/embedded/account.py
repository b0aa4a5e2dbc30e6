"""Whom Postgres runs as. It refuses to run as root, so root hands it to an account without rights.

Only the child changes its user; nothing on the system does. A folder that is private to root cannot be passed by
that account, and we never open a folder that is not ours: `obstacle` names it, for a sentence or a choice.
"""

from __future__ import annotations

import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

from outrider_server.embedded.errors import AccountUnusable, DataFolderOwner, account_unknown

UNPRIVILEGED = 65534  # "nobody" nearly everywhere


@dataclass(frozen=True, slots=True)
class Account:
    """The user and group of the Postgres processes; `drops` when they differ from ours."""

    uid: int
    gid: int
    drops: bool

    def give(self, path: Path) -> None:
        """Make `path` (one file or empty folder that we made) this account's."""
        if self.drops:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)


def account_for(user: int | str, data: Path) -> Account:
    """Who Postgres runs as: we ourselves, or, for root, the data's owner, else the configured `user`."""
    if os.geteuid() != 0:
        if data.exists() and (owner := data.stat().st_uid) != os.geteuid():
            raise DataFolderOwner(
                f"The data folder {data} belongs to user {owner}: run as that user or as root,"
                " or choose another state folder."
            )
        return Account(os.geteuid(), os.getegid(), drops=False)
    if (data / "PG_VERSION").is_file():
        # Data that an ordinary user made stays usable for that user.
        found = data.stat()
        if found.st_uid == 0:
            raise DataFolderOwner(
                f"The data folder {data} belongs to root, as whom Postgres will not run:"
                f" run chown -R {user} {data} and start again."
            )
        return Account(found.st_uid, found.st_gid, drops=True)
    return _account_named(user)


def _account_named(user: int | str) -> Account:
    try:
        found = pwd.getpwuid(user) if isinstance(user, int) else pwd.getpwnam(user)
    except KeyError:
        if user != UNPRIVILEGED:
            raise account_unknown(user) from None
        return _account_named("nobody")  # some systems give that name another number
    if found.pw_uid == 0:
        raise AccountUnusable(
            "Postgres will not run as root: configure an ordinary user to run it as."
        )
    return Account(found.pw_uid, found.pw_gid, drops=True)


def private_parent(path: Path, account: Account) -> Path | None:
    """The first folder on the way to `path`, itself included, that `account` cannot pass; None when it can reach it.

    Reads permission bits only. An access list that grants more is not seen, which errs on the safe side.
    """
    resolved = path.resolve()
    for folder in [*reversed(resolved.parents), resolved]:
        if not _permits(folder, account, 0o1):
            return folder
    return None


def obstacle(state_folder: Path, user: int | str = UNPRIVILEGED) -> Path | None:
    """The private folder that keeps a state folder here from working, if we are root; None when all is well."""
    if os.geteuid() != 0:
        return None
    return private_parent(state_folder.resolve().parent, _account_named(user))


def readable(path: Path, account: Account) -> bool:
    return private_parent(path.parent, account) is None and _permits(path, account, 0o4)


def _permits(path: Path, account: Account, wanted: int) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return True  # not there yet: whoever makes it decides
    except PermissionError:
        return False
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid == account.uid:
        return bool(mode >> 6 & wanted)
    if found.st_gid == account.gid:
        return bool(mode >> 3 & wanted)
    return bool(mode & wanted)
