"""`outrider-server demo`, as `make run` starts it: the real command, without a terminal, in a folder of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.processes import wait_for

from outrider_server.demo.folder import hold
from outrider_server.embedded.account import UNPRIVILEGED
from outrider_server.embedded.launcher import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "outrider_server", "demo"]
FIGURES = re.compile(
    r" *(?P<seconds>\d+) s  published (?P<published>\d+)  matched (?P<matched>\d+)  delivered (?P<delivered>\d+)"
    r"  recorded (?P<recorded>\d+)  owed (?P<owed>\d+)  failed attempts (?P<failed>\d+)"
)
KEY = re.compile(r"\bork_[a-z0-9-]+_[a-z2-7]{52}_[a-z2-7]{7}\b")
READY_SECONDS = 60.0


class Demo:
    """One demo's folder and addresses, and its runs one after the other. Every line it prints is kept."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.output = folder / "output"
        self.port, self.admin_port = free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *more: str) -> list[str]:
        return [
            *COMMAND,
            f"--state-folder={self.state}",
            f"--listen-address=127.0.0.1:{self.port}",
            f"--admin-address=127.0.0.1:{self.admin_port}",
            *more,
        ]

    def start(self, *more: str) -> None:
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                self.command(*more),
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def run(self, *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """One that ends by itself."""
        return subprocess.run(
            self.command(*more),
            cwd=ROOT,
            env=environment(**variables),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def figures(self) -> list[dict[str, int]]:
        return [
            {name: int(value) for name, value in match.groupdict().items()}
            for match in map(FIGURES.match, self.text.splitlines())
            if match
        ]

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(KEY.findall(self.text)))

    def to_paste(self) -> list[str]:
        lines = self.text.partition("To paste into another terminal:\n")[2].split("\n\n")[0]
        return [line.strip() for line in lines.splitlines()]

    def wait_for(self, what: str, at_least: int, seconds: float = READY_SECONDS) -> None:
        """Until that figure is so high; at once if the demo ends instead."""
        deadline = time.monotonic() + seconds
        while not (self.figures and self.figures[-1][what] >= at_least):
            assert self.process is not None
            assert self.process.poll() is None, f"the demo ended:\n{self.text}"
            assert time.monotonic() < deadline, (
                f"{what} did not come to {at_least}:\n{self.text}\n{self.log_tail()}"
            )
            time.sleep(0.02)

    def log_tail(self) -> str:
        log = self.state / "demo.log"
        return log.read_text()[-4000:] if log.exists() else ""

    def interrupt(self) -> int:
        """As Ctrl-C does; returns the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(40)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def environment(**variables: str) -> dict[str, str]:
    """Without what the person who runs the tests has configured for their own service."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OUTRIDER_")}
    return {**kept, "PYTHONUNBUFFERED": "1", **variables}


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not tmp_path, which is private to root where root runs the tests: the database could not reach it.
    made = Path(tempfile.mkdtemp(prefix="outrider-demo-"))
    made.chmod(0o755)
    yield made
    # A killed demo's Postgres may still be ending.
    with contextlib.suppress(OSError):
        shutil.rmtree(made)
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def demo(folder: Path) -> Iterator[Demo]:
    made = Demo(folder)
    yield made
    made.kill()


def paste(line: str) -> str:
    """What a person's shell makes of the line, from the folder in which the demo was started."""
    ran = subprocess.run(
        ["/bin/sh", "-c", line],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ran.returncode == 0, f"{line}\n{ran.stdout}{ran.stderr}"
    return ran.stdout


def assert_one_sentence(ran: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert ran.returncode == 1, ran.stdout + ran.stderr
    (line,) = ran.stderr.splitlines()
    assert line.startswith("outrider-server: ")
    for part in parts:
        assert part in line


def matched_in_all(demo: Demo) -> int:
    """What the database says, by the command that tells; no demo runs meanwhile."""
    ran = subprocess.run(
        [sys.executable, "-m", "outrider_server", "balance", f"--state-folder={demo.state}"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (row,) = (line.split() for line in ran.stdout.splitlines() if line.startswith("demo "))
    return int(row[1])


def test_events_are_delivered_and_recorded_and_retried(demo: Demo) -> None:
    demo.start()
    demo.wait_for("recorded", 300)
    demo.wait_for("failed", 3)

    seen = demo.figures
    for what in ("published", "matched", "delivered", "recorded"):
        counts = [each[what] for each in seen]
        assert counts == sorted(counts)
        assert counts[0] < counts[-1]
    assert all(each["recorded"] <= each["delivered"] <= each["matched"] for each in seen)
    # Bounded: the rate, and a first second's worth that came late.
    assert seen[-1]["published"] <= 200 * (seen[-1]["seconds"] + 2)
    assert demo.interrupt() == 0


def test_the_lines_to_paste_list_describe_publish_and_ask(demo: Demo) -> None:
    demo.start("--rate=0")
    demo.wait_for("seconds", 1)
    lines = demo.to_paste()
    if len(lines) == 1:
        pytest.skip(f"no grpcurl and no buf is installed: {lines[0]}")
    listing, describing, publishing, asking = lines

    assert "outrider.v1.IngestService" in paste(listing)
    assert "Publish" in paste(describing)
    (result,) = json.loads(paste(publishing))["results"]
    assert int(result["id"]) > 0
    assert len(json.loads(paste(asking))["subscriptions"]) == 12

    # Nothing else is published, so what arrives is what was pasted: three subscriptions wanted it.
    demo.wait_for("recorded", 3, seconds=20)
    assert demo.figures[-1]["delivered"] == 3
    assert demo.interrupt() == 0


def test_what_is_published_is_what_was_said_and_ctrl_c_ends_it_well(demo: Demo) -> None:
    demo.start("--rate=50")
    demo.wait_for("recorded", 50)
    assert demo.interrupt() == 0
    assert demo.text.rstrip().endswith("Stopped.")
    assert "does not add up" not in demo.text
    assert "Traceback" not in demo.text
    assert not list((demo.state / "postgres").glob("postmaster.pid"))


def test_a_second_start_keeps_the_data_and_its_keys_work(demo: Demo) -> None:
    demo.start()
    demo.wait_for("recorded", 200)
    first_keys = demo.keys
    assert demo.interrupt() == 0
    matched = matched_in_all(demo)
    assert matched >= 200

    demo.start()
    demo.wait_for("recorded", 50)
    assert demo.keys == first_keys
    assert len(first_keys) == 3
    earlier = re.search(r"(\d+) deliveries recorded by earlier runs, (\d+) owed", demo.text)
    assert earlier is not None
    assert int(earlier[1]) + int(earlier[2]) == matched
    assert demo.interrupt() == 0
    assert matched_in_all(demo) > matched


def test_keys_and_secrets_that_were_lost_are_made_anew(demo: Demo) -> None:
    demo.start("--seconds=2")
    assert demo.process is not None
    assert demo.process.wait(READY_SECONDS) == 0
    lost = demo.keys
    (demo.state / "demo.json").unlink()

    demo.start()
    demo.wait_for("recorded", 50)  # so the receiver's new secrets verify what is signed
    assert len(demo.keys) == 3
    assert not set(demo.keys) & set(lost)
    assert demo.interrupt() == 0


def test_a_start_after_a_kill_works_within_ten_seconds(demo: Demo) -> None:
    demo.start()
    demo.wait_for("recorded", 100)
    before = demo.keys
    demo.kill()

    began = time.monotonic()
    demo.start()
    demo.wait_for("delivered", 1, seconds=30)
    assert time.monotonic() - began < 10
    assert demo.keys == before
    demo.wait_for("recorded", 100)
    assert demo.interrupt() == 0
    assert "does not add up" not in demo.text


def test_it_ends_well_when_nobody_reads_its_lines_any_more(demo: Demo) -> None:
    with subprocess.Popen(
        demo.command(), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        demo.process = process  # type: ignore[assignment]
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(READY_SECONDS) == 0
        assert process.stderr.read() == b""


@pytest.mark.parametrize("which", ["listen", "admin"])
def test_a_taken_port_is_one_sentence(demo: Demo, which: str) -> None:
    port = demo.port if which == "listen" else demo.admin_port
    with socket.create_server(("127.0.0.1", port)):
        assert_one_sentence(demo.run(), f"127.0.0.1:{port}", f"--{which}-address")


def test_a_second_demo_in_the_folder_is_one_sentence(demo: Demo) -> None:
    with hold(demo.state):
        assert_one_sentence(demo.run(), f"process {os.getpid()}", "--state-folder")


def test_a_foreign_data_folder_is_one_sentence_and_left_alone(demo: Demo) -> None:
    letter = demo.state / "postgres" / "letter"
    letter.parent.mkdir(parents=True)
    letter.write_text("dear aunt")
    assert_one_sentence(demo.run(), "not Postgres data", "choose another state folder")
    assert letter.read_text() == "dear aunt"


def test_an_older_data_folder_is_one_sentence(demo: Demo) -> None:
    data = demo.state / "postgres"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("14\n")
    if os.geteuid() == 0:
        os.chown(data, UNPRIVILEGED, -1)
    assert_one_sentence(demo.run(), "Postgres 14")


def test_a_full_disk_is_one_sentence(demo: Demo) -> None:
    ran = demo.run(OUTRIDER_FREE_DISK_BYTES_MIN=str(1 << 60))
    assert_one_sentence(ran, "free some space", "--state-folder")


def test_a_folder_that_cannot_be_written_is_one_sentence(demo: Demo) -> None:
    demo.state.write_text("a file")
    assert_one_sentence(demo.run(), str(demo.state), "choose another state folder")


@pytest.mark.parametrize("option", ["--rate=-1", "--rate=nan", "--seconds=-1", "--disk-mib=1"])
def test_a_number_without_sense_is_one_sentence(demo: Demo, option: str) -> None:
    assert_one_sentence(demo.run(option), option.partition("=")[0])


def test_publishing_waits_at_the_bound_of_the_disk(demo: Demo) -> None:
    ballast = demo.state / "ballast"
    demo.state.mkdir()
    ballast.write_bytes(b"x" * (300 << 20))
    demo.start("--disk-mib=256")
    wait_for(lambda: "publishing waits" in demo.text, READY_SECONDS)
    ballast.unlink()
    demo.wait_for("published", demo.figures[-1]["published"] + 100)
    assert demo.interrupt() == 0
