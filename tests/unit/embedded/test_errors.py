from __future__ import annotations

import errno
from pathlib import Path

import pytest

from outrider_server.embedded.errors import (
    AccountUnusable,
    DiskFull,
    DiskReadOnly,
    EmbeddedPostgresError,
    PortTaken,
    SettingRefused,
    StartFailed,
    StateFolderUnusable,
    StillRunning,
    explain_os_error,
    explain_output,
)

STATE = Path("/srv/outrider")
LOG = STATE / "postgres.log"
STAMP = "2026-01-02 03:04:05.678 UTC [12] "


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        ('FATAL:  could not write lock file "postmaster.pid": No space left on device', DiskFull),
        ("PANIC:  could not write to file: Disk quota exceeded", DiskFull),
        ('FATAL:  could not open file "x": Read-only file system', DiskReadOnly),
        (
            f'{STAMP}LOG:  could not bind IPv4 address "127.0.0.1": Address already in use\n'
            f"{STAMP}FATAL:  could not create any TCP/IP sockets",
            PortTaken,
        ),
        ('FATAL:  unrecognized configuration parameter "shared_bufers"', SettingRefused),
        ('FATAL:  invalid value for parameter "wal_level": "most"', SettingRefused),
        ('FATAL:  parameter "max_connections" requires a numeric value', SettingRefused),
        (
            'FATAL:  WAL streaming ("max_wal_senders" > 0) requires "wal_level" to be ...',
            SettingRefused,
        ),
        (
            "FATAL:  pre-existing shared memory block (key 1, ID 2) is still in use",
            StillRunning,
        ),
        (
            "initdb: error: could not look up effective user ID 1234: user does not exist",
            AccountUnusable,
        ),
        ("FATAL:  something unheard of", StartFailed),
        ("", StartFailed),
    ],
)
def test_what_postgres_printed_becomes_one_sentence(
    output: str, kind: type[EmbeddedPostgresError]
) -> None:
    error = explain_output(output, STATE, 5432, LOG)
    assert type(error) is kind
    assert str(error).endswith(".")
    assert ": " in str(error)
    assert "\n" not in str(error)


def test_a_full_disk_is_named_before_what_it_caused() -> None:
    output = (
        "ERROR:  could not extend file: No space left on device\n"
        'FATAL:  invalid value for parameter "TimeZone": "UTC"'
    )
    assert isinstance(explain_output(output, STATE, None, LOG), DiskFull)


def test_an_unknown_cause_comes_with_postgres_words_and_the_log() -> None:
    text = str(explain_output(f"{STAMP}FATAL:  the moon is full.\n", STATE, None, LOG))
    assert "the moon is full" in text
    assert str(LOG) in text


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, DiskFull),
        (errno.EDQUOT, DiskFull),
        (errno.EROFS, DiskReadOnly),
        (errno.EACCES, StateFolderUnusable),
    ],
)
def test_what_the_system_answered_becomes_one_sentence(
    number: int, kind: type[EmbeddedPostgresError]
) -> None:
    error = explain_os_error(OSError(number, "said so", str(STATE / "x")), STATE)
    assert type(error) is kind
    assert str(error).endswith(".")
    assert str(STATE) in str(error)
