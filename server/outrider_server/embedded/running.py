"""Finds the Postgres that another process runs in a state folder, for a command beside a server. Starts and ends nothing.

Who may read the folder's password file may use the database: there is no other check, and none is needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from outrider_server.embedded.errors import StartFailed, explain_os_error
from outrider_server.embedded.launcher import DATABASE, SUPERUSER, ServerAddress
from outrider_server.embedded.processes import read_pid_file, serves
from outrider_server.embedded.state import StateFolder

WAIT_SECONDS_MAX = 30.0
"""A new database is made, and a small log is recovered from, in less."""

_POLL_SECONDS = 0.05


def find_running(
    state_folder: Path,
    *,
    wait_seconds_max: float = WAIT_SECONDS_MAX,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> ServerAddress:
    """Where the Postgres in `state_folder` is reached; waits while it starts.

    For a folder whose lock somebody else holds. Raises StartFailed where its Postgres does not become ready in time.
    """
    state = StateFolder(state_folder)
    deadline = monotonic() + wait_seconds_max
    try:
        while True:
            file = read_pid_file(state.data)
            if file is not None and file.status == "ready" and serves(file.pid, state.data):
                version = (state.data / "PG_VERSION").read_text().strip()
                return ServerAddress(
                    file.port,
                    Path(file.socket_folder),
                    SUPERUSER,
                    state.password(),
                    DATABASE,
                    version,
                )
            if monotonic() > deadline:
                raise StartFailed(
                    f"Another process uses the state folder {state.folder} and its Postgres was not ready within"
                    f" {wait_seconds_max:g} s: look into {state.log}, or try again when that process serves or has ended."
                )
            sleep(_POLL_SECONDS)
    except OSError as error:
        raise explain_os_error(error, state.folder) from error
