"""The addresses of the service, looked at before anything is started, and the public port, held for the workers."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

from outrider_server.settings import join_address, split_address


class AddressUnusable(Exception):
    """Nothing can listen on a configured address; the message says what to do."""


def require_free(address: str, knob: str) -> None:
    """AddressUnusable where somebody listens on `address` already, or this host does not have it.

    Another may still take it before the server does; it is asked to save the start of a database in the usual case.
    """
    host, port = split_address(address)
    if port == 0:
        return
    try:
        family, where = _resolve(host, port)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As servers do: connections of an earlier run that linger do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen(1)
    except OSError as error:
        raise unusable(address, knob, error) from None


@contextlib.contextmanager
def reserved(address: str, knob: str) -> Iterator[str]:
    """Hold `address` for processes of ours that will listen on it, each with SO_REUSEPORT; gives it with its real port.

    Nobody listens here, so no connection is ever given to this socket. It keeps the port while no worker runs: from
    others, who would find it free, and the one that the system chose, which the next worker must get again. Two
    services that are started in the same moment may both get it: the look for a listener and the hold are two steps.
    """
    require_free(address, knob)
    host, port = split_address(address)
    with contextlib.ExitStack() as stack:
        try:
            family, where = _resolve(host, port)
            held = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind(where)
            # Bound beside what lingers, but from now on in the way of whoever looks whether the port is free.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        except OSError as error:
            raise unusable(address, knob, error) from None
        yield join_address(host, held.getsockname()[1])


def unusable(address: str, knob: str, error: OSError) -> AddressUnusable:
    """Why nothing can listen on `address`, and what to do."""
    # Name look-ups have numbers of their own, below zero.
    number = error.errno or 0
    why = os.strerror(number).lower() if number > 0 else error.strerror or str(error)
    return AddressUnusable(
        f"Cannot listen on {address} ({why}): stop what uses that port, or choose another address with {knob}."
    )


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[object, ...]]:
    family, _, _, _, where = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    return family, where
