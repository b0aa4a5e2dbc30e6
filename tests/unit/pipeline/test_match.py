"""The directory of tenants: swapped whole, never back to an older configuration."""

from __future__ import annotations

from dataclasses import replace

from structlog.testing import capture_logs

from outrider_server.domain.event import Event
from outrider_server.domain.subscription import Subscription
from outrider_server.domain.tenant import Tenant, TenantConfiguration
from outrider_server.pipeline.match import Directory, match, shard_for
from outrider_server.telemetry.counters import MatchCounters


def configuration(
    tenant: int, version: int, *types: str, name: str = "demo"
) -> TenantConfiguration:
    subscriptions = tuple(
        Subscription(id=number, tenant=tenant, name=f"s{number}", endpoint=1, types=(type_,))
        for number, type_ in enumerate(types, 1)
    )
    return TenantConfiguration(
        Tenant(tenant, name, 0, config_version=version), (), subscriptions, frozenset()
    )


def test_an_older_configuration_does_not_replace_a_later_one() -> None:
    directory = Directory()
    assert directory.replace(configuration(1, 2, "a"))
    assert directory.replace(configuration(1, 5, "b"))
    held = directory.by_id[1]
    assert not directory.replace(configuration(1, 4, "c"))
    assert directory.by_id[1] is held is directory.by_name["demo"]


def test_a_tenant_is_known_by_its_present_name_only() -> None:
    directory = Directory()
    directory.replace(configuration(1, 1, name="old"))
    directory.replace(configuration(1, 2, name="new"))
    assert set(directory.by_name) == {"new"}
    directory.remove(1)
    directory.remove(1)
    assert not directory.by_name
    assert not directory.by_id


def test_a_cleared_directory_takes_any_version_again() -> None:
    directory = Directory()
    directory.replace(configuration(1, 9, name="gone"))
    directory.clear()
    for tenant, name in ((1, "a"), (3, "b")):
        assert directory.replace(configuration(tenant, 1, name=name))
    assert sorted(directory.by_name) == ["a", "b"]
    assert sorted(directory.by_id) == [1, 3]


def test_a_tenant_knows_the_shards_it_is_spread_over_and_all_that_hold_something_of_it() -> None:
    directory = Directory()
    whole = configuration(1, 1)
    directory.replace(whole)
    entry = directory.by_id[1]
    assert (entry.shards, entry.everywhere, entry.frozen_until_us) == ((0,), (0,), 0)
    split = replace(
        whole.tenant, shards=(0, 7), former_shards=(9, 7), frozen_until_us=7, config_version=2
    )
    assert directory.replace(replace(whole, tenant=split))
    entry = directory.by_id[1]
    assert (entry.shards, entry.everywhere, entry.frozen_until_us) == ((0, 7), (0, 7, 9), 7)
    assert directory.remove(1) is entry
    assert directory.remove(1) is None


def test_a_tenant_on_one_shard_has_no_choice() -> None:
    assert {shard_for((9,), str(key), "", b"") for key in range(50)} == {9}


def test_equal_keys_meet_on_one_shard_and_many_keys_use_all_of_them() -> None:
    shards = (3, 7, 40)
    for key in map(str, range(50)):
        with_key = {
            shard_for(shards, key, again, data) for again in ("", "x", "y") for data in (b"", b"1")
        }
        assert len(with_key) == 1, "the key alone decides, so that its order is kept"
        # Without one, what may come again decides: else a duplicate would not meet its first.
        assert len({shard_for(shards, "", key, data) for data in (b"", b"1", b"2")}) == 1
        assert len({shard_for(shards, "", "", key.encode()) for _ in range(3)}) == 1
    for many in (
        {shard_for(shards, str(n), "", b"") for n in range(100)},
        {shard_for(shards, "", str(n), b"") for n in range(100)},
        {shard_for(shards, "", "", b"%d" % n) for n in range(100)},
    ):
        assert many == set(shards)


def test_where_a_key_goes_never_changes() -> None:
    """A frame that comes again, perhaps to a later release, must be split as it was the first time."""
    assert [shard_for((0, 1, 2, 3), key, "", b"") for key in ("", "a", "order-1", "ключ")] == [
        0,
        3,
        3,
        2,
    ]


def test_an_event_carries_whom_it_matched_under_which_version() -> None:
    directory, counters = Directory(), MatchCounters()
    directory.replace(configuration(1, 4, "a.*", "b.*", "*"))
    for type_, targets in (("a.x", (1, 3)), ("b.x", (2, 3)), ("c.x", (3,))):
        event = Event(1, type_, b"1", 0)
        match(directory.by_name["demo"], event, 1, counters)
        assert (event.targets, event.config_version) == (targets, 4)
    directory.replace(configuration(1, 5))
    event = Event(1, "a.x", b"1", 0)
    match(directory.by_name["demo"], event, 1, counters)
    assert (counters.events, counters.targets, counters.unmatched) == (4, 5, 1)


def test_a_broken_subscription_is_told_once_and_counted_until_it_is_mended() -> None:
    def broken(version: int) -> TenantConfiguration:
        whole = configuration(1, version, "a", "a")
        first, second = whole.subscriptions
        return replace(
            whole, subscriptions=(first, replace(second, filter_text="x == 1", filter_ast=b"?"))
        )

    directory = Directory()
    with capture_logs() as told:
        for _ in range(2):
            directory.replace(broken(1))
            directory.replace(configuration(2, 1, "a", name="other"))
        directory.replace(broken(2))
    assert [(each["event"], each["tenant"], each["subscription"]) for each in told] == [
        ("subscription.broken", "demo", 2)
    ]
    assert directory.broken_subscriptions() == 1
    event, counters = Event(1, "a", b"1", 0), MatchCounters()
    match(directory.by_name["demo"], event, 1, counters)
    assert (event.targets, event.config_version) == ((1,), 2)
    directory.replace(configuration(1, 3, "a", "a"))
    assert directory.broken_subscriptions() == 0
