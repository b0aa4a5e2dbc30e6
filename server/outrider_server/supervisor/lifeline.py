"""The line between a supervisor and one worker: a pair of connected sockets, an end in each process.

Its end-of-file is what tells a worker that its supervisor is gone, however that happened, on every system. The worker
says two things over it: that it is ready, and why it cannot start. Nothing is ever sent to a worker; it is told by signals.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable

READY = b"ready"
REFUSED = b"refused "
SENTENCE_CHARACTERS_MAX = 2_000
_BYTES_MAX = 16 * 1024
GONE_STATUS = 70


class WorkerEnd:
    """A worker's end. `descriptor` is the number under which it was inherited."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        # A process that the worker starts has nothing to do with it.
        self._socket.set_inheritable(False)
        self._socket.settimeout(None)

    def tell_ready(self) -> None:
        """This worker takes work."""
        self._tell(READY)

    def tell_refused(self, sentence: str) -> None:
        """This worker ends because of something a person can cure."""
        words = " ".join(sentence.split())[:SENTENCE_CHARACTERS_MAX]
        self._tell(REFUSED + words.encode(errors="replace"))

    def watch(self, gone: Callable[[], None], grace_seconds: float) -> None:
        """Call `gone`, in a thread of its own, when the supervisor is gone, and end this process so many seconds later.

        In a thread, so that a loop that hangs ends, too.
        """

        def wait() -> None:
            with contextlib.suppress(OSError):
                while self._socket.recv(64):
                    pass
            gone()
            time.sleep(grace_seconds)
            os._exit(GONE_STATUS)

        threading.Thread(target=wait, name="lifeline", daemon=True).start()

    def _tell(self, line: bytes) -> None:
        # Without waiting: a supervisor that is stopped must not hold up its workers. That one is gone, `watch` tells.
        with contextlib.suppress(OSError):
            self._socket.send(line + b"\n", socket.MSG_DONTWAIT)


class SupervisorEnd:
    """The supervisor's end for one life of a worker. `inherited` goes to the worker; close it here after its start."""

    def __init__(self) -> None:
        self._socket, self.inherited = socket.socketpair()
        self._socket.settimeout(0)
        self._said = b""
        self.ready = False
        self.refusal: str | None = None

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> bool:
        """Take in what the worker has said; false when it will say nothing more."""
        while True:
            try:
                said = self._socket.recv(4096)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not said:
                return False
            *lines, self._said = (self._said + said).split(b"\n")
            self._said = self._said[:_BYTES_MAX]
            for line in lines:
                self._heard(line)

    def close(self) -> None:
        self._socket.close()
        self.inherited.close()

    def _heard(self, line: bytes) -> None:
        if line == READY:
            self.ready = True
        elif line.startswith(REFUSED):
            self.refusal = line.removeprefix(REFUSED).decode(errors="replace")
