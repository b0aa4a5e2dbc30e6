"""The table of roles, against the protos it speaks of."""

from __future__ import annotations

import pytest

from outrider.v1 import (
    api_key_service_pb2,
    endpoint_service_pb2,
    event_type_service_pb2,
    ingest_service_pb2,
    subscription_service_pb2,
    tenant_service_pb2,
)
from outrider_server.access.policy import LOWEST_ROLES, authorize, require_role, require_tenant
from outrider_server.domain.access import Caller, Role
from outrider_server.domain.errors import PermissionDenied

GET = "/outrider.v1.EndpointService/GetEndpoint"


def test_every_method_has_its_role_and_no_role_is_of_nothing() -> None:
    methods = {
        f"/{service.full_name}/{method.name}"
        for file in (
            api_key_service_pb2,
            endpoint_service_pb2,
            event_type_service_pb2,
            ingest_service_pb2,
            subscription_service_pb2,
            tenant_service_pb2,
        )
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert methods == LOWEST_ROLES.keys()


def test_publishers_may_publish_and_nothing_else() -> None:
    allowed = {method for method, role in LOWEST_ROLES.items() if role <= Role.PUBLISHER}
    assert allowed == {
        "/outrider.v1.IngestService/Publish",
        "/outrider.v1.IngestService/PublishStream",
    }


@pytest.mark.parametrize(
    ("role", "method", "refused"),
    [
        (Role.PUBLISHER, GET, True),
        (Role.INTEGRATION_ADMIN, GET, False),
        (Role.SYSTEM_ADMIN, GET, False),
        (Role.INTEGRATION_ADMIN, "/outrider.v1.TenantService/CreateTenant", True),
        (Role.SYSTEM_ADMIN, "/outrider.v1.TenantService/CreateTenant", False),
        (Role.SYSTEM_ADMIN, "/outrider.v1.EndpointService/Unlisted", True),
    ],
)
def test_role_decides(role: Role, method: str, refused: bool) -> None:
    caller = Caller("k", role, None)
    if not refused:
        require_role(caller, method)
        return
    with pytest.raises(PermissionDenied) as caught:
        require_role(caller, method)
    assert caught.value.reason == "ROLE_TOO_LOW"


def test_key_of_one_tenant_reaches_that_one_alone() -> None:
    own, system = Caller("k", Role.INTEGRATION_ADMIN, 1), Caller("s", Role.SYSTEM_ADMIN, None)
    authorize(own, GET, 1)
    for tenant in (1, 2, None):
        authorize(system, GET, tenant)
    messages = set()
    for other in (2, None):
        with pytest.raises(PermissionDenied) as caught:
            require_tenant(own, other)
        assert caught.value.reason == "TENANT_OUT_OF_SCOPE"
        messages.add(str(caught.value))
    assert len(messages) == 1
