"""Pages by number and by size."""

from __future__ import annotations

from dataclasses import dataclass

from outrider.v1 import event_type_pb2
from outrider_server.api.paging import PAGE_BYTES_MAX, fill
from outrider_server.api.validation import parse_page_token


@dataclass
class Row:
    name: str
    size: int = 0


def convert(row: Row) -> event_type_pb2.EventType:
    return event_type_pb2.EventType(name=row.name, schema_json="x" * row.size)


def page_of(rows: list[Row], size: int) -> tuple[list[str], str]:
    page, token = fill("q", rows, size, convert)
    return [message.name for message in page], parse_page_token("q", token)


def test_page_is_cut_by_number_and_the_last_has_no_token() -> None:
    rows = [Row("a"), Row("b"), Row("c")]
    assert page_of(rows, 2) == (["a", "b"], "b")
    assert page_of(rows, 3) == (["a", "b", "c"], "")
    assert page_of([], 3) == ([], "")


def test_page_is_cut_by_size_and_never_empty_while_there_is_more() -> None:
    large = PAGE_BYTES_MAX // 2
    rows = [Row("a", large), Row("b", large), Row("c")]
    assert page_of(rows, 3) == (["a"], "a")
    assert page_of([Row("a", PAGE_BYTES_MAX * 2), Row("b")], 3) == (["a"], "a")
