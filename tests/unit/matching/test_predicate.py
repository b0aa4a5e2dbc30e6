"""One interface for generated filters and those left to the engine: same answers, same budget."""

from __future__ import annotations

import subprocess
import sys

import pytest

from outrider_server.domain.event import NewEvent
from outrider_server.matching.checked_ast import MalformedAst
from outrider_server.matching.filter import check_filter
from outrider_server.matching.predicate import fields_of, load_predicate
from outrider_server.matching.runtime import OverBudget

EVENT = NewEvent(
    tenant=1, type="a.b", data=b"", time_us=1_767_323_045_000_000, attributes={"k": "v"}
)

LEFT_TO_THE_ENGINE = [
    ("{1: 'open'}[code] == status", {"code": 1, "status": "open"}, True),
    ("{1: 'open'}[code] == status", {"code": 2, "status": "open"}, False),
    ("{1: 'open'}[code] == status", {}, False),
    ("{true: data}[true].code == 1", {"code": 1}, True),
    ("{1: event.time}[1] > timestamp(0)", {}, True),
    ("{1: event.attributes}[1].k == 'v' && event.type == 'a.b'", {}, True),
    ("google.protobuf.Timestamp{seconds: 1767323045} == event.time", {}, True),
    ("event.time.getHours(zone) == 3", {"zone": "UTC"}, True),
]


@pytest.mark.parametrize(("text", "document", "wanted"), LEFT_TO_THE_ENGINE)
def test_what_the_generator_does_not_cover_the_engine_answers(
    text: str, document: dict[str, object], wanted: bool
) -> None:
    predicate = load_predicate(check_filter(text).ast)
    assert not predicate.generated
    assert predicate.test(document, document, EVENT) is wanted


def test_the_engine_keeps_the_budget_too() -> None:
    predicate = load_predicate(check_filter("{1: a}[1].all(i, a.all(j, i == j))").ast)
    assert not predicate.generated
    fields: dict[str, object] = {"a": [0] * 90}
    assert predicate.test(fields, fields, EVENT)
    fields = {"a": [0] * 110}
    with pytest.raises(OverBudget):
        predicate.test(fields, fields, EVENT)


def test_bytes_that_are_no_filter_are_refused() -> None:
    for data in (b"", b"x", b"\x00" * 40):
        with pytest.raises(MalformedAst):
            load_predicate(data)


def test_only_an_object_has_fields() -> None:
    document = {"a": 1}
    assert fields_of(document) is document
    assert all(fields_of(other) == {} for other in (None, [], "x", 1))


def test_a_generated_filter_is_loaded_without_the_engine() -> None:
    ast = check_filter("order.total > 100 && items.exists(i, i.x == 'y')").ast
    program = (
        "import sys; from outrider_server.matching.index import Index\n"
        "from outrider_server.matching.predicate import load_predicate\n"
        f"assert load_predicate({ast!r}).generated\n"
        "assert not any(name.startswith('cel_expr_python') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
