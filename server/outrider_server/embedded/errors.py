"""What can keep the embedded Postgres from running. Each message is one sentence that ends with what to do.

EmbeddedPostgresError
|-- BinariesNotFound     no usable folder of Postgres programs
|-- StateFolderUnusable  cannot be made, written, or reached by the account Postgres runs as
|-- AccountUnusable      Postgres cannot run as the user it should run as
|-- StateFolderInUse     another launcher holds it
|-- DataFolderForeign    holds something that is not Postgres data
|-- DataFolderVersion    made by another major version
|-- DataFolderOwner      belongs to an account we cannot run as
|-- PasswordMissing      data without its password file
|-- PortTaken            somebody else listens there
|-- DiskFull             no room left
|-- DiskReadOnly         cannot be written at all
|-- SettingRefused       Postgres does not accept a configured setting
|-- StillRunning         a left-over server that would not end
`-- StartFailed          anything else, with Postgres' own words and its log
"""

from __future__ import annotations

import errno
import re
from pathlib import Path


class EmbeddedPostgresError(Exception):
    """Base of all of them; the message is meant for the person who starts the service."""


class BinariesNotFound(EmbeddedPostgresError):
    """No usable folder of Postgres programs."""


class StateFolderUnusable(EmbeddedPostgresError):
    """The state folder cannot be made, written or reached."""


class AccountUnusable(EmbeddedPostgresError):
    """Postgres cannot run as the user it should run as."""


class StateFolderInUse(EmbeddedPostgresError):
    """Another launcher holds the state folder."""


class DataFolderForeign(EmbeddedPostgresError):
    """The data folder holds something that is not Postgres data."""


class DataFolderVersion(EmbeddedPostgresError):
    """The data folder was made by another major version."""


class DataFolderOwner(EmbeddedPostgresError):
    """The data folder belongs to an account we cannot run as."""


class PasswordMissing(EmbeddedPostgresError):
    """The data folder is there, its password file is not."""


class PortTaken(EmbeddedPostgresError):
    """Somebody else listens on the port."""


class DiskFull(EmbeddedPostgresError):
    """No room is left on the disk."""


class DiskReadOnly(EmbeddedPostgresError):
    """The disk cannot be written."""


class SettingRefused(EmbeddedPostgresError):
    """Postgres does not accept a configured setting."""


class StillRunning(EmbeddedPostgresError):
    """A left-over server would not end."""


class StartFailed(EmbeddedPostgresError):
    """Postgres did not start, for a reason only its log knows."""


_FATAL = re.compile(r"(?:FATAL|PANIC|ERROR): +(.+)|(?:initdb|postgres): error: (.+)")
_SETTING = re.compile(
    r"unrecognized configuration parameter|(?:invalid value|requires a .+ value).*parameter"
    r"|parameter .+ (?:requires|cannot|must)|outside the valid range for parameter|WAL streaming .+ requires"
)


def explain_output(output: str, state: Path, port: int | None, log: Path) -> EmbeddedPostgresError:
    """Turn what initdb or postgres printed (in the C locale) into the error a person can act on."""
    fatal = [first or second for first, second in _FATAL.findall(output)]
    said = (
        fatal[0] if fatal else output.strip().splitlines()[-1] if output.strip() else ""
    ).rstrip(".")
    # The disk comes first: a full disk shows up as all kinds of other failures further down the log.
    if "No space left on device" in output or "Disk quota exceeded" in output:
        return disk_full(state)
    if "Read-only file system" in output:
        return disk_read_only(state)
    if "Address already in use" in output:
        return port_taken(port)
    if unknown := re.search(r"could not look up effective user ID (\d+)", output):
        return account_unknown(unknown[1])
    if "pre-existing shared memory block" in output:
        return still_running(state)
    if _SETTING.search(output):
        return SettingRefused(
            f"Postgres refuses a setting ({said}): correct it in the configuration."
        )
    reason = f" ({said})" if said else ""
    return StartFailed(f"Postgres did not start{reason}: look into {log} for the cause.")


def explain_os_error(error: OSError, state: Path) -> EmbeddedPostgresError:
    """The same for what the operating system answered to ourselves."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(state)
    if error.errno == errno.EROFS:
        return disk_read_only(state)
    where = error.filename or state
    return StateFolderUnusable(
        f"The state folder {state} cannot be used ({error.strerror or error}: {where}):"
        " make it writable for this user, or choose another state folder."
    )


def disk_full(state: Path) -> DiskFull:
    return DiskFull(
        f"The disk under {state} is full: free some space, or choose a state folder on another disk."
    )


def disk_read_only(state: Path) -> DiskReadOnly:
    return DiskReadOnly(
        f"The disk under {state} is read-only: mount it writable, or choose a state folder elsewhere."
    )


def account_unknown(user: int | str) -> AccountUnusable:
    return AccountUnusable(
        f"User {user} is not in the user table, where Postgres looks itself up:"
        " add it there, or run Postgres as a user that is."
    )


def still_running(where: Path) -> StillRunning:
    return StillRunning(
        f"An earlier Postgres still works in {where} and does not end:"
        " end its processes, or restart the machine."
    )


def port_taken(port: int | None) -> PortTaken:
    return PortTaken(
        f"Port {port} on 127.0.0.1 is taken: stop what listens there, or configure another port for Postgres."
    )
