"""Lines to paste into a shell that call the running node: with grpcurl, else with buf, whichever is here."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HOW_TO_GET_GRPCURL = "neither grpcurl nor buf was found: pip install grpcurl, then start again"


@dataclass(frozen=True, slots=True)
class Tools:
    """The programs that were found, as a shell takes them."""

    grpcurl: str = ""
    buf: str = ""


def find_tools(
    bin_folder: Path, here: Path, which: Callable[[str], str | None] = shutil.which
) -> Tools:
    """Look beside the running Python first: what is installed there is of the known version."""

    def find(name: str) -> str:
        beside = bin_folder / name
        if os.access(beside, os.X_OK):
            return shlex.quote(str(_short(beside, here)))
        return shlex.quote(name) if which(name) else ""

    return Tools(find("grpcurl"), find("buf"))


def _short(path: Path, here: Path) -> Path:
    return path.relative_to(here) if path.is_relative_to(here) else path


def to_try(
    tools: Tools,
    target: str,
    *,
    publisher_key: str,
    integration_key: str,
    tenant: str,
    event: Mapping[str, Any],
) -> list[str]:
    """The lines: list, describe, publish an event, list the subscriptions."""
    publish = json.dumps({"parent": f"tenants/{tenant}", "events": [event]})
    parent = json.dumps({"parent": f"tenants/{tenant}"})
    if tools.grpcurl:
        plain = f"{tools.grpcurl} -plaintext"

        def call(key: str, data: str, method: str) -> str:
            return f"{plain} {_key(key)} -d {shlex.quote(data)} {target} outrider.v1.{method}"

        lists = [
            f"{plain} {target} list",
            f"{plain} {target} describe outrider.v1.IngestService.Publish",
        ]
    elif tools.buf:
        plain = f"{tools.buf} curl --protocol grpc --http2-prior-knowledge"

        def call(key: str, data: str, method: str) -> str:
            return (
                f"{plain} {_key(key)} -d {shlex.quote(data)} http://{target}/outrider.v1.{method}"
            )

        lists = [
            f"{plain} {each} http://{target}" for each in ("--list-services", "--list-methods")
        ]
    else:
        return [_HOW_TO_GET_GRPCURL]
    return [
        *lists,
        call(publisher_key, publish, "IngestService/Publish"),
        call(integration_key, parent, "SubscriptionService/ListSubscriptions"),
    ]


def _key(key: str) -> str:
    return f'-H "authorization: Bearer {key}"'
