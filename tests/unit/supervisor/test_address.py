"""An address that cannot be listened on is told before anything is started; the public port is held for the workers."""

from __future__ import annotations

import socket

import pytest

from outrider_server.settings import split_address
from outrider_server.supervisor.address import AddressUnusable, require_free, reserved

needs_reuse_port = pytest.mark.skipif(
    not hasattr(socket, "SO_REUSEPORT"), reason="this system has no SO_REUSEPORT"
)


def shared_listener(address: str) -> socket.socket:
    """A listener as a worker makes it."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind(split_address(address))
    made.listen(64)
    return made


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
    with (
        pytest.raises(AddressUnusable, match=r"Cannot listen on 192\.0\.2\.1"),
        reserved("192.0.2.1:0", "listen_address"),
    ):
        pass


@needs_reuse_port
def test_workers_share_the_port_that_is_held_and_get_every_connection() -> None:
    with reserved("127.0.0.1:0", "listen_address") as address:
        host, port = split_address(address)
        assert port
        with pytest.raises(ConnectionRefusedError):  # nobody waits in a queue that no worker reads
            socket.create_connection((host, port), timeout=5)
        with shared_listener(address) as one, shared_listener(address) as other:
            for listener in (one, other):
                listener.settimeout(0)
            accepted = 0
            clients = [socket.create_connection((host, port), timeout=5) for _ in range(30)]
            for listener in (one, other):
                while True:
                    try:
                        listener.accept()[0].close()
                    except BlockingIOError:
                        break
                    accepted += 1
            for client in clients:
                client.close()
            assert accepted == 30


@needs_reuse_port
def test_a_port_that_is_held_is_refused_to_others_before_and_while_workers_listen() -> None:
    with reserved("127.0.0.1:0", "listen_address") as address:
        with pytest.raises(AddressUnusable, match="already in use"):
            require_free(address, "listen_address")
        with (
            shared_listener(address),
            pytest.raises(AddressUnusable, match="already in use"),
            reserved(address, "listen_address"),
        ):
            pass
    require_free(address, "listen_address")


@needs_reuse_port
def test_a_foreign_listener_is_refused_though_it_would_share() -> None:
    with (
        shared_listener("127.0.0.1:0") as foreign,
        pytest.raises(AddressUnusable, match=r"already in use.*with listen_address\.$"),
        reserved(f"127.0.0.1:{foreign.getsockname()[1]}", "listen_address"),
    ):
        pass


@needs_reuse_port
def test_connections_of_an_earlier_run_that_linger_do_not_count() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with socket.create_connection(listener.getsockname()) as client:
            accepted, _ = listener.accept()
            accepted.close()  # the side that closes first lingers
            assert client.recv(1) == b""
    with reserved(address, "listen_address") as held, shared_listener(held):
        assert held == address
