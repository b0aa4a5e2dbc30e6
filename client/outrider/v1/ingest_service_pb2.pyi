import datetime

from google.api import annotations_pb2 as _annotations_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from outrider.v1 import error_reason_pb2 as _error_reason_pb2
from outrider.v1 import event_pb2 as _event_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PublishStreamRequest(_message.Message):
    __slots__ = ("open", "frame", "large_frame")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    LARGE_FRAME_FIELD_NUMBER: _ClassVar[int]
    open: OpenStream
    frame: Frame
    large_frame: LargeFrameRequest
    def __init__(self, open: _Optional[_Union[OpenStream, _Mapping]] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ..., large_frame: _Optional[_Union[LargeFrameRequest, _Mapping]] = ...) -> None: ...

class OpenStream(_message.Message):
    __slots__ = ("producer", "session")
    PRODUCER_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    producer: str
    session: int
    def __init__(self, producer: _Optional[str] = ..., session: _Optional[int] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("number", "tenant", "events")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    number: int
    tenant: str
    events: _containers.RepeatedCompositeFieldContainer[_event_pb2.Event]
    def __init__(self, number: _Optional[int] = ..., tenant: _Optional[str] = ..., events: _Optional[_Iterable[_Union[_event_pb2.Event, _Mapping]]] = ...) -> None: ...

class LargeFrameRequest(_message.Message):
    __slots__ = ("frame_bytes",)
    FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    frame_bytes: int
    def __init__(self, frame_bytes: _Optional[int] = ...) -> None: ...

class PublishStreamResponse(_message.Message):
    __slots__ = ("opened", "ack", "refused", "window", "large_frame", "going_away")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    LARGE_FRAME_FIELD_NUMBER: _ClassVar[int]
    GOING_AWAY_FIELD_NUMBER: _ClassVar[int]
    opened: StreamOpened
    ack: FrameAck
    refused: FrameRefused
    window: Window
    large_frame: LargeFrameGrant
    going_away: GoingAway
    def __init__(self, opened: _Optional[_Union[StreamOpened, _Mapping]] = ..., ack: _Optional[_Union[FrameAck, _Mapping]] = ..., refused: _Optional[_Union[FrameRefused, _Mapping]] = ..., window: _Optional[_Union[Window, _Mapping]] = ..., large_frame: _Optional[_Union[LargeFrameGrant, _Mapping]] = ..., going_away: _Optional[_Union[GoingAway, _Mapping]] = ...) -> None: ...

class StreamOpened(_message.Message):
    __slots__ = ("last_frame", "window", "frame_events_max", "frame_bytes_max", "node")
    LAST_FRAME_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    FRAME_EVENTS_MAX_FIELD_NUMBER: _ClassVar[int]
    FRAME_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    last_frame: int
    window: Window
    frame_events_max: int
    frame_bytes_max: int
    node: str
    def __init__(self, last_frame: _Optional[int] = ..., window: _Optional[_Union[Window, _Mapping]] = ..., frame_events_max: _Optional[int] = ..., frame_bytes_max: _Optional[int] = ..., node: _Optional[str] = ...) -> None: ...

class Window(_message.Message):
    __slots__ = ("frames", "bytes")
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    frames: int
    bytes: int
    def __init__(self, frames: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class LargeFrameGrant(_message.Message):
    __slots__ = ("frame_bytes",)
    FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    frame_bytes: int
    def __init__(self, frame_bytes: _Optional[int] = ...) -> None: ...

class GoingAway(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FrameAck(_message.Message):
    __slots__ = ("number", "ids", "results", "duplicate", "homes")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    HOMES_FIELD_NUMBER: _ClassVar[int]
    number: int
    ids: _containers.RepeatedCompositeFieldContainer[IdRange]
    results: _containers.RepeatedCompositeFieldContainer[EventResult]
    duplicate: bool
    homes: _containers.RepeatedCompositeFieldContainer[TenantHome]
    def __init__(self, number: _Optional[int] = ..., ids: _Optional[_Iterable[_Union[IdRange, _Mapping]]] = ..., results: _Optional[_Iterable[_Union[EventResult, _Mapping]]] = ..., duplicate: bool = ..., homes: _Optional[_Iterable[_Union[TenantHome, _Mapping]]] = ...) -> None: ...

class TenantHome(_message.Message):
    __slots__ = ("tenant", "address")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    address: str
    def __init__(self, tenant: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class IdRange(_message.Message):
    __slots__ = ("tenant", "first", "count", "step")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    first: int
    count: int
    step: int
    def __init__(self, tenant: _Optional[str] = ..., first: _Optional[int] = ..., count: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class EventResult(_message.Message):
    __slots__ = ("index", "id", "error", "duplicate")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    index: int
    id: int
    error: EventError
    duplicate: bool
    def __init__(self, index: _Optional[int] = ..., id: _Optional[int] = ..., error: _Optional[_Union[EventError, _Mapping]] = ..., duplicate: bool = ...) -> None: ...

class EventError(_message.Message):
    __slots__ = ("reason", "message")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: _error_reason_pb2.ErrorReason
    message: str
    def __init__(self, reason: _Optional[_Union[_error_reason_pb2.ErrorReason, str]] = ..., message: _Optional[str] = ...) -> None: ...

class FrameRefused(_message.Message):
    __slots__ = ("number", "reason", "message", "retry_after")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_FIELD_NUMBER: _ClassVar[int]
    number: int
    reason: _error_reason_pb2.ErrorReason
    message: str
    retry_after: _duration_pb2.Duration
    def __init__(self, number: _Optional[int] = ..., reason: _Optional[_Union[_error_reason_pb2.ErrorReason, str]] = ..., message: _Optional[str] = ..., retry_after: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class PublishRequest(_message.Message):
    __slots__ = ("parent", "events")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    parent: str
    events: _containers.RepeatedCompositeFieldContainer[_event_pb2.Event]
    def __init__(self, parent: _Optional[str] = ..., events: _Optional[_Iterable[_Union[_event_pb2.Event, _Mapping]]] = ...) -> None: ...

class PublishResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[EventResult]
    def __init__(self, results: _Optional[_Iterable[_Union[EventResult, _Mapping]]] = ...) -> None: ...
