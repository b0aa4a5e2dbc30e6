"""Which role each method needs: one table. A method that is not in it is nobody's."""

from __future__ import annotations

from collections.abc import Mapping

from outrider_server.domain.access import Caller, Role
from outrider_server.domain.errors import PermissionDenied

_PACKAGE = "outrider.v1"


def _table(services: Mapping[str, Mapping[Role, str]]) -> dict[str, Role]:
    return {
        f"/{_PACKAGE}.{service}/{method}": role
        for service, roles in services.items()
        for role, methods in roles.items()
        for method in methods.split()
    }


LOWEST_ROLES = _table(
    {
        "IngestService": {Role.PUBLISHER: "PublishStream Publish"},
        "EndpointService": {
            Role.INTEGRATION_ADMIN: "CreateEndpoint GetEndpoint ListEndpoints UpdateEndpoint DeleteEndpoint "
            "PauseEndpoint ResumeEndpoint EnableEndpoint RotateEndpointSecret",
        },
        "SubscriptionService": {
            Role.INTEGRATION_ADMIN: "CreateSubscription GetSubscription ListSubscriptions UpdateSubscription "
            "DeleteSubscription PauseSubscription ResumeSubscription",
        },
        "EventTypeService": {
            Role.INTEGRATION_ADMIN: "CreateEventType GetEventType ListEventTypes UpdateEventType DeleteEventType",
        },
        "TenantService": {
            Role.SYSTEM_ADMIN: "CreateTenant ListTenants DeleteTenant",
            Role.INTEGRATION_ADMIN: "GetTenant UpdateTenant",
        },
        "ApiKeyService": {
            Role.INTEGRATION_ADMIN: "CreateApiKey GetApiKey ListApiKeys DeleteApiKey",
        },
    }
)
"""Full method name -> the lowest role that may call it, within the tenants its key reaches."""


def require_role(caller: Caller, method: str) -> None:
    """Raise PermissionDenied unless the caller's role allows `method`, a full name such as /outrider.v1.X/Y."""
    lowest = LOWEST_ROLES.get(method)
    if lowest is None or caller.role < lowest:
        needed = "none that can be given" if lowest is None else lowest.name.lower()
        raise PermissionDenied(
            "ROLE_TOO_LOW",
            f"this call needs an API key of role {needed}; this one's is {caller.role.name.lower()}",
            metadata={"role": caller.role.name, "needed": needed.upper()},
        )


def require_tenant(caller: Caller, tenant: int | None) -> None:
    """Raise PermissionDenied unless the caller's key reaches `tenant`; None is what belongs to no tenant.

    Also raised, with the same words, where a tenant does not exist: else a key could find out which ones do.
    """
    if caller.tenant is not None and caller.tenant != tenant:
        raise out_of_scope()


def out_of_scope() -> PermissionDenied:
    """The error of a key that does not reach a tenant."""
    return PermissionDenied("TENANT_OUT_OF_SCOPE", "the API key does not reach this tenant")


def authorize(caller: Caller, method: str, tenant: int | None) -> None:
    """Raise PermissionDenied unless the caller may call `method` on `tenant` (None: on what belongs to no tenant)."""
    require_role(caller, method)
    require_tenant(caller, tenant)
    if tenant is None and caller.role < Role.SYSTEM_ADMIN:
        raise PermissionDenied("TENANT_OUT_OF_SCOPE", "the API key does not reach this")
