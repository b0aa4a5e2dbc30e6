"""Every knob of the server: its name with the unit, its bounds, its default and what it trades.

A value comes from the command line, else from the environment (`OUTRIDER_` and the knob's name in capitals), else from
the TOML file that `--config` or `OUTRIDER_CONFIG` names, else it is the default. What is wrong is refused at start, all
of it at once, one line a problem, by name. Only `app`, `supervisor` and `__main__` read settings: everything else is
handed the numbers it needs.
"""

from __future__ import annotations

import difflib
import json
import os
import platform
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import SplitResult, parse_qs, parse_qsl, quote, urlencode, urlsplit

from pydantic import (
    AfterValidator,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from typing_extensions import override

from outrider_server.domain.event import EVENT_BYTES_MAX
from outrider_server.embedded.account import UNPRIVILEGED

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

PREFIX = "OUTRIDER_"
CONFIG_VARIABLE = "OUTRIDER_CONFIG"
REDACTED = "[redacted]"
VALUE_SHOWN_CHARACTERS_MAX = 80

WORKERS_MAX = 64
"""As many as there are shards: one more would have nothing to hold."""

EVERY_ADDRESS = frozenset({"0.0.0.0", "::"})  # noqa: S104 - named to be refused

POSTGRES_SCHEMES = frozenset({"postgresql", "postgres"})
DATABASE_URL_CHOICES: Mapping[str, Sequence[str]] = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslnegotiation": ("postgres", "direct"),
    "target_session_attrs": (
        "any",
        "primary",
        "standby",
        "read-write",
        "read-only",
        "prefer-standby",
    ),
}
ESCAPES = "in a user, password or name write / as %2F, ? as %3F, # as %23 and @ as %40"
QUERY_SHOWN = frozenset(
    {
        "host",
        "port",
        "user",
        "dbname",
        "database",
        "application_name",
        "sslrootcert",
        *DATABASE_URL_CHOICES,
    }
)
"""What is shown of a URL's query. Secrets go by too many names to leave out only those."""


class SettingsError(Exception):
    """The configuration cannot be used. `problems` holds one readable line for each thing that is wrong."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def split_address(address: str) -> tuple[str, int]:
    """Take `host:port` apart; an IPv6 host stands in brackets. Raises ValueError where it is not of that form."""
    host, colon, port_text = address.rpartition(":")
    if not colon or not host:
        raise ValueError("must be host:port, for example 127.0.0.1:4510")
    if not re.fullmatch(r"[0-9]{1,5}", port_text) or int(port_text) > 65_535:
        raise ValueError("must end in a port from 0 to 65535")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("must have its IPv6 host in brackets, for example [::1]:4510")
    if not re.fullmatch(r"[0-9A-Za-z._:%-]+", host):
        raise ValueError("must name a host before the port")
    return host, int(port_text)


def join_address(host: str, port: int) -> str:
    """`host:port`, an IPv6 host in brackets: what `split_address` takes apart."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _address(value: str) -> str:
    split_address(value)
    return value


def _address_to_tell(value: str) -> str:
    host, _ = split_address(value)
    if host in EVERY_ADDRESS:
        raise ValueError(
            "must be an address that others reach, for example 10.0.0.5:0, not every one"
        )
    return value


def _folder(value: Path) -> Path:
    try:
        expanded = value.expanduser()
    except RuntimeError as error:
        raise ValueError(
            "begins with ~ but there is no home folder; give the whole path"
        ) from error
    return expanded.absolute()


class Url(str):
    """A URL that may hold secrets. It shows them only to who asks for its text: not in `repr`, so not in a Settings' either."""

    __slots__ = ()

    @override
    def __repr__(self) -> str:
        return repr(redacted_url(self))


def _database_url(value: SecretStr) -> SecretStr:
    """Refuse what no connection could ever be made with. None of its text goes into what is said: it may be the password."""
    parts = _split_url(value.get_secret_value())
    if parts.scheme not in POSTGRES_SCHEMES:
        raise ValueError("must begin with postgresql:// or postgres://")
    if "@" in parts.path or parts.fragment:
        # Which part is the password cannot be told, and the client would take another one for the host.
        raise ValueError(f"must have its parts apart; {ESCAPES}")
    query = parse_qs(parts.query)
    hosts = parts.netloc.rpartition("@")[2]
    ports = [_port_of(host) for host in hosts.split(",")] if hosts else []
    for listed in (query.get("port", [""])[-1], *_ports_of_hosts(query)):
        ports += listed.split(",") if listed else []
    if not all(
        re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) <= 65_535 for port in ports if port
    ):
        raise ValueError(f"must have a port from 1 to 65535; {ESCAPES}")
    for name, choices in DATABASE_URL_CHOICES.items():
        if query.get(name, choices)[-1] not in choices:
            raise ValueError(f"must have {name} as one of {', '.join(choices)}")
    return value


def _port_of(host: str) -> str:
    return host.rpartition("]")[2].rpartition(":")[2] if ":" in host.rpartition("]")[2] else ""


def _ports_of_hosts(query: Mapping[str, Sequence[str]]) -> list[str]:
    hosts = query.get("host", [""])[-1].split(",")
    return [_port_of(host) for host in hosts if not host.startswith("/")]


def _web_url(value: str) -> Url:
    parts = _split_url(value)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must be an http:// or https:// URL")
    try:
        _ = parts.port
    except ValueError:
        raise ValueError("must have a port from 0 to 65535") from None
    return Url(value)


def _split_url(value: str) -> SplitResult:
    try:
        return urlsplit(value)
    except ValueError:
        # Its own words hold the part with the password.
        raise ValueError("must be a URL") from None


Address = Annotated[str, AfterValidator(_address)]
AddressToTell = Annotated[str, AfterValidator(_address_to_tell)]
Folder = Annotated[Path, AfterValidator(_folder)]
DatabaseUrl = Annotated[SecretStr, AfterValidator(_database_url)]
WebUrl = Annotated[str, AfterValidator(_web_url)]
"""Always a `Url`."""


def _default_state_folder() -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/outrider")
    named = os.environ.get("XDG_STATE_HOME", "")
    # The convention asks that a relative path there be ignored.
    base = Path(named) if named.startswith("/") else Path("~/.local/state").expanduser()
    return base / "outrider"


def _default_node_name() -> str:
    # Short enough for a worker's number to follow.
    return re.sub(r"[^A-Za-z0-9._-]", "-", platform.node())[:37].strip("-._") or "node"


def cores_usable() -> int:
    """Processor cores that this process may use: fewer than the host has where it was given fewer."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Settings(BaseSettings):
    """The configuration of one node. `Settings.load` reads all sources; the constructor takes only what it is given."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    listen_address: Address = Field(
        default="127.0.0.1:4510",
        description="Where gRPC is served. The default is reached from this host only; 0.0.0.0:4510 opens it to the "
        "network, keys then being what protects it.",
    )
    admin_address: Address = Field(
        default="127.0.0.1:4511",
        description="Where metrics and health are served over HTTP, without a key: keep it on a private network.",
    )
    state_folder: Folder = Field(
        default_factory=_default_state_folder,
        description="Holds the embedded database, its password and the sealing key. Must be on a disk that flushes honestly: what is "
        "acknowledged is exactly as safe as this folder. /var/lib/outrider for root, else under the home folder.",
    )
    node_name: str = Field(
        default_factory=_default_node_name,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$",
        description="Names this node to the others and to the database, one name a process. A name that stays the "
        "same over a restart lets a node take its own shards back at once; the host's name by default. Several "
        "workers are named after it: name.1, name.2 and so on.",
    )
    workers: int = Field(
        default=0,
        ge=0,
        le=WORKERS_MAX,
        description="Nodes that run on this host, each a process of its own that shares the tenants with the others; 0 "
        "runs one for each processor core that may be used. More use more cores, and each takes its own "
        "node_payload_bytes_max of memory and some 20 connections to the database. 1 runs the node without a supervisor.",
    )
    own_address: AddressToTell = Field(
        default="127.0.0.1:0",
        description="Where this node alone is served gRPC: other nodes forward to it, and publishers may go straight to it. "
        "The default is reached from this host only; nodes on several hosts need an address that the others reach. Port "
        "0 takes a free one; from another on, each further worker takes the next.",
    )
    admin_socket: Folder | None = Field(
        default=None,
        description="Unix socket on which metrics and health are served instead of admin_address. A supervisor gives one "
        "to each of its workers, and serves on its own admin address what they tell.",
    )

    database_url: DatabaseUrl | None = Field(
        default=None,
        description="A Postgres server, version 15 or newer, to use instead of the embedded one: more to run, but "
        "several nodes can share it and it can have a standby.",
    )
    postgres_bin_folder: Folder | None = Field(
        default=None,
        description="Binaries for the embedded database in place of the packaged ones, for example those of the "
        "operating system, which then also brings their security updates.",
    )
    postgres_port: int = Field(
        default=0,
        ge=0,
        le=65_535,
        description="Port of the embedded database on the loopback address; 0 takes a free one, a fixed one is easier "
        "to point psql at.",
    )
    postgres_user_id: int = Field(
        default=UNPRIVILEGED,
        ge=1,
        le=2**32 - 2,
        description="User that a new embedded database belongs to and runs as when Outrider runs as root, which "
        "Postgres refuses to be. One of its own keeps its files apart from whatever else nobody runs; data that "
        "exists keeps its owner.",
    )
    sealing_key_file: Folder | None = Field(
        default=None,
        description="File of the keys that seal endpoints' secrets in the database. Not set: one in the state folder, "
        "made at the first start. Several hosts on one database need the same; without it no secret can be read "
        "again, so keep a copy apart from the database's.",
    )
    sealing_keys: SecretStr | None = Field(
        default=None,
        description="The keys themselves, in place of the file, for hosts that hand secrets over in the environment; "
        "other processes of the same user can read it there.",
    )

    lease_seconds: float = Field(
        default=10,
        ge=2,
        le=300,
        description="How long a node owns its shards without renewing. Shorter: a dead node's tenants move sooner. "
        "Longer: a slow database or a pause causes fewer needless takeovers.",
    )
    lease_renew_seconds: float = Field(
        default=3,
        ge=0.2,
        le=100,
        description="How often the lease is renewed. Less than half of what lies between lease and margin survives "
        "one lost renewal; each renewal is one small transaction.",
    )
    lease_margin_seconds: float = Field(
        default=3,
        ge=0.5,
        le=100,
        description="How long before the database would call the lease expired this node stops sending. Covers clock "
        "drift and pauses: larger is safer against duplicates, smaller leaves more time to renew.",
    )
    crash_seconds: float = Field(
        default=30.0,
        ge=0,
        le=3600,
        description="An owner that ends within this time of taking a shard, without giving it up in order, counts as "
        "crashed over it. After three in a row what the shard owes is held back, with an alarm, until "
        "`outrider-server let-go` says otherwise: one event that crashes nodes must not take them all down. 0: never.",
    )

    frame_events_max: int = Field(
        default=500,
        ge=1,
        le=5_000,
        description="Events in one frame. Larger frames cost less each event, smaller ones are acknowledged sooner.",
    )
    frame_bytes_max: int = Field(
        default=MIB,
        ge=64 * KIB,
        le=16 * MIB,
        description="Bytes in one frame of more than one event. Larger costs less each event, and holds up the frames "
        "behind it for longer.",
    )
    event_bytes_max: int = Field(
        default=EVENT_BYTES_MAX,
        ge=KIB,
        le=EVENT_BYTES_MAX,
        description="Payload of one event. Lower protects receivers and disk, and refuses more.",
    )
    large_event_bytes: int = Field(
        default=256 * KIB,
        ge=16 * KIB,
        le=4 * MIB,
        description="An event above this is parsed in a child process and stored in a transaction of its own, so that "
        "small events do not wait for it. Lower shields them more, and costs each larger event a hand-over.",
    )
    stream_frames_in_flight_max: int = Field(
        default=64,
        ge=1,
        le=4_096,
        description="Frames one stream may send ahead of its acknowledgements. More keeps a distant publisher busy, "
        "and is more to send again after a break.",
    )
    stream_credit_bytes: int = Field(
        default=4 * MIB,
        ge=256 * KIB,
        le=256 * MIB,
        description="Bytes one stream may send ahead of its acknowledgements. More is faster over long distances, and "
        "lets one stream take more of the node's memory.",
    )
    node_payload_bytes_max: int = Field(
        default=512 * MIB,
        ge=32 * MIB,
        le=256 * GIB,
        description="Payload bytes this process holds, from arrival to delivery. Above it publishers wait and the "
        "largest lane is left to the database: less memory against more reading back.",
    )
    json_depth_max: int = Field(
        default=128,
        ge=8,
        le=512,
        description="Levels of nesting in a payload. More admits odder documents, and makes the work one event can "
        "cause less predictable.",
    )
    idempotency_hours: int = Field(
        default=24,
        ge=1,
        le=24 * 30,
        description="How long an idempotency key is remembered. Longer catches later repeats, and keeps one row an "
        "event for that long.",
    )
    publish_group_events_max: int = Field(
        default=5_000,
        ge=1,
        le=100_000,
        description="Events in one commit. More gives throughput, fewer gives an earlier acknowledgement under load.",
    )
    publish_group_bytes_max: int = Field(
        default=8 * MIB,
        ge=64 * KIB,
        le=256 * MIB,
        description="Payload bytes in one commit; trades like publish_group_events_max.",
    )

    lane_deliveries_max: int = Field(
        default=10_000,
        ge=1,
        le=1_000_000,
        description="Deliveries one endpoint's lane holds in memory; what is beyond becomes owed rows. More rides out "
        "longer slowness without the database, and takes memory for each slow endpoint.",
    )
    lane_bytes_max: int = Field(
        default=64 * MIB,
        ge=MIB,
        le=16 * GIB,
        description="Payload bytes one endpoint's lane holds in memory; trades like lane_deliveries_max.",
    )
    requests_in_flight_max: int = Field(
        default=2_000,
        ge=1,
        le=50_000,
        description="HTTP requests under way at once, over all endpoints. More keeps fast endpoints fast beside many "
        "slow ones; each takes a connection and a file descriptor, and may arrive twice after a crash.",
    )
    outcomes_unrecorded_max: int = Field(
        default=200_000,
        ge=100,
        le=5_000_000,
        description="Finished deliveries not yet recorded; at this number sending stops until the database catches "
        "up. More rides out a longer database stall, and allows more duplicates after a crash in one.",
    )
    window_seconds_max: float = Field(
        default=5,
        ge=0.5,
        le=60,
        description="How old an event may grow above the checkpoint before what is open of it becomes owed rows. "
        "Longer writes fewer of those, and makes a restart read more.",
    )
    window_events_max: int = Field(
        default=200_000,
        ge=1_000,
        le=5_000_000,
        description="Events above the checkpoint; trades like window_seconds_max.",
    )
    record_interval_ms: float = Field(
        default=100,
        ge=10,
        le=1_000,
        description="How often outcomes are recorded. Shorter means fewer duplicates after a crash, longer means "
        "fewer and larger transactions.",
    )
    retry_window_hours_max: float = Field(
        default=7 * 24,
        gt=0,
        le=24 * 365,
        description="The longest time an endpoint's retry policy may ask for, counted from the event. Longer outlasts "
        "longer outages; it must end before retention does.",
    )
    catch_up_page_deliveries_max: int = Field(
        default=1_000,
        ge=1,
        le=100_000,
        description="Owed deliveries that one lane draws at a time. More is faster after an outage, less keeps one "
        "lane's backlog from holding up another's.",
    )
    catch_up_page_bytes_max: int = Field(
        default=8 * MIB,
        ge=64 * KIB,
        le=GIB,
        description="Payload bytes that one lane draws at a time; trades like catch_up_page_deliveries_max. One event "
        "is always drawn, however large.",
    )

    retention_days: float = Field(
        default=90,
        ge=0.05,
        le=3_650,
        description="How long events, attempts and dead letters are kept. Longer searches and replays further back, "
        "for disk.",
    )
    retention_bytes_max: int = Field(
        default=0,
        ge=0,
        description="Bytes the history may take on disk, the oldest partition going first, whichever of days and "
        "bytes comes first; 0 sets no bound but that of retention_days.",
    )
    partition_hours: float = Field(
        default=24,
        ge=0.05,
        le=24 * 31,
        description="Time that one partition covers. Shorter frees disk in smaller steps, longer means fewer tables "
        "to plan over.",
    )
    free_disk_bytes_min: int = Field(
        default=GIB,
        ge=16 * MIB,
        description="Free disk below which publishes are refused, so that what was accepted can still be delivered "
        "and recorded. More is safer, less uses more of the disk.",
    )
    free_disk_check_seconds: float = Field(
        default=1,
        ge=0.1,
        le=60,
        description="How often free disk is looked at. At the highest rate of publishing, what is written meanwhile "
        "must be far below free_disk_bytes_min.",
    )

    drain_seconds: float = Field(
        default=20,
        ge=0,
        le=600,
        description="How long a stop waits for requests under way. Longer means fewer duplicates after a restart, "
        "shorter a quicker one; keep it below the time after which the host kills the process.",
    )
    revocation_check_seconds: float = Field(
        default=1,
        ge=0.1,
        le=1.5,
        description="How often keys are checked against the database. It bounds how long a revoked key still works, "
        "which is promised to be under two seconds; each check is one small query.",
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info",
        description="Least severe line that is written. Lines are per batch and per failed attempt, never per event.",
    )
    log_format: Literal["json", "console"] = Field(
        default="json", description="json for machines, one object a line; console for people."
    )
    log_lines_per_second_max: int = Field(
        default=20,
        ge=1,
        le=1_000,
        description="Lines a second of each recurring kind; the rest is counted in the next line that is written. "
        "More tells more during an outage, and costs some 25 us a line.",
    )
    metrics_enabled: bool = Field(
        default=True,
        description="Whether /metrics answers. Counting goes on either way and costs next to nothing; a scrape takes "
        "a few milliseconds.",
    )
    otlp_endpoint: WebUrl | None = Field(
        default=None,
        description="OTLP/HTTP URL that metrics are pushed to, for example http://127.0.0.1:4318/v1/metrics; needs the "
        "exporter's package. Not set, and no OTEL_EXPORTER_OTLP_ENDPOINT either: nothing is pushed.",
    )
    otlp_interval_seconds: float = Field(
        default=15,
        ge=1,
        le=3_600,
        description="How often metrics are pushed. Shorter is fresher and costs more.",
    )

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)
    _ignored_variables: tuple[str, ...] = PrivateAttr(default=())

    @classmethod
    @override
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # `load` merges the sources itself, because it must be able to say where each value came from; and a Settings
        # made by hand must not depend on the environment it is made in.
        return (init_settings,)

    @classmethod
    def load(
        cls, overrides: Mapping[str, object] | None = None, config: str | Path | None = None
    ) -> Self:
        """Read every source. `overrides` are the command line's (None: not given), `config` is its `--config`.

        Raises SettingsError with all that is wrong.
        """
        environment = EnvSettingsSource(cls)()
        path = config or os.environ.get(CONFIG_VARIABLE) or None
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        layers: list[tuple[Mapping[str, object], str]] = [
            (_standard_variables(), "an OTEL_EXPORTER_OTLP_ variable"),
            (_read_file(Path(path)) if path else {}, str(path)),
            (environment, PREFIX),
            ({k: v for k, v in (overrides or {}).items() if v is not None}, "command line"),
        ]
        for layer, origin in layers:
            for name, value in layer.items():
                values[name] = value
                origins[name] = PREFIX + name.upper() if origin == PREFIX else origin
        try:
            settings = cls(**values)
        except ValidationError as error:
            # Not chained: the original carries the values, which may be secret.
            raise SettingsError(_problems(cls, error, origins)) from None
        except RuntimeError:
            raise SettingsError(
                [f"state_folder: there is no home folder; set {PREFIX}STATE_FOLDER"]
            ) from None
        settings._origins.update(origins)
        settings._ignored_variables = _unknown_variables(cls)
        return settings

    def origin(self, name: str) -> str:
        """Where the value of a knob came from, in words."""
        if name in self._origins:
            return self._origins[name]
        return "given in code" if name in self.model_fields_set else "default"

    def replaced(self, **values: object) -> Self:
        """This configuration with other values for some knobs, checked as a whole. Raises SettingsError."""
        try:
            made = type(self)(**{**dict(self), **values})
        except ValidationError as error:
            raise SettingsError(_problems(type(self), error, self._origins)) from None
        made._origins.update(self._origins)  # noqa: SLF001 - of its own class
        return made

    def as_environment(self) -> dict[str, str]:
        """The variables from which `load` makes this configuration again, secrets included: for a process started by us."""
        return {
            PREFIX + name.upper(): _variable(value) for name, value in self if value is not None
        }

    @property
    def workers_expected(self) -> int:
        """`workers`, with the cores counted where that was asked for."""
        return self.workers or min(cores_usable(), WORKERS_MAX)

    @property
    def ignored_variables(self) -> tuple[str, ...]:
        """Names in the environment that look like knobs and are none, for a warning at start.

        They are not refused: others set such names too, an orchestrator for a service called outrider for one.
        """
        return self._ignored_variables

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_from_truth(cls, value: object, info: ValidationInfo) -> object:
        # pydantic takes true for 1, which in a file is always a mistake.
        name = info.field_name or ""
        if isinstance(value, bool) and cls.model_fields[name].annotation is not bool:
            raise ValueError("must not be true or false")
        return value

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        problems = list(self._contradictions())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _contradictions(self) -> Iterator[str]:
        if self.lease_renew_seconds >= self.lease_seconds - self.lease_margin_seconds:
            yield self._clash(
                "lease_renew_seconds",
                "must be less than lease_seconds - lease_margin_seconds",
                self.lease_seconds - self.lease_margin_seconds,
            )
        for smaller, larger in (
            ("large_event_bytes", "frame_bytes_max"),
            ("frame_bytes_max", "stream_credit_bytes"),
            ("frame_bytes_max", "publish_group_bytes_max"),
            ("frame_events_max", "publish_group_events_max"),
            ("stream_credit_bytes", "node_payload_bytes_max"),
            ("event_bytes_max", "node_payload_bytes_max"),
            ("publish_group_bytes_max", "node_payload_bytes_max"),
            ("lane_bytes_max", "node_payload_bytes_max"),
            ("publish_group_events_max", "window_events_max"),
            ("requests_in_flight_max", "outcomes_unrecorded_max"),
        ):
            if getattr(self, smaller) > getattr(self, larger):
                yield self._clash(smaller, f"must not be more than {larger}", getattr(self, larger))
        retention_hours = self.retention_days * 24
        if self.retry_window_hours_max >= retention_hours:
            yield self._clash(
                "retry_window_hours_max",
                "must be less than retention_days * 24, or retries would outlive their events",
                retention_hours,
            )
        for name in ("idempotency_hours", "partition_hours"):
            if getattr(self, name) > retention_hours:
                yield self._clash(
                    name, "must not be more than retention_days * 24", retention_hours
                )
        if self.record_interval_ms > self.window_seconds_max * 1_000 / 2:
            yield self._clash(
                "record_interval_ms",
                "must be at most half of window_seconds_max, or the checkpoint could not keep up",
                self.window_seconds_max,
            )
        if self.sealing_keys is not None and self.sealing_key_file is not None:
            yield "sealing_keys: must not be set together with sealing_key_file"
        if 0 < self.retention_bytes_max < 16 * MIB:
            yield f"retention_bytes_max: must be 0 or at least {16 * MIB} ({self.retention_bytes_max})"
        for one, other in (
            ("admin_address", "listen_address"),
            ("own_address", "listen_address"),
            ("own_address", "admin_address"),
        ):
            address = getattr(self, one)
            if address == getattr(self, other) and split_address(address)[1]:
                yield f"{one}: must differ from {other} ({address})"

    def _clash(self, name: str, rule: str, limit: float) -> str:
        return f"{name}: {rule} ({_toml(getattr(self, name))} against {_toml(limit)})"


def render(settings: Settings) -> str:
    """The configuration in force, as TOML with each knob's description and origin; secrets are left out."""
    lines = [
        "# The configuration in force. A knob is set by the variable OUTRIDER_<ITS NAME>,",
        "# or by its name in the TOML file that --config or OUTRIDER_CONFIG names.",
    ]
    if settings.ignored_variables:
        names = ", ".join(settings.ignored_variables)
        lines.append(f"# Ignored, being the names of no knob: {names}")
    for name, field in type(settings).model_fields.items():
        if name in GROUPS:
            lines += ["", "#", f"# {GROUPS[name]}", "#"]
        lines += ["", *_wrapped_comment(field.description or "")]
        value = getattr(settings, name)
        shown = f"# {name} is not set" if value is None else f"{name} = {_toml(value)}"
        lines.append(f"{shown}  # {', '.join([*_readable(name, value), settings.origin(name)])}")
    return "\n".join(lines) + "\n"


GROUPS = {
    "listen_address": "This node",
    "database_url": "Database",
    "lease_seconds": "Ownership of shards",
    "frame_events_max": "Ingest",
    "lane_deliveries_max": "Delivery",
    "retention_days": "Retention and disk",
    "drain_seconds": "Stopping and keys",
    "log_level": "Logs and metrics",
}
"""The knob that begins each part of what `render` prints, and the part's name."""


def redacted_url(url: str) -> str:
    """The URL without its secrets, wherever they stand; what cannot be taken apart is left out whole."""
    try:
        parts = urlsplit(url)
        if "@" in parts.path + parts.query + parts.fragment:
            # A password with an unescaped / ? or # ends the host's part too early, and would show.
            return f"{parts.scheme}://{REDACTED}"
        hosts = parts.netloc
        if "@" in hosts:
            user, _, hosts = hosts.rpartition("@")
            name, colon, _ = user.partition(":")
            if parts.scheme not in POSTGRES_SCHEMES:
                hosts = f"{REDACTED}@{hosts}"  # on the web a token may stand in the user's place
            else:
                hosts = f"{name}:{REDACTED}@{hosts}" if colon else f"{name}@{hosts}"
        query = urlencode(
            [
                (name, value if name in QUERY_SHOWN else REDACTED)
                for name, value in parse_qsl(parts.query, keep_blank_values=True)
            ],
            quote_via=quote,
            safe="[]/",
        )
        return parts._replace(netloc=hosts, query=query, fragment="").geturl()
    except ValueError:
        return REDACTED


def _toml(value: object) -> str:
    if isinstance(value, SecretStr):
        secret = value.get_secret_value()
        return json.dumps(redacted_url(secret) if "://" in secret else REDACTED)
    if isinstance(value, Url):
        return json.dumps(redacted_url(value))
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}" if value == float(f"{value:g}") else repr(value)
    if isinstance(value, int):
        return str(value)
    return json.dumps(str(value), ensure_ascii=False)


def _variable(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _readable(name: str, value: object) -> list[str]:
    if "bytes" not in name or not isinstance(value, int) or value < KIB:
        return []
    for size, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if value >= size:
            return [f"{value / size:g} {unit}"]
    return []


def _wrapped_comment(text: str, width: int = 96) -> list[str]:
    lines: list[str] = []
    line = "#"
    for word in text.split():
        if len(line) + 1 + len(word) > width:
            lines.append(line)
            line = "#"
        line += " " + word
    return [*lines, line]


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problem = f"configuration file {path}: cannot be read: {error.strerror}"
    except UnicodeDecodeError:
        problem = f"configuration file {path}: is not UTF-8"
    except tomllib.TOMLDecodeError as error:
        problem = f"configuration file {path}: is not TOML: {error}"
    raise SettingsError([problem])


def _standard_variables() -> dict[str, str]:
    """The OTLP endpoint in the variables that OpenTelemetry's own documents name, so that it need not be given twice."""
    if whole := os.environ.get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"):
        return {"otlp_endpoint": whole}
    if base := os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return {"otlp_endpoint": base.rstrip("/") + "/v1/metrics"}
    return {}


def _unknown_variables(cls: type[Settings]) -> tuple[str, ...]:
    known = {PREFIX + name.upper() for name in cls.model_fields} | {CONFIG_VARIABLE}
    return tuple(
        sorted(n for n in os.environ if n.upper().startswith(PREFIX) and n.upper() not in known)
    )


def _problems(cls: type[Settings], error: ValidationError, origins: Mapping[str, str]) -> list[str]:
    problems: list[str] = []
    for detail in error.errors(include_url=False, include_context=False):
        name = str(detail["loc"][0]) if detail["loc"] else ""
        if not name:
            problems += detail["msg"].removeprefix("Value error, ").split("\n")
            continue
        origin = origins.get(name, "default")
        if detail["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, cls.model_fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{name}: there is no such setting (from {origin}){hint}")
            continue
        value = _shown(cls, name, detail)
        problems.append(f"{name}: {_message(detail)} (got {value}, from {origin})")
    return problems


def _message(detail: ErrorDetails) -> str:
    message = detail["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
    return message[:1].lower() + message[1:]


def _shown(cls: type[Settings], name: str, detail: ErrorDetails) -> str:
    field = cls.model_fields[name]
    if "Secret" in str(field.annotation):
        return REDACTED
    if WebUrl in get_args(field.annotation):
        given = detail["input"]
        return repr(redacted_url(given)) if isinstance(given, str) and "://" in given else REDACTED
    text = repr(detail["input"])
    return (
        text
        if len(text) <= VALUE_SHOWN_CHARACTERS_MAX
        else text[:VALUE_SHOWN_CHARACTERS_MAX] + "..."
    )
