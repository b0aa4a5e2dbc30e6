import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_server.domain.errors import InvalidArgument
from outrider_server.policy.headers import HEADERS_MAX, validate_headers


def refused(*headers: tuple[str, str]) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        validate_headers(headers)
    assert caught.value.reason == "INVALID_HEADER"
    assert caught.value.violations
    return caught.value


def test_ordinary_headers_pass_unchanged() -> None:
    headers = (
        ("Authorization", "Bearer a.b-c_d=="),
        ("X-Empty", ""),
        ("x-tab", "a\tb c"),
        ("Content-Type", "application/cloudevents+json"),
        ("X!#$%&'*+.^_`|~", "~"),
    )
    assert validate_headers(headers) == headers
    assert validate_headers([]) == ()


@pytest.mark.parametrize(
    "name",
    [
        "Host",
        "content-length",
        "Transfer-Encoding",
        "CONNECTION",
        "te",
        "Trailer",
        "upgrade",
        "Expect",
        "Proxy-Authorization",
        "proxy-anything",
        "Cookie",
        "webhook-id",
        "Webhook-Signature",
        "accept-encoding",
        "keep-alive",
    ],
)
def test_what_the_transport_decides_cannot_be_given(name: str) -> None:
    assert name in str(refused((name, "x")))


@pytest.mark.parametrize("name", ["", "Bad Name", "a:b", "a\r\nb", "a\n", "ä", "a\x00", "x" * 257])
def test_a_name_must_be_a_token(name: str) -> None:
    refused((name, "x"))


@pytest.mark.parametrize("value", ["a\r\nX: y", "a\n", "\x00", "\x7f", "ä", " a", "a ", "\ta"])
def test_a_value_must_stay_in_its_line(value: str) -> None:
    refused(("X-Custom", value))


@given(st.text(max_size=30), st.text(max_size=30))
def test_whatever_passes_forms_exactly_one_header_line(name: str, value: str) -> None:
    try:
        validate_headers([(name, value)])
    except InvalidArgument:
        return
    line = f"{name}: {value}"
    assert line.isascii()
    assert line.splitlines() == [line]
    assert line.partition(":")[0] == name


def test_every_violation_is_named_by_its_index_and_none_shows_a_value() -> None:
    error = refused(("ok", "fine"), ("Host", "hunter2"), ("X", "hunter2\n"))
    assert [field for field, _ in error.violations] == ["headers[1]", "headers[2]"]
    assert "hunter2" not in repr((error, error.violations))


def test_a_header_is_given_once_whatever_its_case() -> None:
    refused(("X-One", "1"), ("x-one", "2"))


def test_number_and_size_are_bounded() -> None:
    many = [(f"X-{number}", "v") for number in range(HEADERS_MAX)]
    assert validate_headers(many)
    refused(*many, ("Y", "v"))
    refused(("X", "v" * 8192))
    assert validate_headers([("X", "v" * 8191)])
