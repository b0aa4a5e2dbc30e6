"""The demo's log file: the node's lines go there, so that the screen is free for the figures; bounded in size."""

from __future__ import annotations

import io
from pathlib import Path

from typing_extensions import override

LOG_BYTES_MAX = 8 * 1024 * 1024


class BoundedLog(io.TextIOBase):
    """A text file that begins anew at each start and is set aside as `<name>.1` when it is full."""

    def __init__(self, path: Path, bytes_max: int = LOG_BYTES_MAX) -> None:
        self._path = path
        self._bytes_max = bytes_max
        self._written = 0
        self._file = path.open("w", encoding="utf-8")

    @override
    def write(self, text: str) -> int:
        if self._written >= self._bytes_max:
            self._file.close()
            self._path.replace(self._path.with_name(self._path.name + ".1"))
            self._file = self._path.open("w", encoding="utf-8")
            self._written = 0
        self._written += len(text.encode())
        return self._file.write(text)

    @override
    def flush(self) -> None:
        self._file.flush()

    @override
    def isatty(self) -> bool:
        return False

    @override
    def close(self) -> None:
        super().close()  # flushes, so it comes first
        self._file.close()
