"""Resource names."""

from __future__ import annotations

import random

import pytest

from outrider_server.api.names import (
    child_name,
    given_or_chosen,
    parse_api_key,
    parse_child,
    parse_tenant,
    tenant_name,
)
from outrider_server.domain.errors import InvalidArgument

SOURCE = random.Random(1).randbytes


def test_names_come_apart_as_they_were_put_together() -> None:
    assert parse_tenant(tenant_name("a-1"), "f") == "a-1"
    assert parse_child(child_name("a", "endpoints", "b"), "endpoints", "f") == ("a", "b")
    assert parse_child(child_name("a", "eventTypes", "b.c_d"), "eventTypes", "f") == ("a", "b.c_d")
    assert parse_api_key(child_name("", "apiKeys", "k"), "f") == ("", "k")
    assert parse_api_key(child_name("a", "apiKeys", "k"), "f") == ("a", "k")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "tenants",
        "tenants/",
        "tenants/A",
        "tenants/a/",
        "x/a",
        "tenants/a\n",
        "tenants/" + "a" * 64,
    ],
)
def test_what_is_no_tenants_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        _ = parse_tenant(name, "parent")
    assert caught.value.violations[0][0] == "parent"


@pytest.mark.parametrize(
    "name",
    [
        "tenants/a/endpoints",
        "tenants/a/endpoints/b/c",
        "tenants/a/other/b",
        "tenants/a/endpoints/b.c",
    ],
)
def test_what_is_no_childs_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        _ = parse_child(name, "endpoints", "name")
    with pytest.raises(InvalidArgument):
        _ = parse_api_key(name, "name")


def test_chosen_ids_are_ids() -> None:
    chosen = {given_or_chosen("", "f", SOURCE) for _ in range(50)}
    assert len(chosen) == 50
    for name in chosen:
        assert given_or_chosen(name, "f", SOURCE) == name
