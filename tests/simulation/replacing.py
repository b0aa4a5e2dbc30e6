"""Another function or value in the place of one of the server's, while a block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, by: Any) -> Iterator[None]:
    """`owner.name` is `by` inside the block. What is not there any more has to be found anew."""
    assert hasattr(owner, name), f"{owner} has no {name} any more"
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
