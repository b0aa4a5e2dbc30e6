"""What every management call checks the same way: the protos' own rules, texts, page tokens, etags, update masks."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, TypeVar

import protovalidate
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from outrider_server.domain.errors import Aborted, InvalidArgument, OutriderError

PAGE_SIZE_DEFAULT = 100
VIOLATIONS_MAX = 20
_CHECK_BYTES = 8

M = TypeVar("M", bound=Message)


def check(message: Message, prefix: str = "") -> None:
    """Raise InvalidArgument unless the message keeps the rules of its proto, and its texts hold no NUL.

    `prefix` is where the message stands in the request.
    """
    nul = [(_join(prefix, path), "must not hold a NUL character") for path in _nul_texts(message)]
    if nul:
        raise InvalidArgument(
            "INVALID_TEXT", f"{nul[0][0]} {nul[0][1]}", violations=nul[:VIOLATIONS_MAX]
        )
    found = protovalidate.collect_violations(message)
    if found:
        violations = [
            (_join(prefix, _path(violation.proto.field)), violation.proto.message)
            for violation in found[:VIOLATIONS_MAX]
        ]
        path, problem = violations[0]
        raise InvalidArgument("INVALID_ARGUMENT", f"{path} {problem}", violations=violations)


def invalid(field: str, problem: str, reason: str = "INVALID_ARGUMENT") -> InvalidArgument:
    """The error of one field."""
    return InvalidArgument(reason, f"{field}: {problem}", violations=[(field, problem)])


def placed(error: OutriderError, prefix: str, *, reason: str = "") -> InvalidArgument:
    """The same error with its violations where they stand in the request: below `prefix`, or at it."""
    violations = [(_join(prefix, field), text) for field, text in error.violations]
    return InvalidArgument(
        reason or error.reason,
        error.message,
        metadata=error.metadata,
        violations=violations or [(prefix, error.message)],
    )


def page_size(given: int) -> int:
    """How many a page may hold."""
    return given or PAGE_SIZE_DEFAULT


def page_token(query: str, last: str) -> str:
    """The token of the page behind `last`, good for this query alone."""
    return base64.urlsafe_b64encode(_check_bytes(query, last) + last.encode()).decode().rstrip("=")


def parse_page_token(query: str, token: str) -> str:
    """The last name of the page before; empty for the first page."""
    if not token:
        return ""
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        last = raw[_CHECK_BYTES:].decode()
    except (binascii.Error, ValueError):
        raise _bad_page_token() from None
    if raw[:_CHECK_BYTES] != _check_bytes(query, last):
        raise _bad_page_token()
    return last


def etag(created_at: datetime, version: int) -> str:
    """Differs from version to version, and from what had the same name before."""
    made = hashlib.blake2b(created_at.isoformat().encode(), digest_size=6).hexdigest()
    return f"{made}-{version:x}"


def require_etag(given: str, current: str, resource: str) -> None:
    """Raise Aborted where a caller's etag is not the current one."""
    if given and given != current:
        raise Aborted(
            "ETAG_MISMATCH",
            f"{resource} changed since it was read; read it again",
            metadata={"resource": resource},
        )


def merged(
    current: M,
    given: M,
    mask: FieldMask,
    *,
    changeable: Sequence[str],
    immutable: Sequence[str] = (),
) -> tuple[M, frozenset[str]]:
    """`current` with the fields that the mask names taken from `given`, and the top-level fields that are.

    An empty mask names every changeable field that is set, `*` every changeable one. An immutable field may be named
    as long as it does not change. Anything else in a mask is an error.
    """
    result = type(current)()
    result.CopyFrom(current)
    paths = _paths(given, mask, changeable, immutable)
    for path in paths:
        top = path.partition(".")[0]
        if top not in changeable:
            if top in immutable and getattr(given, top) == getattr(current, top):
                continue
            raise invalid("update_mask", f"{path} cannot be changed")
        _copy(given, result, path.split("."))
    return result, frozenset(path.partition(".")[0] for path in paths)


def _paths(
    given: Message, mask: FieldMask, changeable: Sequence[str], immutable: Sequence[str]
) -> list[str]:
    if list(mask.paths) == ["*"]:
        return list(changeable)
    if not mask.paths:
        set_fields = {field.name for field, _ in given.ListFields()}
        return [name for name in (*changeable, *immutable) if name in set_fields]
    for path in mask.paths:
        if not _exists(given.DESCRIPTOR, path.split(".")):
            raise invalid("update_mask", f"there is no field {path[:100]!r}")
    return list(mask.paths)


def _exists(descriptor: Any, path: list[str]) -> bool:
    field = descriptor.fields_by_name.get(path[0])
    if field is None:
        return False
    if len(path) == 1:
        return True
    # Lists and maps change as a whole.
    return (
        field.message_type is not None
        and not field.is_repeated
        and field.message_type.full_name.startswith("outrider.")
        and _exists(field.message_type, path[1:])
    )


def _copy(source: Any, target: Any, path: list[str]) -> None:
    name = path[0]
    if len(path) > 1:
        _copy(getattr(source, name), getattr(target, name), path[1:])
        return
    target.ClearField(name)
    field = source.DESCRIPTOR.fields_by_name[name]
    if field.is_repeated or field.message_type is not None:
        if field.is_repeated or source.HasField(name):
            # Merging into a cleared field is a copy, for messages, lists and maps alike.
            part = type(source)()
            part.CopyFrom(source)
            for other in part.DESCRIPTOR.fields:
                if other.name != name:
                    part.ClearField(other.name)
            target.MergeFrom(part)
    elif not field.has_presence or source.HasField(name):
        setattr(target, name, getattr(source, name))


def _nul_texts(message: Message, path: str = "") -> Iterator[str]:
    for field, value in message.ListFields():
        here = _join(path, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            if any(isinstance(x, str) and "\0" in x for pair in value.items() for x in pair):
                yield here
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            for item in value if field.is_repeated else (value,):
                yield from _nul_texts(item, here)
        elif field.type == FieldDescriptor.TYPE_STRING and any(
            "\0" in text for text in (value if field.is_repeated else (value,))
        ):
            yield here


def _path(field: Any) -> str:
    if field is None:
        return ""
    parts = []
    for element in field.elements:
        text = element.field_name
        if element.subscript is not None:
            text += f"[{element.subscript.value}]"
        parts.append(text)
    return ".".join(parts)


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix and path else prefix or path


def _check_bytes(query: str, last: str) -> bytes:
    # Not a secret: a forged token gets its maker no further than the same query from its start would.
    return hashlib.blake2b(f"{query}\0{last}".encode(), digest_size=_CHECK_BYTES).digest()


def _bad_page_token() -> InvalidArgument:
    return invalid(
        "page_token", "this is not a token that the same query returned", "INVALID_PAGE_TOKEN"
    )
