from dataclasses import replace

import pytest

from outrider_server.domain.endpoint import Endpoint
from outrider_server.domain.errors import InvalidArgument
from outrider_server.transport.target import TargetCache, prepare

ENDPOINT = Endpoint(
    id=1, tenant=1, name="a", url="https://h.example/s3cr3t?x=1", secrets=(b"s3cr3t" * 4,)
)


def test_the_head_holds_the_request_line_host_and_headers() -> None:
    target = prepare(replace(ENDPOINT, headers=(("X-Key", "v"), ("accept", "a/b"))), "Agent/1")
    assert target.head == (
        b"POST /s3cr3t?x=1 HTTP/1.1\r\nHost: h.example\r\nAccept-Encoding: identity\r\n"
        b"User-Agent: Agent/1\r\nX-Key: v\r\naccept: a/b\r\n"
    )


def test_a_target_does_not_show_what_may_be_a_credential() -> None:
    target = prepare(replace(ENDPOINT, headers=(("Authorization", "s3cr3t"),)), "Agent/1")
    assert "s3cr3t" not in repr(target)


def test_an_equal_endpoint_keeps_its_target_and_a_changed_one_gets_another() -> None:
    cache = TargetCache("Agent/1", 10)
    target = cache.of(ENDPOINT)
    assert cache.of(replace(ENDPOINT)) is target
    rotated = replace(ENDPOINT, secrets=(b"n" * 24,))
    assert cache.of(rotated) is not target
    assert cache.of(rotated).signer.sign("a", 1, b"") != target.signer.sign("a", 1, b"")


def test_the_cache_is_bounded_and_forgets() -> None:
    cache = TargetCache("Agent/1", 2)
    first, second, third = (cache.of(replace(ENDPOINT, id=number)) for number in (1, 2, 3))
    assert cache.of(replace(ENDPOINT, id=3)) is third
    assert cache.of(replace(ENDPOINT, id=2)) is second
    assert cache.of(replace(ENDPOINT, id=1)) is not first
    cache.forget(3)
    assert cache.of(replace(ENDPOINT, id=3)) is not third


@pytest.mark.parametrize("method", ["", "post", "CONNECT", "POST /", "POST\r\n"])
def test_a_method_that_cannot_be_sent_is_refused(method: str) -> None:
    with pytest.raises(InvalidArgument):
        prepare(replace(ENDPOINT, method=method), "Agent/1")
