"""Reflection, so that tools can list and describe what is served: versions v1 and v1alpha, which differ in name only.

The library's servicer speaks v1alpha alone and does not know the names of methods and fields; this one finds the file
they stand in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc
from typing_extensions import override

SERVICE_NAMES = ("grpc.reflection.v1.ServerReflection", reflection.SERVICE_NAME)


class Reflection(reflection.aio.ReflectionServicer):
    """Describes `services` and whatever they refer to."""

    @override
    def _file_containing_symbol(self, request: Any, fully_qualified_name: str) -> Any:
        # The library has no type information.
        find: Callable[[Any, str], Any] = super()._file_containing_symbol
        return find(request, _enclosing(fully_qualified_name))


def add_reflection(server: grpc.aio.Server, services: Iterable[str]) -> None:
    """Serve reflection of `services` under both of its names."""
    make: Callable[[list[str]], Any] = Reflection
    add: Callable[[Any, Any], None] = reflection_pb2_grpc.add_ServerReflectionServicer_to_server
    servicer = make([*services, reflection.SERVICE_NAME])
    add(servicer, server)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE_NAMES[0], {"ServerReflectionInfo": handler}),)
    )


def _enclosing(name: str) -> str:
    """The service or message that `name` is a method or field of; `name` itself where it is neither."""
    pool: Any = descriptor_pool.Default()
    for find, parent in (
        (pool.FindMethodByName, "containing_service"),
        (pool.FindFieldByName, "containing_type"),
    ):
        try:
            return str(getattr(find(name), parent).full_name)
        except (KeyError, AttributeError):
            continue
    return name
