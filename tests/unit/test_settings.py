"""Knobs: where their values come from, what is refused and how, and that secrets are not shown."""

from __future__ import annotations

import inspect
import os
import re
import tomllib
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from outrider_server.settings import (
    GROUPS,
    Settings,
    SettingsError,
    join_address,
    redacted_url,
    render,
    split_address,
)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith(("OUTRIDER_", "OTEL_")):
            monkeypatch.delenv(name)


def problems_of(**overrides: object) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        Settings.load(overrides)
    return caught.value.problems


def write(folder: Path, text: str) -> Path:
    path = folder / "outrider.toml"
    path.write_text(text)
    return path


def test_command_line_beats_environment_beats_file_beats_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "lane_deliveries_max = 1\nframe_events_max = 2\njson_depth_max = 100\n")
    monkeypatch.setenv("OUTRIDER_LANE_DELIVERIES_MAX", "3")
    monkeypatch.setenv("OUTRIDER_FRAME_EVENTS_MAX", "4")

    settings = Settings.load({"lane_deliveries_max": 5}, config=path)

    assert settings.lane_deliveries_max == 5
    assert settings.frame_events_max == 4
    assert settings.json_depth_max == 100
    assert settings.idempotency_hours == 24
    assert settings.origin("lane_deliveries_max") == "command line"
    assert settings.origin("frame_events_max") == "OUTRIDER_FRAME_EVENTS_MAX"
    assert settings.origin("json_depth_max") == str(path)
    assert settings.origin("idempotency_hours") == "default"


def test_option_that_was_not_given_overrides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_DRAIN_SECONDS", "7")
    assert Settings.load({"drain_seconds": None}).drain_seconds == 7


def test_file_is_found_by_variable_unless_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTRIDER_CONFIG", str(write(tmp_path, "drain_seconds = 1")))
    other = tmp_path / "other.toml"
    other.write_text("drain_seconds = 2")
    assert Settings.load().drain_seconds == 1
    assert Settings.load(config=other).drain_seconds == 2


def test_empty_variable_is_as_if_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_DATABASE_URL", "")
    monkeypatch.setenv("OUTRIDER_CONFIG", "")
    assert Settings.load().database_url is None


def test_settings_made_by_hand_do_not_read_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OUTRIDER_DRAIN_SECONDS", "7")
    settings = Settings(lane_deliveries_max=3)
    assert settings.drain_seconds == 20
    assert settings.origin("lane_deliveries_max") == "given in code"


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError):
        Settings().drain_seconds = 3


def test_every_wrong_value_is_named_on_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTRIDER_LEASE_SECONDS", "soon")
    path = write(tmp_path, 'log_level = "loud"\nlane_deliveries_max = true\n')
    with pytest.raises(SettingsError) as caught:
        Settings.load({"json_depth_max": 0}, config=path)
    problems = caught.value.problems
    assert str(caught.value).split("\n") == list(problems)
    assert sorted(p.split(":")[0] for p in problems) == [
        "json_depth_max",
        "lane_deliveries_max",
        "lease_seconds",
        "log_level",
    ]
    by_name = {p.split(":")[0]: p for p in problems}
    assert "'soon'" in by_name["lease_seconds"]
    assert "OUTRIDER_LEASE_SECONDS" in by_name["lease_seconds"]
    assert "greater than or equal to 8" in by_name["json_depth_max"]
    assert str(path) in by_name["log_level"]


def test_unknown_key_in_the_file_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    path = write(tmp_path, "leese_seconds = 3\n[ingest]\nframe_events_max = 3\n")
    with pytest.raises(SettingsError) as caught:
        Settings.load(config=path)
    text = str(caught.value)
    assert "leese_seconds: there is no such setting" in text
    assert "did you mean lease_seconds?" in text
    assert "ingest: there is no such setting" in text


def test_unknown_variable_is_told_but_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_PORT", "tcp://10.0.0.1:4510")
    settings = Settings.load()
    assert settings.ignored_variables == ("OUTRIDER_PORT",)
    assert "OUTRIDER_PORT" in render(settings)


@pytest.mark.parametrize(
    ("text", "says"),
    [("x = ", "is not TOML"), (None, "cannot be read: No such file")],
)
def test_file_that_cannot_be_used_is_one_line(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "c.toml" if text is None else write(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        Settings.load(config=path)
    (problem,) = caught.value.problems
    assert says in problem
    assert str(path) in problem


def test_file_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(b'node_name = "\xff"')
    with pytest.raises(SettingsError, match="is not UTF-8"):
        Settings.load(config=path)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"lease_seconds": 6}, "lease_renew_seconds"),
        ({"large_event_bytes": 2**21}, "large_event_bytes"),
        ({"frame_bytes_max": 2**23}, "frame_bytes_max"),
        ({"publish_group_bytes_max": 2**17}, "frame_bytes_max"),
        ({"publish_group_events_max": 100}, "frame_events_max"),
        ({"stream_credit_bytes": 2**28, "node_payload_bytes_max": 2**27}, "stream_credit_bytes"),
        ({"lane_bytes_max": 2**30}, "lane_bytes_max"),
        ({"window_events_max": 1_000}, "publish_group_events_max"),
        ({"outcomes_unrecorded_max": 1_000}, "requests_in_flight_max"),
        ({"retention_days": 7}, "retry_window_hours_max"),
        ({"retention_days": 8, "idempotency_hours": 200}, "idempotency_hours"),
        ({"retention_days": 8, "partition_hours": 200}, "partition_hours"),
        ({"record_interval_ms": 1_000, "window_seconds_max": 1}, "record_interval_ms"),
        ({"retention_bytes_max": 1_000}, "retention_bytes_max"),
        ({"admin_address": "127.0.0.1:4510"}, "admin_address"),
        ({"own_address": "127.0.0.1:4510"}, "own_address"),
        ({"own_address": "127.0.0.1:4511"}, "own_address"),
        ({"sealing_keys": "kek_a", "sealing_key_file": "/k"}, "sealing_keys"),
    ],
)
def test_values_that_contradict_each_other_are_refused(
    overrides: dict[str, object], name: str
) -> None:
    problems = problems_of(**overrides)
    assert name in [p.split(":")[0] for p in problems]
    assert all("\n" not in p for p in problems)


def test_all_contradictions_are_told_at_once() -> None:
    assert len(problems_of(lease_seconds=6, retention_days=7, lane_bytes_max=2**30)) == 3


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:4510", ("127.0.0.1", 4510)),
        ("[::1]:0", ("::1", 0)),
        ("localhost:65535", ("localhost", 65_535)),
    ],
)
def test_address_is_host_and_port(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts
    assert Settings.load({"listen_address": address}).listen_address == address


@pytest.mark.parametrize(
    "address",
    ["4510", ":4510", "host", "host:", "host:x", "host:65536", "host:-1", "::1:4510", "a b:1", "[]:1", "h:1\n"],
)  # fmt: skip
def test_what_is_no_address_is_refused(address: str) -> None:
    (problem,) = problems_of(listen_address=address)
    assert problem.startswith("listen_address: must ")


def test_two_ports_of_the_systems_choice_do_not_clash() -> None:
    Settings.load({"listen_address": "127.0.0.1:0", "admin_address": "127.0.0.1:0"})


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:4512"])
def test_an_address_that_is_told_to_others_names_one_host(address: str) -> None:
    (problem,) = problems_of(own_address=address)
    assert problem.startswith("own_address: must be an address that others reach")


@pytest.mark.parametrize("address", ["127.0.0.1:4510", "[::1]:0", "localhost:1"])
def test_an_address_is_put_together_as_it_was_taken_apart(address: str) -> None:
    assert join_address(*split_address(address)) == address


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (6, 6), (200, 64)])
def test_there_is_a_worker_for_each_usable_core_up_to_the_shards(
    cores: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert Settings().workers_expected == workers
    assert Settings(workers=3).workers_expected == 3


def test_more_workers_than_shards_are_refused() -> None:
    (problem,) = problems_of(workers=65)
    assert problem.startswith("workers: must be less than or equal to 64")


def test_replaced_values_are_checked_with_the_rest_and_keep_the_others_origins() -> None:
    settings = Settings.load({"drain_seconds": 3})
    changed = settings.replaced(node_name="other", workers=2)
    assert (changed.node_name, changed.workers, changed.drain_seconds) == ("other", 2, 3)
    assert changed.origin("drain_seconds") == "command line"
    with pytest.raises(SettingsError, match="own_address: must differ from listen_address"):
        settings.replaced(own_address=settings.listen_address)
    with pytest.raises(SettingsError, match="node_name: "):
        settings.replaced(node_name="a/b")


def test_large_numbers_are_numbers_only() -> None:
    for value in ("nan", "inf", float("inf")):
        (problem,) = problems_of(lease_seconds=value)
        assert problem.startswith("lease_seconds: must be")


def test_folders_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Settings.load({"state_folder": "state"}).state_folder == tmp_path / "state"
    assert Settings.load({"state_folder": "~/s"}).state_folder == tmp_path / "home" / "s"


@pytest.mark.parametrize(
    ("user", "named", "expected"),
    [
        (0, "", "/var/lib/outrider"),
        (1000, "", "/home/some/.local/state/outrider"),
        (1000, "/elsewhere", "/elsewhere/outrider"),
        (1000, "relative", "/home/some/.local/state/outrider"),
    ],
)
def test_state_folder_follows_the_user(
    user: int, named: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setenv("HOME", "/home/some")
    monkeypatch.setenv("XDG_STATE_HOME", named)
    assert str(Settings.load().state_folder) == expected


def test_missing_home_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    (problem,) = problems_of()
    assert problem == "state_folder: there is no home folder; set OUTRIDER_STATE_FOLDER"


def test_secret_is_shown_neither_by_render_nor_by_an_error_nor_by_repr() -> None:
    url = "postgresql://outrider:hunter2@db:5432/outrider?sslpassword=hunter3"
    settings = Settings.load({"database_url": url})
    for text in (render(settings), repr(settings), str(settings)):
        assert "hunter" not in text
    assert "postgresql://outrider:[redacted]@db:5432/outrider" in render(settings)
    assert settings.database_url is not None
    assert settings.database_url.get_secret_value() == url

    (problem,) = problems_of(database_url=url.replace("postgresql", "mysql"))
    assert problem.startswith("database_url: must begin with postgresql://")
    assert "hunter" not in problem


def test_keys_are_shown_neither_by_render_nor_by_an_error() -> None:
    text = render(Settings.load({"sealing_keys": "kek_hunter2\nkek_hunter3"}))
    assert 'sealing_keys = "[redacted]"' in text
    assert "hunter" not in text
    (problem,) = problems_of(sealing_keys=["kek_hunter2"])
    assert problem.startswith("sealing_keys: ")
    assert "hunter" not in problem


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u@h/d", "postgresql://u@h/d"),
        ("postgresql://h/d?sslmode=require", "postgresql://h/d?sslmode=require"),
        ("postgresql://h/d?user=u&password=p", "postgresql://h/d?user=u&password=[redacted]"),
        ("postgresql://u:p@h1:1,h2:2/d", "postgresql://u:[redacted]@h1:1,h2:2/d"),
        ("postgresql://u:a@b@h/d", "postgresql://u:[redacted]@h/d"),
        ("postgresql://u:a/b@h/d", "postgresql://[redacted]"),
        ("postgresql://u:a#b@h/d", "postgresql://[redacted]"),
        ("postgresql://u:a?b@h/d", "postgresql://[redacted]"),
        ("postgresql://u:a[b@h/d", "[redacted]"),
        ("postgresql://h/d?passfile=/p", "postgresql://h/d?passfile=[redacted]"),
        ("https://token@h/v1", "https://[redacted]@h/v1"),
        ("https://u:s@h:1/v1?sig=s#s", "https://[redacted]@h:1/v1?sig=[redacted]"),
    ],
)
def test_password_is_found_wherever_it_stands(url: str, shown: str) -> None:
    assert redacted_url(url) == shown


def test_what_is_shown_reads_back_as_the_same_configuration(tmp_path: Path) -> None:
    before = Settings.load(
        {
            "state_folder": tmp_path,
            "node_name": "node-7",
            "lease_seconds": 12.5,
            "metrics_enabled": False,
            "retention_bytes_max": 123_456_789_012,
        }
    )
    text = render(before)
    after = Settings.load(config=write(tmp_path, text))
    assert after.model_dump() == before.model_dump()
    assert set(tomllib.loads(text)) == {
        name for name, value in before.model_dump().items() if value is not None
    }


def test_each_knob_is_shown_once_with_its_description_and_origin() -> None:
    text = render(Settings.load({"drain_seconds": 3}))
    flat = " ".join(line.removeprefix("# ") for line in text.split("\n"))
    for name, field in Settings.model_fields.items():
        assert field.description
        assert " ".join(field.description.split()) in flat
        assert sum(line.split(" ")[0] == name or line.startswith(f"# {name} is not set")
                   for line in text.split("\n")) == 1  # fmt: skip
    assert "drain_seconds = 3  # command line" in text
    assert "frame_bytes_max = 1048576  # 1 MiB, default" in text
    assert set(GROUPS) <= set(Settings.model_fields)


def test_numbers_carry_their_unit_in_their_names() -> None:
    units = {"seconds", "ms", "hours", "days", "bytes", "events", "deliveries", "frames", "requests",
             "outcomes", "lines", "depth", "port", "id", "workers"}  # fmt: skip
    for name, field in Settings.model_fields.items():
        if field.annotation in (int, float):
            assert units & set(name.split("_")), name


@pytest.mark.parametrize(
    ("variables", "endpoint"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/"}, "http://c:4318/v1/metrics"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://m/x"},
            "http://m/x",
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OUTRIDER_OTLP_ENDPOINT": "http://o/y"}, "http://o/y"),
    ],
)  # fmt: skip
def test_push_endpoint_is_taken_from_the_usual_variables_too(
    variables: dict[str, str], endpoint: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Settings.load().otlp_endpoint == endpoint


def test_host_name_that_is_no_node_name_is_made_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.node", lambda: "Dr. Müller's box" + "x" * 100)
    assert Settings.load().node_name.startswith("Dr.-M-ller-s-box")
    monkeypatch.setattr("platform.node", lambda: "")
    assert Settings.load().node_name == "node"


SECRETIVE = {
    "database_url": (
        "postgresql://u:s3cret@h/d?sslpassword=s3cret&x=s3cret",
        ["mysql://u:s3cret@h/d", "postgresql://u:1/s3cret@h/d", "postgresql://u:s3cret[@h/d",
         "postgresql://u:s3cret@h:s3cret/d", "postgresql://u:s3cret@h/d?sslmode=s3cret", ["s3cret"]],
    ),
    "otlp_endpoint": (
        "https://u:s3cret@h/v1?api-key=s3cret&sig=s3cret#s3cret",
        ["u:s3cret@h/v1", "ftp://u:s3cret@h/v1?key=s3cret", "https://u:s3cret[@h/v1",
         "https://u:s3cret@h:99999/v1", "https://h:s3cret/v1?token=s3cret@h", ["https://s3cret@h"]],
    ),
    "sealing_keys": ("kek_s3cret", [["kek_s3cret"], {"a": "s3cret"}]),
}  # fmt: skip
"""For each knob that can hold a secret: a value that is taken, and values that are refused."""


@pytest.mark.parametrize("name", SECRETIVE)
def test_a_knob_that_can_hold_a_secret_never_shows_it(name: str) -> None:
    taken, refused = SECRETIVE[name]
    settings = Settings.load({name: taken})
    for text in (render(settings), repr(settings), str(settings)):
        assert "s3cret" not in text
    value = getattr(settings, name)
    assert (value.get_secret_value() if isinstance(value, SecretStr) else value) == taken
    for wrong in refused:
        problems = problems_of(**{name: wrong})
        assert problems[0].startswith(f"{name}: "), problems
        assert "s3cret" not in "".join(problems), wrong


def test_every_knob_for_a_url_or_a_secret_is_among_those_that_do_not_show_theirs() -> None:
    named = {
        name for name in Settings.model_fields if re.search("url|endpoint|password|keys$", name)
    }
    typed = {
        name
        for name, field in Settings.model_fields.items()
        if "Secret" in str(field.annotation) or "url" in str(field.annotation)
    }
    assert named | typed == set(SECRETIVE)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://u:p@h:notaport/d", "must have a port from 1 to 65535"),
        ("postgresql://u:p@h:0/d", "must have a port from 1 to 65535"),
        ("postgresql://u:p@h1:1,h2:x/d", "must have a port from 1 to 65535"),
        ("postgresql://u:p@[::1]:x/d", "must have a port from 1 to 65535"),
        ("postgresql:///d?host=/tmp&port=x", "must have a port from 1 to 65535"),
        ("postgresql:///d?host=h:x", "must have a port from 1 to 65535"),
        (
            "postgresql://u:1/p@h/d",
            "must have its parts apart; in a user, password or name write / as %2F",
        ),
        ("postgresql://u:1#p@h/d", "must have its parts apart"),
        ("postgresql://h/d?sslmode=bogus", "must have sslmode as one of disable, "),
        ("postgresql://h/d?sslnegotiation=bogus", "must have sslnegotiation as one of "),
        (
            "postgresql://h/d?target_session_attrs=bogus",
            "must have target_session_attrs as one of ",
        ),
        ("http://h/d", "must begin with postgresql://"),
    ],
)
def test_a_database_url_that_could_never_connect_is_refused(url: str, says: str) -> None:
    (problem,) = problems_of(database_url=url)
    assert problem.startswith(f"database_url: {says}")


@pytest.mark.parametrize(
    "url",
    [
        "postgres://h/d",
        "postgresql:///d",
        "postgresql://u:p%2F%40@[::1]:5432,h2/d?sslmode=verify-full&target_session_attrs=primary",
        "postgresql:///d?host=/var/run/a:b&port=5432",
        "postgresql:///d?host=h1,h2&port=1,2",
    ],
)
def test_a_database_url_of_every_form_is_taken(url: str) -> None:
    settings = Settings.load({"database_url": url})
    assert settings.database_url is not None
    assert settings.database_url.get_secret_value() == url


def test_every_knob_is_read_by_the_server() -> None:
    package = Path(inspect.getfile(Settings)).parent
    sources = "".join(
        path.read_text() for path in package.rglob("*.py") if path.name != "settings.py"
    )
    unread = {
        name
        for name in Settings.model_fields
        if not re.search(rf"\b(settings|configured)\.{name}(_expected)?\b", sources)
    }
    assert unread == set()
