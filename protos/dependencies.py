"""Write the descriptors of the protos that ours import, as one FileDescriptorSet, to the file named.

`buf/validate/validate.proto` comes from the protovalidate that the server validates with, so stubs and rules cannot
drift apart; `google/api/*.proto` from googleapis-common-protos. Usage: python protos/dependencies.py OUT.binpb
"""

from __future__ import annotations

import sys
from pathlib import Path

from google.api import (  # type: ignore[import-untyped]  # publishes no type information
    annotations_pb2,
    field_behavior_pb2,
    http_pb2,
    resource_pb2,
)
from google.protobuf import (
    descriptor_pb2,
    duration_pb2,
    empty_pb2,
    field_mask_pb2,
    timestamp_pb2,
)
from protovalidate._gen.buf.validate import validate_pb


def dependencies() -> descriptor_pb2.FileDescriptorSet:
    """Every imported file, each after those it imports itself."""
    files = descriptor_pb2.FileDescriptorSet()
    google = (
        descriptor_pb2,
        duration_pb2,
        empty_pb2,
        field_mask_pb2,
        timestamp_pb2,
        http_pb2,
        annotations_pb2,
        field_behavior_pb2,
        resource_pb2,
    )
    for module in google:
        files.file.add().ParseFromString(module.DESCRIPTOR.serialized_pb)
    files.file.add().ParseFromString(validate_pb.desc().proto.to_binary())
    return files


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(dependencies().SerializeToString())
