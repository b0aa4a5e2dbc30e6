"""The statements of this room: one a file, with its purpose and the locks it takes on top.

`load("tenant_get")` is the text of tenant_get.sql without those comments.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent


@cache
def load(name: str) -> str:
    """The statement in the file `name`.sql."""
    lines = (_FOLDER / f"{name}.sql").read_text(encoding="utf-8").splitlines()
    # Comments are for the file's readers: sent along, they would fill the database's own statistics and logs.
    return "\n".join(line for line in lines if line.strip() and not line.startswith("--"))
