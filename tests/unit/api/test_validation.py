"""Rules, tokens, etags and masks."""

from __future__ import annotations

import datetime

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from outrider.v1 import endpoint_pb2, subscription_pb2
from outrider_server.api import validation
from outrider_server.domain.errors import Aborted, InvalidArgument

NOW = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
Endpoint = endpoint_pb2.Endpoint
CHANGEABLE = ("display_name", "headers", "retry", "url")


@pytest.mark.parametrize("last", ["a", "é", "a.b-c", "x" * 128])
def test_page_token_gives_back_what_it_was_made_of(last: str) -> None:
    token = validation.page_token("q", last)
    assert validation.parse_page_token("q", token) == last
    with pytest.raises(InvalidArgument) as caught:
        _ = validation.parse_page_token("p", token)
    assert caught.value.reason == "INVALID_PAGE_TOKEN"
    assert validation.parse_page_token("q", "") == ""


@pytest.mark.parametrize("token", ["a", "!!", "AAAA", "é", "A" * 12, "////"])
def test_what_is_no_page_token_is_refused(token: str) -> None:
    with pytest.raises(InvalidArgument):
        _ = validation.parse_page_token("q", token)


def test_etag_differs_by_version_and_by_making() -> None:
    later = NOW + datetime.timedelta(microseconds=1)
    assert len({validation.etag(NOW, 1), validation.etag(NOW, 2), validation.etag(later, 1)}) == 3
    validation.require_etag("", "x", "r")
    validation.require_etag("x", "x", "r")
    with pytest.raises(Aborted):
        validation.require_etag("y", "x", "r")


def test_violations_and_nuls_are_named_where_they_stand() -> None:
    with pytest.raises(InvalidArgument) as caught:
        validation.check(subscription_pb2.Subscription(display_name="x" * 257), "s")
    assert {path for path, _ in caught.value.violations} == {
        "s.display_name",
        "s.endpoint",
        "s.types",
    }
    with pytest.raises(InvalidArgument) as caught:
        validation.check(subscription_pb2.Subscription(endpoint="e", types=["a", "b\0"]))
    assert (caught.value.reason, caught.value.violations[0][0]) == ("INVALID_TEXT", "types")


def merge(
    current: Endpoint, given: Endpoint, *paths: str, immutable: tuple[str, ...] = ()
) -> tuple[Endpoint, frozenset[str]]:
    return validation.merged(
        current, given, FieldMask(paths=paths), changeable=CHANGEABLE, immutable=immutable
    )


def test_mask_takes_what_it_names_and_leaves_the_rest() -> None:
    current = Endpoint(
        url="u", display_name="d", headers={"a": "1"}, retry={"factor": 2, "attempts_max": 5}
    )
    given = Endpoint(url="v", headers={"b": "2"}, retry={"factor": 4, "jitter": 0.0})
    merged, touched = merge(current, given, "headers", "retry.factor")
    assert touched == {"headers", "retry"}
    assert (merged.url, dict(merged.headers)) == ("u", {"b": "2"})
    assert (merged.retry.factor, merged.retry.attempts_max) == (4, 5)
    merged, _ = merge(current, given, "retry")
    assert (merged.retry.factor, merged.retry.attempts_max) == (4, 0)
    assert merged.retry.HasField("jitter")
    merged, _ = merge(current, given, "retry.jitter")
    assert (merged.retry.factor, merged.retry.HasField("jitter")) == (2, True)
    merged, touched = merge(current, given)
    assert touched == {"url", "headers", "retry"}
    assert merged.display_name == "d"
    merged, _ = merge(current, given, "*")
    assert merged.display_name == ""
    assert current.url == "u"


@pytest.mark.parametrize(
    "path", ["", "x", "state", "etag", "headers.a", "url.a", "retry.x", "*.x", "retry.base.seconds"]
)
def test_mask_that_names_anything_else_is_refused(path: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        _ = merge(Endpoint(), Endpoint(), path)
    assert caught.value.violations[0][0] == "update_mask"


def test_immutable_field_may_be_named_while_it_stays() -> None:
    current = Endpoint(secret="s")
    merged, _ = merge(current, Endpoint(secret="s"), "secret", immutable=("secret",))
    assert merged == current
    for paths in ((), ("secret",)):
        with pytest.raises(InvalidArgument):
            _ = merge(current, Endpoint(secret="t"), *paths, immutable=("secret",))
