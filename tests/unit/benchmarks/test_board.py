"""Numbers are seen by every process that maps the board, each row by itself."""

from __future__ import annotations

from pathlib import Path

from benchmarks.board import PROCESSES_MAX, SLOT_NUMBERS, Board, Received, Sent


def test_what_one_writes_the_others_see(tmp_path: Path) -> None:
    one = Board(tmp_path / "board", create=True)
    other = Board(tmp_path / "board")
    one.row(2)[Sent.SENT] = 7
    one.row(3)[Sent.SENT] = 2**40
    assert other.row(2)[Sent.SENT] == 7
    assert other.total(range(2, 4), Sent.SENT) == 7 + 2**40
    assert other.total(range(2, 4), Received.DELIVERIES) == 0


def test_rows_have_room_for_every_number_and_every_process() -> None:
    assert max(*Sent, *Received) < SLOT_NUMBERS
    assert PROCESSES_MAX >= 32 + 32
