"""A publisher's frames on disk, so that they outlive its process.

    <folder>/lock                            held while a process uses the spool
    <folder>/acked                           how far the server has acknowledged (an economy, not needed for safety)
    <folder>/<session>-<segment>.frames      a header, then one record a frame: length, checksum, number, events, message

Rules: a frame is appended before it is sent and belongs for ever to the session and number it was appended with. Each
life of the spool numbers its new frames in a new session, and sends what earlier lives left in theirs: so a number can
never come to mean another frame, even if a crash of the machine took the last records. Segments are removed when every
frame in them is acknowledged. A torn record at a session's end is what a crash leaves and is passed over; one in the
middle is damage and is told.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from outrider._frames import EVENT_BYTES_MAX, Frame, Place, resumed_frame
from outrider.errors import SpoolError, SpoolLocked

Fsync = Literal["always", "never"]

BYTES_MIN = 64 * 1024 * 1024
_MAGIC = b"ORSPOOL1"
_HEADER = struct.Struct("<8sQQI")  # magic, session, void up to this session, checksum
_RECORD = struct.Struct("<IIQI")  # message bytes, checksum, number, events
_ACKED = struct.Struct("<QQI")  # session, number, checksum
_MESSAGE_BYTES_MAX = EVENT_BYTES_MAX + 1024 * 1024


class Spool:
    """Frames in append-only segment files under `folder`, at most `bytes_max` on disk.

    `fsync="always"`: a frame is flushed before it is sent, so not even a crash of the machine loses it. `"never"`
    leaves that to the system: a crash of the process loses nothing, one of the machine may lose the last seconds.

    Made open; `close` gives it free. Not for several threads at once, except `flush`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        bytes_max: int = 1024 * 1024 * 1024,
        events_max: int = 1_000_000,
        fsync: Fsync = "always",
    ) -> None:
        if bytes_max < BYTES_MIN:
            raise ValueError(f"bytes_max is at least {BYTES_MIN}")
        if events_max < 1:
            raise ValueError("events_max is at least 1")
        self.folder = Path(folder)
        self.bytes_max = bytes_max
        self.events_max = events_max
        self.fsync: Fsync = fsync
        # Small enough that acknowledged segments free their room early, whatever the bound is.
        self._segment_bytes_max = min(16 * 1024 * 1024, bytes_max // 8)
        # What is acknowledged but not yet removed: up to a segment at each end, each longer by up to a frame.
        self.unanswered_bytes_max = bytes_max - 2 * (self._segment_bytes_max + _MESSAGE_BYTES_MAX)
        self._segments: dict[int, _Segment] = {}
        self._active: _Segment | None = None
        self._session = 0
        self._void = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SpoolError(f"the spool in {self.folder} cannot be opened: {error}") from error
        try:
            self._take_lock()
            self._acked_file = os.open(
                self.folder / "acked", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
            try:
                self._acked = self._read_acked()
                self.resumed: list[Frame] = self._load()
            except BaseException:
                os.close(self._acked_file)
                raise
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(segment.size for segment in self._segments.values())

    @property
    def session_min(self) -> int:
        """The lowest session that new frames may have."""
        return max(self._session, self._acked[0]) + 1

    def append(self, frame: Frame) -> None:
        """Write a sealed frame behind the others. It survives this process when this returns."""
        assert frame.message is not None, "a sealed frame has its message"
        try:
            frame.place = self._append(frame.session, frame.number, frame.events, frame.message)
        except OSError as error:
            raise _spool_error(self.folder, error) from error

    def flush(self) -> None:
        """Wait until what was appended before is on the disk itself. May be called from another thread."""
        active = self._active
        if active is None:
            return
        try:
            os.fsync(active.file)
        except OSError as error:
            if self._active is not active:
                # Removed meanwhile: every frame in it is acknowledged.
                return
            raise _spool_error(self.folder, error) from error

    def message(self, frame: Frame) -> bytes:
        """The message of a frame that is kept here."""
        assert frame.place is not None, "the frame was appended"
        segment, offset, length, checksum = frame.place
        try:
            message = os.pread(self._segments[segment].file, length, offset)
        except OSError as error:
            raise _spool_error(self.folder, error) from error
        if _checksum(frame.number, frame.events, message) != checksum:
            raise SpoolError(f"frame {frame.number} in {self._segments[segment].path} is damaged")
        return message

    def acknowledged(self, frame: Frame) -> None:
        """A frame is durable at the server: its segment goes with the last of its frames. In order only."""
        assert frame.place is not None, "the frame was appended"
        segment = self._segments[frame.place.segment]
        segment.open_frames -= 1
        self._acked = (frame.session, frame.number)
        try:
            os.pwrite(self._acked_file, _pack_acked(*self._acked), 0)
            # The active one goes, too, once it is worth it: nothing is numbered by what a segment holds.
            if not segment.open_frames and (
                segment is not self._active or segment.size >= self._segment_bytes_max
            ):
                self._remove(segment)
        except OSError as error:
            raise _spool_error(self.folder, error) from error

    def renumber(self, frames: Iterable[Frame], session: int) -> None:
        """Keep `frames`, all that is unanswered, under `session` and numbers from 1 instead of what they had.

        The new segment takes effect by its rename, and its header voids the sessions before: a crash at any point
        leaves the frames once.
        """
        try:
            kept = list(self._segments.values())
            self._void = session - 1
            self._active = self._new_segment(session, ".new")
            for number, frame in enumerate(frames, 1):
                moved = frame.renumber(session, number, self.message(frame))
                frame.place = self._write(self._active, number, frame.events, moved)
            os.fsync(self._active.file)
            final = self._active.path.with_suffix(".frames")
            self._active.path.rename(final)
            self._active.path = final
            self._sync_folder()
            for segment in kept:
                self._remove(segment)
        except OSError as error:
            raise _spool_error(self.folder, error) from error

    def close(self) -> None:
        """Release files and lock. What is not acknowledged stays for the next life."""
        for segment in list(self._segments.values()):
            if segment.open_frames:
                os.close(segment.file)
            else:
                self._remove(segment)
        self._segments.clear()
        self._active = None
        if self._lock >= 0:
            os.close(self._acked_file)
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, session: int, number: int, events: int, message: bytes) -> Place:
        active = self._active
        if active is None or session != self._session or active.size >= self._segment_bytes_max:
            if active is not None:
                # So only a session's last segment can end torn.
                os.fsync(active.file)
            previous, self._active = active, None
            active = self._active = self._new_segment(session, ".frames")
            self._sync_folder()
            if previous is not None and not previous.open_frames:
                self._remove(previous)
        return self._write(active, number, events, message)

    def _write(self, segment: _Segment, number: int, events: int, message: bytes) -> Place:
        checksum = _checksum(number, events, message)
        record = _RECORD.pack(len(message), checksum, number, events)
        total = len(record) + len(message)
        written = os.writev(segment.file, (record, message))
        while written < total:
            written += os.write(segment.file, (record + message)[written:])
        place = Place(segment.index, segment.size + len(record), len(message), checksum)
        segment.size += total
        segment.open_frames += 1
        return place

    def _new_segment(self, session: int, suffix: str) -> _Segment:
        index = max(self._segments, default=0) + 1
        path = self.folder / f"{session:020d}-{index:010d}{suffix}"
        header = _HEADER.pack(
            _MAGIC, session, self._void, zlib.crc32(_header_body(session, self._void))
        )
        file = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        segment = self._segments[index] = _Segment(index, path, file, session)
        os.write(file, header)
        segment.size = len(header)
        self._session = session
        return segment

    def _remove(self, segment: _Segment) -> None:
        os.close(segment.file)
        segment.path.unlink(missing_ok=True)
        del self._segments[segment.index]
        if segment is self._active:
            self._active = None

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SpoolLocked(f"another process uses the spool in {self.folder}") from error

    def _sync_folder(self) -> None:
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _read_acked(self) -> tuple[int, int]:
        packed = os.pread(self._acked_file, _ACKED.size, 0)
        if len(packed) < _ACKED.size:
            return (0, 0)
        session, number, checksum = _ACKED.unpack(packed)
        return (session, number) if packed == _pack_acked(session, number) and checksum else (0, 0)

    def _load(self) -> list[Frame]:
        """The unanswered frames of earlier lives, in order."""
        for unfinished in self.folder.glob("*.new"):
            unfinished.unlink()
        found: list[_Segment] = []
        for path in sorted(self.folder.glob("*.frames")):
            segment = self._open_segment(len(found) + 1, path)
            if segment is not None:
                found.append(segment)
        void = max((segment.void for segment in found), default=0)
        self._void = void
        frames: list[Frame] = []
        last_of = {segment.session: segment for segment in found}
        for segment in found:
            self._segments[segment.index] = segment
            self._session = max(self._session, segment.session)
            last = last_of[segment.session] is segment
            if segment.session > void:
                for frame in _frames(segment, last=last):
                    if (frame.session, frame.number) > self._acked:
                        segment.open_frames += 1
                        frames.append(frame)
            if not segment.open_frames:
                self._remove(segment)
        _check_unbroken(frames, self.folder)
        return frames

    def _open_segment(self, index: int, path: Path) -> _Segment | None:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        header = os.pread(file, _HEADER.size, 0)
        fields = _HEADER.unpack(header) if len(header) == _HEADER.size else None
        if fields is None or fields[0] != _MAGIC or fields[3] != zlib.crc32(header[:-4]):
            size = os.fstat(file).st_size
            os.close(file)
            if size > _HEADER.size and any(header):
                raise SpoolError(f"{path} is no segment of a spool")
            # A crash came between the making of the file and its first bytes: no frame was in it.
            path.unlink()
            return None
        segment = _Segment(index, path, file, fields[1])
        segment.void = fields[2]
        segment.size = os.fstat(file).st_size
        return segment


class _Segment:
    """One file of frames of one session."""

    __slots__ = ("file", "index", "open_frames", "path", "session", "size", "void")

    def __init__(self, index: int, path: Path, file: int, session: int) -> None:
        self.index = index
        self.path = path
        self.file = file
        self.session = session
        self.void = 0
        self.size = 0
        self.open_frames = 0


def _frames(segment: _Segment, *, last: bool) -> list[Frame]:
    """The frames of a segment, up to a torn end where it may have one."""
    frames: list[Frame] = []
    offset = _HEADER.size
    while offset < segment.size:
        head = os.pread(segment.file, _RECORD.size, offset)
        if len(head) == _RECORD.size:
            length, checksum, number, events = _RECORD.unpack(head)
            start = offset + _RECORD.size
            if 0 < length <= _MESSAGE_BYTES_MAX and start + length <= segment.size:
                message = os.pread(segment.file, length, start)
                if _checksum(number, events, message) == checksum:
                    place = Place(segment.index, start, length, checksum)
                    frames.append(resumed_frame(segment.session, number, events, place))
                    offset = start + length
                    continue
        if not last:
            raise SpoolError(f"{segment.path} is damaged at byte {offset}")
        break
    return frames


def _check_unbroken(frames: list[Frame], folder: Path) -> None:
    for before, after in itertools.pairwise(frames):
        if before.session == after.session and before.number + 1 != after.number:
            raise SpoolError(
                f"the spool in {folder} lacks frames {before.number + 1} to {after.number - 1}"
                f" of session {after.session}"
            )


def _checksum(number: int, events: int, message: bytes) -> int:
    return zlib.crc32(message, zlib.crc32(struct.pack("<QI", number, events)))


def _header_body(session: int, void: int) -> bytes:
    return struct.pack("<8sQQ", _MAGIC, session, void)


def _pack_acked(session: int, number: int) -> bytes:
    body = struct.pack("<QQ", session, number)
    return body + struct.pack("<I", zlib.crc32(body) or 1)


def _spool_error(folder: Path, error: OSError) -> SpoolError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SpoolError(f"no disk space is left for the spool in {folder}")
    return SpoolError(f"the spool in {folder} cannot be written: {error}")
