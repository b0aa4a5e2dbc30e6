"""What a person sees: the greeting, then a panel drawn again and again on a terminal, else one plain line a second.

Rule: the texts are made by pure functions from `Figures`; only `Screen` writes, in a thread, because a stopped
terminal must not stop the node that runs in the same loop.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from outrider_server.demo.receiver import Received

COLUMNS_MIN = 60
_MIB = 1024 * 1024


class ReaderGone(Exception):
    """Nobody reads what is written any more."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What there is to tell at one moment. Counts are of this run, `owed` is what is still to be delivered."""

    seconds: float = 0.0
    published: int = 0
    matched: int = 0
    delivered: int = 0
    recorded: int = 0
    owed: int = 0
    failed: int = 0
    disk_bytes: int = 0
    disk_bytes_max: int = 0
    problem: str = ""
    endpoints: Mapping[str, Received] = field(default_factory=dict)


def line(figures: Figures) -> str:
    """One plain line."""
    text = (
        f"{figures.seconds:6.0f} s  published {figures.published}  matched {figures.matched}"
        f"  delivered {figures.delivered}  recorded {figures.recorded}  owed {figures.owed}"
        f"  failed attempts {figures.failed}  disk {figures.disk_bytes // _MIB} MiB"
    )
    return f"{text}  ({figures.problem})" if figures.problem else text


def panel(now: Figures, before: Figures, columns: int) -> list[str]:
    """The lines of the panel, none longer than `columns`. `before`: the figures a little earlier, for the rates."""
    elapsed = max(now.seconds - before.seconds, 1e-9)

    def row(name: str, what: str, explanation: str) -> str:
        count = getattr(now, what)
        rate = (count - getattr(before, what)) / elapsed
        return f"  {name:<16}{count:>13,}{rate:>10,.0f}/s   {explanation}"

    lines = [
        f"  {'':<16}{'in all':>13}{'rate':>10}     {now.seconds:,.0f} s",
        row("published", "published", "events, acknowledged to the sample publisher"),
        row("matched", "matched", "deliveries: subscriptions that wanted an event"),
        row("delivered", "delivered", "arrived at the sample receiver, signature verified"),
        row("recorded", "recorded", "settled in the ledger of the database"),
        row("failed attempts", "failed", "to be tried again"),
        f"  {'owed':<16}{now.owed:>13,}{'':>12}   still to be delivered",
        "",
        f"  {'endpoint':<16}{'requests':>13}{'deliveries':>13}{'failed':>10}{'copies':>10}{'refused':>10}",
    ]
    lines += [
        f"  {name:<16}{each.requests:>13,}{each.deliveries:>13,}{each.failed_on_purpose:>10,}"
        f"{each.copies:>10,}{each.not_genuine:>10,}"
        for name, each in now.endpoints.items()
    ]
    lines += [
        "",
        f"  disk {now.disk_bytes // _MIB:,} of {now.disk_bytes_max // _MIB:,} MiB",
        f"  {now.problem}",
    ]
    return [each[: columns - 1].rstrip() for each in lines]


def redrawn(lines: Sequence[str], drawn_before: int) -> str:
    """The text that puts `lines` over as many drawn before: up to their first, and each cleared to its end."""
    up = f"\x1b[{drawn_before}F" if drawn_before else ""
    return up + "".join(f"{each}\x1b[K\n" for each in lines) + "\x1b[J"


class Screen:
    """Writes to `stream`. After `say` the panel begins anew below what was said."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._drawn = 0
        self._before = Figures()
        self._terminal = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"

    @property
    def refresh_seconds(self) -> float:
        """How often to show figures."""
        return 0.5 if self._terminal else 1.0

    async def say(self, text: str) -> None:
        """Write a text that stays."""
        self._drawn = 0
        await asyncio.to_thread(self._write, text + "\n")

    async def show(self, figures: Figures) -> None:
        """Show the figures in their form."""
        await asyncio.to_thread(self._write, self._text_of(figures))
        if figures.seconds - self._before.seconds >= 1.0:
            self._before = figures

    def _text_of(self, figures: Figures) -> str:
        if self._terminal:
            columns, rows = shutil.get_terminal_size()
            lines = panel(figures, self._before, columns)
            # Drawn over what has scrolled away, it would only fill the terminal.
            if columns >= COLUMNS_MIN and rows > len(lines) + 1:
                text = redrawn(lines, self._drawn)
                self._drawn = len(lines)
                return text
        return line(figures) + "\n"

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:
            raise ReaderGone from None
