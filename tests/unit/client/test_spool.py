from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from outrider._frames import Frame
from outrider.errors import SpoolError, SpoolLocked
from outrider.spool import BYTES_MIN, Spool
from outrider.v1.event_pb2 import Event
from outrider.v1.ingest_service_pb2 import PublishStreamRequest


def sealed(number: int, session: int = 7, data: bytes = b"{}") -> Frame:
    frame = Frame("demo", 0.0)
    frame.add(Event(type="a.b", data=data).SerializeToString(), "demo")
    frame.seal(session, number, "demo")
    return frame


def filled(folder: Path, count: int, *, session: int = 7, data: bytes = b"{}") -> list[bytes]:
    """A spool left with `count` unanswered frames, as a killed process leaves it; their messages."""
    messages = []
    with Spool(folder) as spool:
        for number in range(1, count + 1):
            frame = sealed(number, session, data + b" " * number)
            assert frame.message is not None
            messages.append(frame.message)
            spool.append(frame)
    return messages


def test_frames_come_back_unchanged_in_order_under_their_session(tmp_path: Path) -> None:
    messages = filled(tmp_path, 5)
    with Spool(tmp_path) as spool:
        frames = spool.resumed
        assert [(f.session, f.number, f.events) for f in frames] == [(7, n, 1) for n in range(1, 6)]
        assert [spool.message(frame) for frame in frames] == messages
        assert [frame.size for frame in frames] == [
            PublishStreamRequest.FromString(message).frame.ByteSize() for message in messages
        ]


def test_acknowledged_frames_do_not_come_back(tmp_path: Path) -> None:
    filled(tmp_path, 5)
    with Spool(tmp_path) as spool:
        for frame in spool.resumed[:3]:
            spool.acknowledged(frame)
    with Spool(tmp_path) as spool:
        assert [frame.number for frame in spool.resumed] == [4, 5]
        for frame in spool.resumed:
            spool.acknowledged(frame)
    with Spool(tmp_path) as spool:
        assert spool.resumed == []
        assert spool.size == 0


def test_a_lost_acknowledged_position_brings_frames_back_but_loses_none(tmp_path: Path) -> None:
    filled(tmp_path, 5)
    with Spool(tmp_path) as spool:
        for frame in spool.resumed[:3]:
            spool.acknowledged(frame)
    (tmp_path / "acked").write_bytes(b"\x01" * 20)
    with Spool(tmp_path) as spool:
        assert [frame.number for frame in spool.resumed] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_torn_tail_is_passed_over(tmp_path: Path, cut: int) -> None:
    filled(tmp_path, 3)
    [segment] = tmp_path.glob("*.frames")
    os.truncate(segment, segment.stat().st_size - cut)
    with Spool(tmp_path) as spool:
        assert [frame.number for frame in spool.resumed] == [1, 2]


def test_a_tail_of_zeros_is_passed_over(tmp_path: Path) -> None:
    filled(tmp_path, 2)
    [segment] = tmp_path.glob("*.frames")
    with segment.open("ab") as file:
        file.write(bytes(100))
    with Spool(tmp_path) as spool:
        assert [frame.number for frame in spool.resumed] == [1, 2]


def test_a_segment_without_its_header_holds_nothing(tmp_path: Path) -> None:
    filled(tmp_path, 2)
    (tmp_path / f"{8:020d}-{2:010d}.frames").write_bytes(b"ORSP")
    with Spool(tmp_path) as spool:
        assert [frame.number for frame in spool.resumed] == [1, 2]


def test_damage_in_the_middle_is_told_with_its_place(tmp_path: Path) -> None:
    big = b"x" * 1_000_000
    with Spool(tmp_path, bytes_max=BYTES_MIN) as spool:
        for number in range(1, 13):
            spool.append(sealed(number, data=big))
    first, *rest = sorted(tmp_path.glob("*.frames"))
    assert rest
    with first.open("r+b") as file:
        file.seek(2_500_000)
        file.write(b"damage")
    with pytest.raises(SpoolError, match="damaged at byte"):
        Spool(tmp_path)


def test_a_frame_damaged_after_opening_is_not_sent(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    with Spool(tmp_path) as spool:
        [segment] = tmp_path.glob("*.frames")
        with segment.open("r+b") as file:
            file.seek(segment.stat().st_size - 1)
            file.write(b"!")
        with pytest.raises(SpoolError, match="damaged"):
            spool.message(spool.resumed[0])


def test_a_foreign_file_is_not_taken_for_a_segment(tmp_path: Path) -> None:
    (tmp_path / "1-1.frames").write_bytes(b"something else" * 10)
    with pytest.raises(SpoolError, match="no segment"):
        Spool(tmp_path)


def test_new_frames_never_share_a_session_with_an_earlier_life(tmp_path: Path) -> None:
    filled(tmp_path, 2, session=100)
    with Spool(tmp_path) as spool:
        assert spool.session_min == 101
        spool.append(sealed(1, 101))
        for frame in spool.resumed:
            spool.acknowledged(frame)
    with Spool(tmp_path) as spool:
        assert [(f.session, f.number) for f in spool.resumed] == [(101, 1)]
        assert spool.session_min == 102


def test_the_session_is_remembered_when_every_segment_is_gone(tmp_path: Path) -> None:
    filled(tmp_path, 1, session=500)
    with Spool(tmp_path) as spool:
        spool.acknowledged(spool.resumed[0])
    assert list(tmp_path.glob("*.frames")) == []
    with Spool(tmp_path) as spool:
        assert spool.session_min == 501


def test_segments_go_when_all_their_frames_are_acknowledged(tmp_path: Path) -> None:
    big = b"x" * 1_000_000
    with Spool(tmp_path, bytes_max=BYTES_MIN) as spool:
        frames = [sealed(number, data=big) for number in range(1, 31)]
        for frame in frames:
            spool.append(frame)
        full = spool.size
        for frame in frames[:20]:
            spool.acknowledged(frame)
        assert spool.size < full / 2
        assert [spool.message(frame) for frame in frames[20:]] == [f.message for f in frames[20:]]
        for frame in frames[20:]:
            spool.acknowledged(frame)
        spool.append(sealed(31, data=big))
    with Spool(tmp_path) as spool:
        assert [frame.number for frame in spool.resumed] == [31]


def test_disk_stays_bounded_while_frames_come_and_go(tmp_path: Path) -> None:
    big = b"x" * 1_000_000
    waiting: list[Frame] = []
    held = 0
    with Spool(tmp_path, bytes_max=BYTES_MIN) as spool:
        for number in range(1, 200):
            frame = sealed(number, data=big)
            while held + frame.size > spool.unanswered_bytes_max:
                oldest = waiting.pop(0)
                held -= oldest.size
                spool.acknowledged(oldest)
            spool.append(frame)
            frame.message = None
            waiting.append(frame)
            held += frame.size
            on_disk = sum(path.stat().st_size for path in tmp_path.glob("*.frames"))
            assert on_disk <= BYTES_MIN
            assert spool.size == on_disk


def test_renumbered_frames_take_the_place_of_the_old_ones(tmp_path: Path) -> None:
    filled(tmp_path, 4)
    with Spool(tmp_path) as spool:
        spool.acknowledged(spool.resumed[0])
        rest = spool.resumed[1:]
        spool.renumber(rest, 900)
        assert [(f.session, f.number) for f in rest] == [(900, n) for n in (1, 2, 3)]
        spool.append(sealed(4, 900))
    with Spool(tmp_path) as spool:
        assert [(f.session, f.number) for f in spool.resumed] == [(900, n) for n in (1, 2, 3, 4)]
        for number, frame in enumerate(spool.resumed, 1):
            assert PublishStreamRequest.FromString(spool.message(frame)).frame.number == number


def test_a_crash_amid_renumbering_leaves_each_frame_once(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    [old] = tmp_path.glob("*.frames")
    kept = old.read_bytes()
    with Spool(tmp_path) as spool:
        spool.renumber(spool.resumed, 900)
    # Before the rename: the unfinished segment is thrown away.
    [new] = tmp_path.glob("*.frames")
    renumbered = new.read_bytes()
    new.rename(new.with_suffix(".new"))
    old.write_bytes(kept)
    with Spool(tmp_path) as spool:
        assert [(f.session, f.number) for f in spool.resumed] == [(7, n) for n in (1, 2, 3)]
    # After it: the old ones are void, though they are still there.
    new.write_bytes(renumbered)
    with Spool(tmp_path) as spool:
        assert [(f.session, f.number) for f in spool.resumed] == [(900, n) for n in (1, 2, 3)]
    assert not old.exists()


def test_two_processes_cannot_share_a_spool(tmp_path: Path) -> None:
    code = (
        "import sys; from outrider.spool import Spool; s = Spool(sys.argv[1]); print('open', flush=True);"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(SpoolLocked):
            Spool(tmp_path)
        # Killed, not closed: the lock must go with the process.
        other.kill()
    Spool(tmp_path).close()


def test_a_lock_that_was_refused_leaves_no_file_open(tmp_path: Path) -> None:
    with Spool(tmp_path):
        before = len(list(Path("/dev/fd").iterdir()))
        with pytest.raises(SpoolLocked):
            Spool(tmp_path)
        assert len(list(Path("/dev/fd").iterdir())) == before


def test_bounds_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bytes_max"):
        Spool(tmp_path, bytes_max=1024)
    with pytest.raises(ValueError, match="events_max"):
        Spool(tmp_path, events_max=0)
