"""Pages: how what was read becomes an answer that a client with default limits can take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from google.protobuf.message import Message

from outrider_server.api.validation import page_token

PAGE_BYTES_MAX = 3 * 1024 * 1024
"""gRPC clients refuse answers above 4 MiB unless told otherwise. A page may hold fewer than asked for."""


class Named(Protocol):
    """A row in a list."""

    @property
    def name(self) -> str:
        """What the list is ordered by."""
        ...


N = TypeVar("N", bound=Named)
M = TypeVar("M", bound=Message)


def fill(
    query: str, rows: Sequence[N], size: int, convert: Callable[[N], M]
) -> tuple[Iterable[M], str]:
    """The page of at most `size` of `rows` (which holds one more where there is more), and the next page's token."""
    page: list[M] = []
    used = 0
    for row in rows[:size]:
        message = convert(row)
        used += message.ByteSize()
        if page and used > PAGE_BYTES_MAX:
            break
        page.append(message)
    more = len(rows) > len(page)
    return page, page_token(query, rows[len(page) - 1].name) if more else ""
