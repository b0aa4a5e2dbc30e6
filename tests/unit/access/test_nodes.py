"""Nodes prove themselves to each other, and what was asked once is not done twice."""

from __future__ import annotations

import random

import orjson
import pytest

from outrider_server.access import nodes
from outrider_server.access.nodes import ASKED, ASKED_MAC, TOKEN_SECONDS_MAX, NodeAuthenticator
from outrider_server.domain.access import Caller, Role
from outrider_server.domain.errors import Unauthenticated

OLD, NEW, FOREIGN = b"o" * 32, b"n" * 32, b"f" * 32
CALLER = Caller("key-1", Role.INTEGRATION_ADMIN, 7)
ADDRESS, METHOD = "10.0.0.2:7443", "/outrider.v1.IngestService/Publish"
SECOND_US = 1_000_000
START_US = 1_800_000_000_123_456


class Side:
    """One node: its keys and its clock, which a test sets."""

    def __init__(self, *keys: bytes, seed: int = 1) -> None:
        self.now_us = START_US
        self.node = NodeAuthenticator(
            keys, now_us=lambda: self.now_us, random=random.Random(seed).randbytes
        )

    def ask(self, caller: Caller = CALLER) -> tuple[dict[str, str], str]:
        metadata, nonce = self.node.ask(ADDRESS, METHOD, caller)
        return dict(metadata), nonce

    def answer(
        self, metadata: dict[str, str], address: str = ADDRESS, method: str = METHOD
    ) -> tuple[Caller, str]:
        return self.node.answer(metadata, address, method)

    def refuses(
        self, metadata: dict[str, str], why: str, address: str = ADDRESS, method: str = METHOD
    ) -> None:
        with pytest.raises(Unauthenticated, match=why) as caught:
            self.answer(metadata, address, method)
        assert caught.value.reason == "INVALID_API_KEY"


@pytest.fixture
def asker() -> Side:
    return Side(NEW)


@pytest.fixture
def asked() -> Side:
    return Side(NEW, seed=2)


@pytest.mark.parametrize(
    "caller", [CALLER, Caller("root", Role.SYSTEM_ADMIN, None), Caller("p", Role.PUBLISHER, 1)]
)
def test_both_sides_prove_that_they_share_the_keys(
    asker: Side, asked: Side, caller: Caller
) -> None:
    metadata, nonce = asker.ask(caller)
    found, proof = asked.answer(metadata)
    assert found == caller
    assert asker.node.is_proof(nonce, proof)
    # A proof is of one call, and what was sent is none.
    assert not asker.node.is_proof(asker.ask()[1], proof)
    assert not asker.node.is_proof(nonce, metadata[ASKED_MAC])


def test_a_node_of_other_keys_is_refused_and_proves_nothing(asker: Side, asked: Side) -> None:
    foreign = Side(FOREIGN)
    metadata, nonce = foreign.ask()
    asked.refuses(metadata, "does not share this installation's keys")
    metadata, nonce = asker.ask()
    foreign.refuses(metadata, "does not share this installation's keys")
    foreign_metadata, _ = Side(FOREIGN).ask()
    _, proof = foreign.answer(foreign_metadata)
    assert not asker.node.is_proof(nonce, proof)


@pytest.mark.parametrize("mac", ["", "0" * 64, "é" * 32, None])
def test_a_token_without_its_mac_is_refused(asker: Side, asked: Side, mac: str | None) -> None:
    metadata, nonce = asker.ask()
    if mac is None:
        del metadata[ASKED_MAC]
    else:
        metadata[ASKED_MAC] = mac
    asked.refuses(metadata, "does not share this installation's keys")
    assert not asker.node.is_proof(nonce, mac or "")


def test_nothing_of_a_token_can_be_changed(asker: Side, asked: Side) -> None:
    metadata, _ = asker.ask()
    fields = orjson.loads(metadata[ASKED])
    for index in range(len(fields)):
        changed = [*fields]
        changed[index] = "x" if isinstance(fields[index], str) else fields[index] + 1
        asked.refuses(
            metadata | {ASKED: orjson.dumps(changed).decode()},
            "does not share this installation's keys",
        )
    assert asked.answer(metadata)[0] == CALLER


def test_a_token_is_for_one_address_and_one_method(asker: Side, asked: Side) -> None:
    metadata, _ = asker.ask()
    asked.refuses(metadata, "meant for another node", address="10.0.0.3:7443")
    asked.refuses(metadata, "meant for another node", method=METHOD + "Stream")
    # It was not used up by that.
    assert asked.answer(metadata)[0] == CALLER


@pytest.mark.parametrize("sign", [-1, 1], ids=["too old", "too new"])
def test_a_token_holds_for_a_minute_around_its_time(asker: Side, asked: Side, sign: int) -> None:
    asker.now_us = START_US + sign * TOKEN_SECONDS_MAX * SECOND_US
    assert asked.answer(asker.ask()[0])[0] == CALLER
    asker.now_us += sign
    asked.refuses(asker.ask()[0], "too old, or the clocks differ")


@pytest.mark.parametrize("ahead_seconds", [-TOKEN_SECONDS_MAX, -1, 0, 1, TOKEN_SECONDS_MAX])
def test_a_token_is_answered_once_for_as_long_as_it_holds(
    asker: Side, asked: Side, ahead_seconds: int
) -> None:
    asker.now_us = at_us = START_US + ahead_seconds * SECOND_US
    metadata, _ = asker.ask()
    asked.answer(metadata)
    last_us = at_us + TOKEN_SECONDS_MAX * SECOND_US
    while asked.now_us <= last_us:
        asked.refuses(metadata, "came before")
        # Other calls go on meanwhile: they are what nonces are forgotten for.
        asker.now_us = asked.now_us
        asked.answer(asker.ask()[0])
        if asked.now_us == last_us:
            break
        asked.now_us = min(last_us, asked.now_us + 7 * SECOND_US)
    asked.now_us = last_us + 1
    asked.refuses(metadata, "too old")


def test_a_clock_that_is_set_back_brings_no_token_back(asker: Side, asked: Side) -> None:
    metadata, _ = asker.ask()
    asked.answer(metadata)
    asker.now_us = asked.now_us = START_US + 2 * TOKEN_SECONDS_MAX * SECOND_US
    asked.answer(asker.ask()[0])
    asker.now_us = asked.now_us = START_US + SECOND_US
    asked.refuses(metadata, "too old, or the clocks differ")


def test_nonces_have_a_bound_and_make_room_when_their_tokens_are_over(
    asker: Side, asked: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert nodes.NONCES_MAX == 300_000
    monkeypatch.setattr(nodes, "NONCES_MAX", 10)
    first, _ = asker.ask()
    asked.answer(first)
    asker.now_us = START_US + 30 * SECOND_US  # these are ahead of the other's clock
    for _ in range(9):
        asked.answer(asker.ask()[0])
    refused, _ = asker.ask()
    asked.refuses(refused, "too many calls")
    asked.refuses(first, "came before")
    # The first is over a minute after its time; the others only half a minute later.
    asked.now_us = START_US + (TOKEN_SECONDS_MAX + 1) * SECOND_US
    asked.answer(refused)
    asked.refuses(asker.ask()[0], "too many calls")
    asker.now_us = asked.now_us = START_US + (TOKEN_SECONDS_MAX + 31) * SECOND_US
    for _ in range(10):
        asked.answer(asker.ask()[0])
    asked.refuses(asker.ask()[0], "too many calls")


def test_keys_are_replaced_while_nodes_run(asked: Side) -> None:
    """Some have the new key first, some only the old one yet: both ends prove themselves by the one they share."""
    before, after = Side(OLD, seed=3), Side(NEW, OLD, seed=4)
    metadata, nonce = before.ask()
    caller, proof = after.answer(metadata)
    assert caller == CALLER
    assert before.node.is_proof(nonce, proof)
    # Whoever asks does so by the newest; the one that does not know it yet refuses.
    metadata, nonce = after.ask()
    before.refuses(metadata, "does not share this installation's keys")
    _, proof = asked.answer(metadata)
    assert after.node.is_proof(nonce, proof)
    asked.refuses(before.ask()[0], "does not share this installation's keys")
