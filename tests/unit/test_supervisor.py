"""An address that cannot be listened on is told before anything is started."""

from __future__ import annotations

import socket

import pytest

from outrider_server.supervisor import AddressUnusable, require_free


def test_a_taken_port_is_refused_and_a_free_one_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(AddressUnusable, match=r"already in use.*with --listen-address\.$"):
            require_free(address, "--listen-address")
    require_free(address, "--listen-address")
    require_free("127.0.0.1:0", "--listen-address")


def test_an_address_of_another_host_is_refused() -> None:
    with pytest.raises(AddressUnusable, match=r"Cannot listen on 192\.0\.2\.1"):
        require_free("192.0.2.1:4510", "--listen-address")
