"""What a person sees fits its terminal, tells the figures, and never holds the node up."""

from __future__ import annotations

import io

import pytest
from typing_extensions import override

from outrider_server.demo.receiver import Received
from outrider_server.demo.screen import Figures, ReaderGone, Screen, line, panel, redrawn

BEFORE = Figures(seconds=10.0, published=1000)
NOW = Figures(
    seconds=12.0,
    published=1400,
    matched=1500,
    delivered=1490,
    recorded=1480,
    owed=7,
    failed=3,
    disk_bytes=50 << 20,
    disk_bytes_max=4096 << 20,
    problem="the node has acknowledged nothing for 4 s",
    endpoints={"crm": Received(requests=12, deliveries=11, copies=1)},
)


class Terminal(io.StringIO):
    @override
    def isatty(self) -> bool:
        return True


class Closed(io.StringIO):
    @override
    def flush(self) -> None:
        raise BrokenPipeError


def test_a_plain_line_tells_every_figure() -> None:
    text = line(NOW)
    assert "published 1400  matched 1500  delivered 1490  recorded 1480  owed 7" in text
    assert text.endswith("(the node has acknowledged nothing for 4 s)")
    assert "\n" not in text


def test_the_panel_tells_counts_and_rates() -> None:
    lines = panel(NOW, BEFORE, columns=120)
    assert any("published" in each and "1,400" in each and "200/s" in each for each in lines)
    assert any("crm" in each and "12" in each for each in lines)


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_no_line_of_the_panel_is_wider_than_the_terminal(columns: int) -> None:
    assert max(len(each) for each in panel(NOW, BEFORE, columns)) < columns


def test_a_panel_is_drawn_over_the_one_before() -> None:
    assert redrawn(["a", "b"], 0) == "a\x1b[K\nb\x1b[K\n\x1b[J"
    assert redrawn(["a", "b"], 2).startswith("\x1b[2F")


async def test_without_a_terminal_there_are_plain_lines_only() -> None:
    stream = io.StringIO()
    screen = Screen(stream)
    await screen.say("hello")
    await screen.show(NOW)
    assert stream.getvalue() == f"hello\n{line(NOW)}\n"
    assert screen.refresh_seconds == 1.0


async def test_on_a_terminal_what_was_said_stays_above_the_panel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("TERM", "xterm"), ("COLUMNS", "100"), ("LINES", "40")):
        monkeypatch.setenv(name, value)
    stream = Terminal()
    screen = Screen(stream)
    await screen.show(NOW)
    await screen.show(NOW)
    assert stream.getvalue().count("F  ") == 1
    await screen.say("said")
    await screen.show(NOW)
    after = stream.getvalue().partition("said\n")[2]
    assert after.startswith("  ")


@pytest.mark.parametrize(("columns", "rows"), [("40", "40"), ("100", "8")])
async def test_a_terminal_too_small_for_the_panel_gets_lines(
    monkeypatch: pytest.MonkeyPatch, columns: str, rows: str
) -> None:
    for name, value in (("TERM", "xterm"), ("COLUMNS", columns), ("LINES", rows)):
        monkeypatch.setenv(name, value)
    stream = Terminal()
    await Screen(stream).show(NOW)
    assert stream.getvalue() == line(NOW) + "\n"


async def test_a_terminal_that_can_nothing_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    await Screen(stream).show(NOW)
    assert "\x1b" not in stream.getvalue()


async def test_a_reader_that_has_gone_is_told() -> None:
    with pytest.raises(ReaderGone):
        await Screen(Closed()).say("hello")
