"""Around every call: who calls, whether their role allows it, how long it took, and what went wrong.

Rule: a servicer runs only with a caller (`current_caller`), save those of open services; and nothing but a status from
the table in errors.py leaves it. One interceptor does all of it, so that a stream pays for one wrapper.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
from typing_extensions import override

from outrider_server.access.keys import KeyRing, RandomBytes
from outrider_server.access.nodes import ASKED, PROOF, NodeAuthenticator
from outrider_server.access.policy import require_role
from outrider_server.api import errors
from outrider_server.api.peers import Peers, PeerStatus
from outrider_server.api.routing import Router
from outrider_server.domain.access import Caller
from outrider_server.domain.errors import (
    Exhausted,
    InvalidArgument,
    OutriderError,
    PermissionDenied,
    Unauthenticated,
)
from outrider_server.telemetry.counters import HomesCounters

Observe = Callable[[str, str, float], None]
"""Told of each ended call: full method name, status code's name, seconds."""

OPEN_SERVICES = frozenset(
    {
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
)
"""Services that answer without a key: they tell nothing of any tenant."""

OPEN_CALLS_MAX = 256
"""Calls without a key at a time: whoever watches health must not take the places of those who work."""

CALLS_READING_MAX = 32
KEY_CALLS_MAX = 8
"""Single calls at a time, of all keys and of one. Each may carry 11 MiB; further ones wait before they are read."""

_OWN_PACKAGE = "/outrider.v1."
_NODE_PACKAGE = "/outrider.node.v1."
_caller: ContextVar[Caller] = ContextVar("caller")
_passed_on: ContextVar[bool] = ContextVar("passed_on", default=False)


def current_caller() -> Caller:
    """The caller of the call that this code runs in."""
    return _caller.get()


@dataclass(frozen=True, slots=True)
class Nodes:
    """What an interceptor needs where there are several nodes. `address` is that of this one."""

    authenticator: NodeAuthenticator
    peers: Peers
    router: Router
    address: Callable[[], str]
    counters: HomesCounters


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Authenticates, checks roles, passes on what belongs to another node, maps errors and counts.

    `clock` gives monotonic seconds, `random` the references by which an unexpected error is found in the log. Of
    services beside our own that are not open, any valid key may ask.
    """

    def __init__(
        self,
        keys: KeyRing,
        *,
        observe: Observe,
        clock: Callable[[], float],
        random: RandomBytes,
        nodes: Nodes | None = None,
        open_services: Iterable[str] = OPEN_SERVICES,
    ) -> None:
        self._keys = keys
        self._nodes = nodes
        self._observe = observe
        self._clock = clock
        self._random = random
        self._open_services = frozenset(open_services)
        self._open_calls = 0
        self._places = asyncio.Semaphore(CALLS_READING_MAX)
        # Calls that other nodes passed on have their own: two nodes must not wait for each other's.
        self._node_places = asyncio.Semaphore(CALLS_READING_MAX)
        self._callers: dict[tuple[str, bool], _Share] = {}

    @override
    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:  # there is no such method; gRPC says so
            return None
        method = handler_call_details.method
        if handler.unary_unary is not None:
            # Served as a stream of one message, so that nothing is read before the caller is known and there is room.
            return grpc.stream_stream_rpc_method_handler(
                self._single(method, handler.unary_unary),
                request_deserializer=handler.request_deserializer,
                response_serializer=_serializer(handler.response_serializer),
            )
        for kind, make in _MAKERS.items():
            inner = getattr(handler, kind)
            if inner is not None:
                wrap = self._generator if inspect.isasyncgenfunction(inner) else self._coroutine
                return make(
                    wrap(method, inner, streams=kind != "unary_unary"),
                    request_deserializer=handler.request_deserializer,
                    response_serializer=handler.response_serializer,
                )
        return handler

    def _single(self, method: str, inner: Callable[..., Any]) -> Any:
        async def behaviour(_: Any, context: errors.ServicerContext) -> None:
            async with self._around(method, context, streams=False), self._reading(method):
                request = await context.read()
                if request is grpc.aio.EOF:
                    raise InvalidArgument("INVALID_ARGUMENT", "the call carries no message")
                passed_on = await self._pass_on(method, request, context)
                if passed_on is None:
                    await context.write(await inner(request, context))
                else:
                    await context.write(passed_on)

        return behaviour

    async def _pass_on(
        self, method: str, request: Any, context: errors.ServicerContext
    ) -> Answered | None:
        """The answer of the node that the call belongs to; None where that is this one."""
        caller = _caller.get(None)
        if self._nodes is None or caller is None or _passed_on.get():
            return None
        address = await self._nodes.router.address_of(method, request, caller)
        if address is None:
            return None
        self._nodes.counters.calls_passed_on += 1
        seconds = context.time_remaining()
        return Answered(
            await self._nodes.peers.forward(
                address, method, caller, request.SerializeToString(), seconds
            )
        )

    @contextlib.asynccontextmanager
    async def _reading(self, method: str) -> AsyncIterator[None]:
        """A place among the calls whose message may be in memory; a key has a share of them."""
        caller = _caller.get(None)
        if caller is None or not method.startswith(_OWN_PACKAGE):
            yield
            return
        key = (caller.key_id, _passed_on.get())
        waiting = self._callers.setdefault(key, _Share(asyncio.Semaphore(KEY_CALLS_MAX)))
        waiting.calls += 1
        try:
            async with waiting.places, self._node_places if _passed_on.get() else self._places:
                yield
        finally:
            waiting.calls -= 1
            if not waiting.calls:
                self._callers.pop(key, None)

    def _coroutine(self, method: str, inner: Callable[..., Any], *, streams: bool) -> Any:
        async def behaviour(request: Any, context: errors.ServicerContext) -> Any:
            async with self._around(method, context, streams=streams):
                return await inner(request, context)

        return behaviour

    def _generator(self, method: str, inner: Callable[..., Any], *, streams: bool) -> Any:
        async def behaviour(request: Any, context: errors.ServicerContext) -> AsyncIterator[Any]:
            async with (
                self._around(method, context, streams=streams),
                # Closed here rather than by the garbage collector: a stream's end must not be left to chance.
                contextlib.aclosing(inner(request, context)) as responses,
            ):
                async for response in responses:
                    yield response

        return behaviour

    @contextlib.asynccontextmanager
    async def _around(
        self, method: str, context: errors.ServicerContext, *, streams: bool
    ) -> AsyncIterator[None]:
        started = self._clock()
        code = grpc.StatusCode.CANCELLED.name
        is_open = self._is_open(method)
        self._open_calls += is_open
        try:
            if is_open and self._open_calls > OPEN_CALLS_MAX:
                raise Exhausted(
                    "OVERLOADED", "too many calls without a key are open; try again later"
                )
            caller = None if is_open else await self._authenticate(method, context)
            with contextlib.ExitStack() as stack:
                if caller is not None:
                    _caller.set(caller)
                    # Of a call that was passed on the key is watched where it came in.
                    if streams and not _passed_on.get():
                        stack.enter_context(self._keys.hold(caller))
                yield
            code = grpc.StatusCode.OK.name
        except PeerStatus as status:
            code = status.code.name
            metadata = (("grpc-status-details-bin", status.details),) if status.details else ()
            await context.abort(status.code, status.message, trailing_metadata=metadata)
        except OutriderError as error:
            code = errors.code_of(error).name
            await errors.abort(context, errors.status_of(error))
        except grpc.aio.AbortError:
            code = _name_of(context.code())
            raise
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller must get a status and the log the trace
            if context.done():
                return  # the caller left: what failed is our telling them
            code = grpc.StatusCode.INTERNAL.name
            reference = self._random(6).hex()
            errors.log_unexpected(error, method, reference)
            await errors.abort(context, errors.internal_status(reference))
        finally:
            self._open_calls -= is_open
            self._observe(method, code, self._clock() - started)

    def _is_open(self, method: str) -> bool:
        return method.rpartition("/")[0].removeprefix("/") in self._open_services

    async def _authenticate(self, method: str, context: errors.ServicerContext) -> Caller:
        metadata = context.invocation_metadata() or ()
        given = {key: str(value) for key, value in metadata}
        if self._nodes is not None and ASKED in given:
            caller, proof = self._nodes.authenticator.answer(given, self._nodes.address(), method)
            _passed_on.set(True)
            await context.send_initial_metadata(((PROOF, proof),))
        elif method.startswith(_NODE_PACKAGE):
            raise PermissionDenied("ROLE_TOO_LOW", "only nodes call this")
        else:
            caller = await self._keys.authenticate(_bearer(metadata))
        if method.startswith(_OWN_PACKAGE):
            require_role(caller, method)
        return caller


@dataclass(frozen=True, slots=True)
class Answered:
    """The bytes of an answer that another node gave."""

    data: bytes


def _serializer(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
    """What came from another node is bytes already."""

    def serialized(answer: Any) -> bytes:
        if isinstance(answer, Answered):
            return answer.data
        return answer if serialize is None else serialize(answer)

    return serialized


@dataclass(slots=True)
class _Share:
    """The places of one key, and how many of its calls use or want one."""

    places: asyncio.Semaphore
    calls: int = 0


_MAKERS: dict[str, Callable[..., Any]] = {
    "unary_stream": grpc.unary_stream_rpc_method_handler,
    "stream_unary": grpc.stream_unary_rpc_method_handler,
    "stream_stream": grpc.stream_stream_rpc_method_handler,
}


def _bearer(metadata: Iterable[Any]) -> str:
    values = [value for key, value in metadata if key == "authorization"]
    scheme, _, text = str(values[0] if values else "").partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthenticated(
            "MISSING_API_KEY", "send an API key as metadata: authorization: Bearer <key>"
        )
    if len(values) > 1:
        raise Unauthenticated("INVALID_API_KEY", "send one API key, not several")
    return text.strip()


def _name_of(code: Any) -> str:
    if isinstance(code, grpc.StatusCode):
        return code.name
    return next((known.name for known in grpc.StatusCode if known.value[0] == code), "UNKNOWN")
