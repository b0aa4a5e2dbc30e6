"""Channels to a server, with the settings that a long-lived stream and short calls need.

Rule: the API key travels in each call's metadata and is never part of a channel, so a channel may be shared.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

_READS = (
    ("EndpointService", ("GetEndpoint", "ListEndpoints")),
    ("SubscriptionService", ("GetSubscription", "ListSubscriptions")),
    ("EventTypeService", ("GetEventType", "ListEventTypes")),
    ("TenantService", ("GetTenant", "ListTenants")),
    ("ApiKeyService", ("GetApiKey", "ListApiKeys")),
)

SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                # Only reads: a write may have been carried out although its answer was lost.
                "name": [
                    {"service": f"outrider.v1.{service}", "method": method}
                    for service, methods in _READS
                    for method in methods
                ],
                "timeout": "30s",
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)

_OPTIONS: tuple[tuple[str, Any], ...] = (
    # An idle stream through a NAT or a load balancer dies silently; a ping each half minute shows it.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC's own pause between connection attempts grows to two minutes, far beyond ours.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 3_000),
)


def open_channel(
    target: str,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    options: Sequence[tuple[str, Any]] = (),
    retries: bool = True,
) -> grpc.aio.Channel:
    """A channel to `target` (`host:port` or any gRPC target); without `credentials` it is not encrypted.

    `options` win over the defaults. `retries=False` is for streams, whose messages gRPC would otherwise keep for a
    retry that the publisher does itself.
    """
    merged: dict[str, Any] = dict(_OPTIONS)
    if retries:
        merged["grpc.service_config"] = SERVICE_CONFIG
    else:
        merged["grpc.enable_retries"] = 0
    merged.update(options)
    pairs = list(merged.items())
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=pairs)
    return grpc.aio.secure_channel(target, credentials, options=pairs)


def tls(
    *,
    ca: Path | None = None,
    certificate: Path | None = None,
    key: Path | None = None,
) -> grpc.ChannelCredentials:
    """TLS credentials from PEM files: the system's authorities, or `ca`; `certificate` and `key` for mutual TLS."""
    if (certificate is None) != (key is None):
        raise ValueError("certificate and key go together")
    return grpc.ssl_channel_credentials(
        root_certificates=ca.read_bytes() if ca else None,
        private_key=key.read_bytes() if key else None,
        certificate_chain=certificate.read_bytes() if certificate else None,
    )


def bearer(api_key: str) -> tuple[tuple[str, str], ...]:
    """The metadata that carries an API key."""
    if not api_key or not api_key.isascii() or not api_key.isprintable():
        # gRPC would fail each call with a text that repeats the key.
        raise ValueError("the API key is empty or holds characters that a header cannot carry")
    return (("authorization", f"Bearer {api_key}"),)
