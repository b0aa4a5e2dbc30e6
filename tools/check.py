"""Check the checkout without running it: check.py [STEP...]. Stops at the first step that fails.

The rule: a step reads only this checkout and the environments that `make setup` built, so it needs no network, and what
it finds does not depend on the day.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / ".venv" / "bin"
IMAGE = "build/outrider.binpb"


class Failed(Exception):
    """A step found something; it has printed what."""


def main(arguments: Sequence[str]) -> int:
    unknown = [name for name in arguments if name not in STEPS]
    if unknown:
        print(f"There is no step {unknown[0]}; there are {', '.join(STEPS)}.")
        return 2
    started = time.monotonic()
    for name, step in STEPS.items():
        if arguments and name not in arguments:
            continue
        begin = time.monotonic()
        try:
            remark = step()
        except Failed:
            print(f"{name:<16} FAILED", flush=True)
            return 1
        print(
            f"{name:<16} ok {time.monotonic() - begin:5.1f} s{f'  {remark}' if remark else ''}",
            flush=True,
        )
    print(f"{'all':<16} ok {time.monotonic() - started:5.1f} s", flush=True)
    return 0


def run(*command: str) -> str:
    """Run a program of the environment; what it prints is shown only where it fails."""
    # Its shebang names the Python of this environment, whichever is on the path.
    program = str(PROGRAMS / command[0])
    finished = subprocess.run(
        [program, *command[1:]],
        cwd=ROOT,
        env=os.environ | {"BUF_CACHE_DIR": str(ROOT / "build" / "buf"), "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        print(finished.stdout.rstrip())
        raise Failed
    return finished.stdout


def formatting() -> str:
    run("ruff", "format", "--check", "--output-format", "concise", ".")
    return ""


def lint() -> str:
    run("ruff", "check", ".")
    return ""


def types() -> str:
    run("mypy")
    # Programs beside the packages; the same settings hold for them.
    run("mypy", "tools", "protos", "benchmarks")
    return ""


def rooms() -> str:
    run("lint-imports")
    return ""


def stubs() -> str:
    run("python", "protos/generate.py", "--check")
    return ""


def proto_lint() -> str:
    run("python", "protos/generate.py", "--image", IMAGE)
    run("buf", "lint", IMAGE, "--path", "outrider")
    return ""


def proto_format() -> str:
    run("buf", "format", "--diff", "--exit-code")
    return ""


def proto_breaking() -> str:
    """Against the last release: between releases a proto may still change."""
    try:
        tag = git("describe", "--tags", "--abbrev=0").decode().strip()
        archive = git("archive", "--format=zip", tag, "protos")
    except (OSError, subprocess.CalledProcessError):
        return "nothing to compare with: no tag with protos"
    with tempfile.TemporaryDirectory(prefix="outrider-breaking-") as folder:
        with zipfile.ZipFile(BytesIO(archive)) as files:
            files.extractall(folder)
        before = f"{folder}/before.binpb"
        run("python", "protos/generate.py", "--image", before, "--protos", f"{folder}/protos")
        run("python", "protos/generate.py", "--image", IMAGE)
        run("buf", "breaking", IMAGE, "--against", before, "--path", "outrider")
    return f"against {tag}"


def git(*arguments: str) -> bytes:
    command = ["git", "-c", f"safe.directory={ROOT}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout


def locks() -> str:
    run("python", "tools/lock.py", "--check")
    return ""


STEPS: dict[str, Callable[[], str]] = {
    "locks": locks,
    "format": formatting,
    "lint": lint,
    "rooms": rooms,
    "stubs": stubs,
    "proto-lint": proto_lint,
    "proto-format": proto_format,
    "proto-breaking": proto_breaking,
    "types": types,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
