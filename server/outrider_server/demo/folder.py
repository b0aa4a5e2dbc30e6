"""The demo's folder: where it is, who uses it, and what it keeps beside the database's files.

<folder>/demo.json   keys, the receiver's port and the endpoints' secrets, readable by their owner alone
<folder>/demo.lock   locked by the demo that runs, with its process id
<folder>/demo.log    what the node says, see `demo.logs`

Rule: a folder that was asked for is used or refused, never replaced; only the default one gives way to another.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from outrider_server.demo.errors import DemoError
from outrider_server.embedded.errors import explain_os_error

OTHER_FOLDERS = (Path("/var/lib/outrider-demo"), Path(tempfile.gettempdir()) / "outrider-demo")
"""Where the demo goes when the database, which does not run as root, could not reach the default folder."""

_KEPT_BYTES_MAX = 64 * 1024


@dataclass(frozen=True, slots=True)
class Choice:
    """The folder to use. `blocked_by`: the private folder that kept the default one from being it."""

    folder: Path
    blocked_by: Path | None = None


def choose_folder(
    default: Path,
    obstacle: Callable[[Path], Path | None],
    others: Sequence[Path] = OTHER_FOLDERS,
) -> Choice:
    """`default`, unless `obstacle` names a folder in its way; then the first of `others` that will do."""
    blocked_by = obstacle(default)
    if blocked_by is None:
        return Choice(default)
    for folder in others:
        if obstacle(folder) is None and _is_ours_or_can_be(folder):
            return Choice(folder, blocked_by)
    raise DemoError(
        f"Postgres does not run as root and cannot pass {blocked_by}, and no other folder was found: name one that"
        " every user can reach with --state-folder."
    )


def _is_ours_or_can_be(folder: Path) -> bool:
    try:
        # Not through a link: in a shared folder anybody may have made that name before us.
        found = folder.lstat()
    except FileNotFoundError:
        return os.access(folder.parent, os.W_OK)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Make the folder if need be, and keep other demos out of it for the length of the block."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / "demo.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise explain_os_error(error, folder) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode(errors="replace").strip()
        os.close(descriptor)
        raise DemoError(
            f"A demo runs in {folder} already, as process {holder or 'unknown'}:"
            " stop that one, or choose another folder with --state-folder."
        ) from None
    except OSError as error:
        os.close(descriptor)
        raise explain_os_error(error, folder) from error
    try:
        yield
    finally:
        os.close(descriptor)


@dataclass(slots=True)
class Kept:
    """What one run of the demo leaves to the next. `secrets` are those of the endpoints, by name."""

    admin_key: str = field(default="", repr=False)
    integration_key: str = field(default="", repr=False)
    publisher_key: str = field(default="", repr=False)
    receiver_port: int = 0
    secrets: dict[str, str] = field(default_factory=dict, repr=False)


def load_kept(folder: Path) -> Kept:
    """What the last run kept; nothing where there was none, or what is there is of no use: it is made anew."""
    try:
        with (folder / "demo.json").open("rb") as file:
            value = json.loads(file.read(_KEPT_BYTES_MAX))
    except FileNotFoundError:
        return Kept()
    except OSError as error:
        raise explain_os_error(error, folder) from error
    except ValueError:
        return Kept()
    kept = Kept()
    if isinstance(value, dict):
        for name in ("admin_key", "integration_key", "publisher_key"):
            if isinstance(text := value.get(name), str):
                setattr(kept, name, text)
        port = value.get("receiver_port")
        if isinstance(port, int) and 0 < port < 65_536:
            kept.receiver_port = port
        secrets = value.get("secrets")
        if isinstance(secrets, dict):
            kept.secrets = {k: v for k, v in secrets.items() if isinstance(v, str)}
    return kept


def save_kept(folder: Path, kept: Kept) -> None:
    """Write it in one step, so that being killed leaves the old or the new."""
    unfinished = folder / "demo.json.new"
    try:
        unfinished.unlink(missing_ok=True)
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(kept), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(folder / "demo.json")
    except OSError as error:
        raise explain_os_error(error, folder) from error


def bytes_used(folder: Path) -> int:
    """Bytes on disk of everything below the folder. Files that come and go meanwhile do no harm."""
    used = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                used += os.lstat(os.path.join(parent, name)).st_blocks * 512  # noqa: PTH118 - thousands of files
    return used
