"""Hosts on one machine: network namespaces on a bridge where we may make them, else loopback addresses.

    namespaces      every host has its own addresses and routes: it can be cut off, wholly or from one other
    loopback        127.0.0.2, 127.0.0.3 and so on: hosts can be stopped and killed, and no wire can be cut

Rule: whatever was made is taken down by name when the block ends; names carry the process id, so runs do not meet.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

COMMAND_SECONDS_MAX = 10


def ip(*arguments: str, check: bool = True) -> str:
    """Run `ip`; returns what it said."""
    ran = subprocess.run(
        ["ip", *arguments], capture_output=True, text=True, timeout=COMMAND_SECONDS_MAX, check=False
    )
    assert not check or ran.returncode == 0, f"ip {' '.join(arguments)}: {ran.stderr}"
    return ran.stdout


@dataclass(frozen=True)
class Place:
    """Where a host lives. `namespace` is empty where it shares the machine's own network."""

    name: str
    address: str
    namespace: str = ""
    wire: str = ""

    @property
    def prefix(self) -> Sequence[str]:
        """What to put before a command so that it runs there."""
        return ("ip", "netns", "exec", self.namespace) if self.namespace else ()

    def unplug(self) -> None:
        """Nothing goes in or out any more. Nobody is told: no connection is refused or reset."""
        ip("link", "set", self.wire, "down")

    def plug_in(self) -> None:
        ip("link", "set", self.wire, "up")

    def lose_way_to(self, other: Place) -> None:
        """What this host sends to `other` is dropped, answers included; the other way round all arrives."""
        ip("-n", self.namespace, "route", "add", "blackhole", f"{other.address}/32")

    def find_way_to(self, other: Place) -> None:
        ip("-n", self.namespace, "route", "del", "blackhole", f"{other.address}/32")


@dataclass(frozen=True)
class Network:
    """A database's place, and one for each host. `here`: the address under which all of them reach this process."""

    here: str
    database: Place
    hosts: tuple[Place, ...]
    has_wires: bool


@contextmanager
def network(hosts: int) -> Iterator[Network]:
    """The best that this machine allows."""
    if can_make_namespaces():
        with _namespaces(hosts) as made:
            yield made
    else:
        yield Network(
            "127.0.0.1",
            Place("database", "127.0.0.1"),
            tuple(Place(f"host{n}", f"127.0.0.{n + 1}") for n in range(1, hosts + 1)),
            has_wires=False,
        )


def can_make_namespaces() -> bool:
    """Whether we are root, with `ip`, on a machine that lets us make namespaces and wires between them."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("nsenter") is None:
        return False
    name = f"ort{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b", "netns", name)
        ip("link", "add", f"{name}r", "type", "bridge")
    except AssertionError:
        return False
    finally:
        ip("link", "del", f"{name}r", check=False)
        ip("link", "del", f"{name}a", check=False)
        ip("netns", "del", name, check=False)
    return True


@contextmanager
def _namespaces(hosts: int) -> Iterator[Network]:
    # A link's name has at most 15 characters, and a subnet of its own keeps two runs apart.
    mark = f"or{os.getpid()}"
    subnet = f"10.231.{os.getpid() % 250}"
    bridge = f"{mark}r"
    made: list[Place] = []
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("addr", "add", f"{subnet}.1/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for number in range(hosts + 1):
            place = Place(
                f"host{number}" if number else "database",
                f"{subnet}.{number + 10}",
                f"{mark}n{number}",
                f"{mark}w{number}",
            )
            made.append(place)
            ip("netns", "add", place.namespace)
            ip("link", "add", place.wire, "type", "veth", "peer", "eth0", "netns", place.namespace)
            ip("link", "set", place.wire, "master", bridge, "up")
            ip("-n", place.namespace, "addr", "add", f"{place.address}/24", "dev", "eth0")
            ip("-n", place.namespace, "link", "set", "eth0", "up")
            ip("-n", place.namespace, "link", "set", "lo", "up")
        yield Network(f"{subnet}.1", made[0], tuple(made[1:]), has_wires=True)
    finally:
        for place in made:
            ip("link", "del", place.wire, check=False)
            ip("netns", "del", place.namespace, check=False)
        ip("link", "del", bridge, check=False)
