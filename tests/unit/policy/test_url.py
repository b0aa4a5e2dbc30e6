from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from outrider_server.domain.errors import InvalidArgument
from outrider_server.policy.url import URL_LENGTH_MAX, validate_url


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com",
        "http://example.com:8080/a/b?c=d&e=%20f",
        "HTTPS://Example.COM./",
        "https://xn--bcher-kva.example/hook",
        "https://127.0.0.1:1/",
        "https://[2001:db8::1]:443/x",
        "https://my_host-1/x@y:z",
        "https://a.b?x=/?",
        "https://h/" + "a" * (URL_LENGTH_MAX - 10),
    ],
)
def test_ordinary_urls_pass_unchanged(url: str) -> None:
    assert validate_url(url) == url


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "https://host/path"),
        ("example.com/x", "https://host/path"),
        ("https:/example.com", "https://host/path"),
        ("https:example.com", "https://host/path"),
        ("//example.com/", "https://host/path"),
        ("javascript:alert(1)", "https://host/path"),
        ("ftp://example.com/", "http or https"),
        ("file:///etc/passwd", "http or https"),
        ("unix:///run/x.sock", "http or https"),
        ("https:///path", "names a host"),
        ("https://:443/", "names a host"),
        ("https://user@example.com/", "user information"),
        ("https://user:hunter2@example.com/", "user information"),
        ("https://example.com:0/", "between 1 and 65535"),
        ("https://example.com:65536/", "between 1 and 65535"),
        ("https://example.com:/", "host:port"),
        ("https://example.com:http/", "host:port"),
        ("https://2001:db8::1/", "host:port"),
        ("https://[2001:db8::1/", "host:port"),
        ("https://[::1]x/", "host:port"),
        ("https://[127.0.0.1]/", "IPv6"),
        ("https://[fe80::1%25eth0]/", "zone"),
        ("https://a..b/", "labels"),
        ("https://.example.com/", "labels"),
        ("https://-a.example/", "labels"),
        ("https://ex%61mple.com/", "labels"),
        ("https://" + "a" * 64 + ".com/", "labels"),
        ("https://" + "a." * 127 + "aa/", "253"),
        ("https://example.com/#top", "fragment"),
        ("https://example.com/a b", "percent-encode"),
        ("https://example.com/\\evil", "percent-encode"),
        ("https://example.com\\@evil.com/", "percent-encode"),
        ("https://bücher.example/", "xn--"),
        ("https://①②⑦.0.0.1/", "xn--"),
        ("https://example.com/%zz", "percent-encode"),
        ("https://example.com/\r\nX: y", "percent-encode"),
        ("https://example.com/\n", "percent-encode"),
        (" https://example.com/", "https://host/path"),
        ("https://example.com/[a]", "square brackets"),
        ("https://h/" + "a" * URL_LENGTH_MAX, "2048"),
    ],
)
def test_anything_else_is_refused_with_a_reason_that_does_not_repeat_it(
    url: str, words: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        validate_url(url)
    assert caught.value.reason == "INVALID_ENDPOINT_URL"
    assert words in caught.value.message
    assert caught.value.violations == (("url", caught.value.message),)
    assert "hunter2" not in repr(caught.value)


@given(
    st.from_regex(
        r"https?://[a-z0-9.\-_\[\]:@%]{1,20}(/[a-z0-9%@:/?#\[\]\\ ]{0,20})?", fullmatch=True
    )
)
def test_whatever_passes_is_read_alike_by_two_other_readers(url: str) -> None:
    try:
        validate_url(url)
    except InvalidArgument:
        return
    ours, theirs = urlsplit(url), URL(url)
    assert ours.hostname == (theirs.host or "").lower()
    assert (ours.port or {"http": 80, "https": 443}[ours.scheme]) == theirs.port
    assert ours.username is None
    assert theirs.user is None
