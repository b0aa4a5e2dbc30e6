"""What keeps the demo from running, where nobody else has a sentence for it."""

from __future__ import annotations


class DemoError(Exception):
    """One sentence that says what to do, for the person who starts the demo."""
