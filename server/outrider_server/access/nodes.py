"""Nodes know each other by the keys that they share: the ones that seal what is in the database.

    caller -> node:  outrider-node: what is asked, by whom, of which address, when, and a nonce;  outrider-node-mac: its MAC
    node -> caller:  outrider-node-proof: a MAC of the nonce, before anything of the call is sent

Rule: nothing of a tenant leaves for a peer that has not proved that it knows the keys, and nothing is done for one. What
was asked once is not answered twice: a token names its receiver, holds for a minute before and after its time, and its
nonce is remembered for as long as it could be accepted.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable, Mapping

import orjson

from outrider_server.domain.access import Caller, Role
from outrider_server.domain.errors import Unauthenticated

ASKED = "outrider-node"
ASKED_MAC = "outrider-node-mac"
PROOF = "outrider-node-proof"

TOKEN_SECONDS_MAX = 60
NONCES_MAX = 300_000
NONCE_BYTES = 16

_SECOND_US = 1_000_000


class NodeAuthenticator:
    """Makes and checks the tokens of calls between nodes. `keys`: the shared ones, the newest first.

    `now_us` is the database's clock, which all nodes have in common.
    """

    def __init__(
        self,
        keys: Iterable[bytes],
        *,
        now_us: Callable[[], int],
        random: Callable[[int], bytes],
    ) -> None:
        self._keys = [hmac.digest(key, b"outrider node authentication", "sha256") for key in keys]
        self._now_us = now_us
        self._random = random
        # By the second of their tokens' times: tokens come in any order, and end with their second.
        self._nonces: dict[int, set[bytes]] = {}
        self._nonces_count = 0
        self._forgotten_s = 0

    def ask(self, address: str, method: str, caller: Caller) -> tuple[list[tuple[str, str]], str]:
        """The metadata of a call to the node at `address` on behalf of `caller`; and its nonce."""
        nonce = self._random(NONCE_BYTES).hex()
        asked = orjson.dumps(
            [address, method, self._now_us(), nonce, caller.key_id, int(caller.role), caller.tenant]
        ).decode()
        return [(ASKED, asked), (ASKED_MAC, _mac(self._keys[0], asked))], nonce

    def answer(self, metadata: Mapping[str, str], address: str, method: str) -> tuple[Caller, str]:
        """Who calls through another node, and the proof to send; raises Unauthenticated."""
        asked = metadata[ASKED]
        given = metadata.get(ASKED_MAC, "")
        key = next((k for k in self._keys if _is_same(_mac(k, asked), given)), None)
        if key is None:
            raise _refused("the peer does not share this installation's keys")
        to, of, at_us, nonce, key_id, role, tenant = orjson.loads(asked)
        if (to, of) != (address, method):
            raise _refused("the call was meant for another node")
        now_us = self._now_us()
        if abs(now_us - at_us) > TOKEN_SECONDS_MAX * _SECOND_US:
            raise _refused("the call is too old, or the clocks differ")
        self._remember(bytes.fromhex(nonce), at_us, now_us)
        return Caller(key_id, Role(role), tenant), _proof(key, nonce)

    def is_proof(self, nonce: str, proof: str) -> bool:
        """Whether a peer that answered so knows the keys."""
        return any(_is_same(_proof(key, nonce), proof) for key in self._keys)

    def _remember(self, nonce: bytes, at_us: int, now_us: int) -> None:
        over_s = (now_us - TOKEN_SECONDS_MAX * _SECOND_US) // _SECOND_US
        if over_s > self._forgotten_s:
            self._forgotten_s = over_s
            for second in [second for second in self._nonces if second < over_s]:
                self._nonces_count -= len(self._nonces.pop(second))
        second = at_us // _SECOND_US
        if second < self._forgotten_s:  # the clock was set back: nobody knows whether it came
            raise _refused("the call is too old, or the clocks differ")
        nonces = self._nonces.setdefault(second, set())
        if nonce in nonces:
            raise _refused("the call came before")
        if self._nonces_count >= NONCES_MAX:
            raise _refused("too many calls between nodes")
        nonces.add(nonce)
        self._nonces_count += 1


def _is_same(expected: str, given: str) -> bool:
    # As bytes: what was given may hold anything, and texts are compared only in ASCII.
    return hmac.compare_digest(expected.encode(), given.encode())


def _mac(key: bytes, text: str) -> str:
    return hmac.digest(key, text.encode(), hashlib.sha256).hex()


def _proof(key: bytes, nonce: str) -> str:
    return _mac(key, "proof " + nonce)


def _refused(why: str) -> Unauthenticated:
    return Unauthenticated("INVALID_API_KEY", f"this is no call of a node: {why}")
