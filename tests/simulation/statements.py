"""What the statements said that the twins in `store` were written after: a fingerprint of each text, in statements.txt.

A statement that changes leaves its twin behind unseen; so a test fails until somebody has looked at both, changed the twin
where it must be, and written the fingerprints down anew (`python -m tests.simulation --note-statements`).
"""

from __future__ import annotations

from pathlib import Path

import tests.simulation.twins  # noqa: F401 - there they register
from tests.simulation.store import STATEMENTS, fingerprint

NOTED = Path(__file__).with_name("statements.txt")


def now() -> dict[str, str]:
    """Fingerprints of the statements that there are twins of."""
    found = {}
    for name in sorted(STATEMENTS):
        try:
            found[name] = f"{fingerprint(name):08x}"
        except FileNotFoundError:
            continue  # no file: a text in the code, or one that only the world sends
    return found


def noted() -> dict[str, str]:
    """Those that were written down."""
    lines = NOTED.read_text(encoding="utf-8").splitlines()
    return dict(line.split() for line in lines if line)


def write() -> None:
    """Write them down."""
    NOTED.write_text("".join(f"{name} {mark}\n" for name, mark in now().items()), encoding="utf-8")
