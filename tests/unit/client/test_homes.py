from __future__ import annotations

import pytest

from outrider._homes import Addresses, unanimous
from outrider.v1.ingest_service_pb2 import TenantHome


def homes(*pairs: tuple[str, str]) -> list[TenantHome]:
    return [TenantHome(tenant=tenant, address=address) for tenant, address in pairs]


def test_a_tenant_with_several_addresses_has_no_single_home() -> None:
    told = homes(("a", "h:1"), ("b", "h:1"), ("a", "h:2"), ("c", "h:3"), ("c", "h:3"), ("a", "h:1"))
    assert unanimous(told) == {"b": "h:1", "c": "h:3"}


@pytest.mark.parametrize(
    "address", ["node-2.example.com:4511", "10.0.0.7:1", "[2001:db8::1]:65535"]
)
def test_host_and_port_are_followed(address: str) -> None:
    assert Addresses("outrider.example.com:4510").may_follow(address, 0.0)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "host",
        "host:",
        "host:0",
        "host:65536",
        "host:123456",
        ":4510",
        "unix:/tmp/socket",
        "dns:///host:1",
        "dns:host:1",
        "a b:1",
        "host:1,other:2",
        "[host]:1",
        "host:1\n",
    ],
)
def test_nothing_but_host_and_port_is_followed(address: str) -> None:
    assert not Addresses("127.0.0.1:4510").may_follow(address, 0.0)


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("127.0.0.1:4510", True),
        ("127.8.0.1:4510", True),
        ("localhost:4510", True),
        ("LOCALHOST", True),
        ("[::1]:4510", True),
        ("dns:///localhost:4510", True),
        ("dns:localhost:4510", True),
        ("dns://8.8.8.8/localhost:4510", True),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", True),
        ("ipv6:[::1]:4510", True),
        ("unix:/run/outrider.sock", True),
        ("outrider.example.com:4510", False),
        ("dns:///outrider.example.com", False),
        ("dns://127.0.0.1/outrider.example.com:4510", False),
        ("10.0.0.1:4510", False),
        ("ipv6:[2001:db8::1]:4510", False),
        ("localhost.example.com:1", False),
    ],
)
@pytest.mark.parametrize("home", ["127.0.0.1:9", "localhost:9", "[::1]:9", "0.0.0.0:9"])
def test_a_home_on_the_loopback_is_followed_only_from_a_target_there(
    target: str, local: bool, home: str
) -> None:
    assert Addresses(target).may_follow(home, 0.0) is local


def test_an_address_that_failed_rests_ever_longer_until_it_succeeds() -> None:
    addresses = Addresses("h:1")
    now, pauses = 0.0, []
    for after_success in (False, False, False, True, False):
        addresses.failed("n:1", now, after_success=after_success)
        began = now
        while not addresses.may_follow("n:1", now):
            now += 0.5
        pauses.append(now - began)
    assert pauses == [1.0, 2.0, 4.0, 1.0, 2.0]
    for _ in range(50):
        addresses.failed("n:1", 0.0, after_success=False)
    assert not addresses.may_follow("n:1", 59.9)
    assert addresses.may_follow("n:1", 60.0)
    assert addresses.may_follow("n:2", 0.0)


def test_failures_of_endless_addresses_are_forgotten_oldest_first() -> None:
    addresses = Addresses("h:1")
    for port in range(1, 1001):
        addresses.failed(f"n:{port}", 0.0, after_success=False)
    assert len(addresses._failed) == 256
    assert addresses.may_follow("n:1", 0.0)
    assert not addresses.may_follow("n:1000", 0.0)
