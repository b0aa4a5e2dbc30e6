"""Make the hash-locked requirements files from the pyprojects and the `.in` files, or tell which is out of date.

    lock.py            make them with uv, in a throw-away environment; pins that still fit are kept
    lock.py --upgrade  the same, with the newest versions that fit
    lock.py --check    exit 1 and name each lock that was made from other inputs; needs no network

The rule: a lock names packages, versions and hashes, never a host or a path of the machine that made it. Its second
line holds a digest of what it was made from, which is what `--check` compares.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = "uv==0.13.9"
PROJECTS = ("client/pyproject.toml", "server/pyproject.toml")
DIGEST = "# Made from inputs with the digest "


@dataclass(frozen=True)
class Lock:
    """One lock: what it is made from, and the locks made before it whose versions it must repeat."""

    name: str
    sources: tuple[str, ...]
    agrees_with: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return ROOT / self.name


LOCKS = (
    Lock("requirements.txt", PROJECTS),
    Lock("requirements-build.txt", ("requirements-build.in",), ("requirements.txt",)),
    Lock(
        "requirements-dev.txt",
        (*PROJECTS, "requirements-build.in", "requirements-dev.in"),
        ("requirements.txt", "requirements-build.txt"),
    ),
    Lock("requirements-generate.txt", ("requirements-generate.in",)),
)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--upgrade", action="store_true")
    options = parser.parse_args(arguments)
    if options.check:
        return check()
    with tempfile.TemporaryDirectory(prefix="outrider-lock-") as folder:
        venv.EnvBuilder(symlinks=True, with_pip=True).create(folder)
        python = f"{folder}/bin/python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", UV], check=True)
        for lock in LOCKS:
            make(lock, python, upgrade=options.upgrade)
    return 0


def check() -> int:
    stale = [lock.name for lock in LOCKS if recorded_digest(lock) != digest(lock)]
    for name in stale:
        print(f"{name} was not made from the requirements that stand now: run make lock.")
    return 1 if stale else 0


def make(lock: Lock, python: str, *, upgrade: bool) -> None:
    every_extra = ["--all-extras"] if set(PROJECTS) <= set(lock.sources) else []
    command = [
        *[
            python,
            "-m",
            "uv",
            "pip",
            "compile",
            "--quiet",
            "--universal",
            "--python-version",
            "3.11",
        ],
        *["--generate-hashes", "--no-emit-package", "outrider", *every_extra],
        *[part for other in lock.agrees_with for part in ("-c", other)],
        *lock.sources,
        *["-o", lock.name],
        *(["--upgrade"] if upgrade else []),
    ]
    variables = os.environ | {"UV_CUSTOM_COMPILE_COMMAND": "make lock"}
    subprocess.run(command, cwd=ROOT, env=variables, check=True)
    _, _, pins = lock.path.read_text().partition("make lock\n")
    for line in pins.splitlines():
        if "://" in line or " @ " in line or line.startswith("-"):
            raise SystemExit(f"{lock.name}: names a place, not a package: {line}")
    heading = f"# Made by make lock: change {' or '.join(lock.sources)} instead.\n"
    lock.path.write_text(f"{heading}{DIGEST}{digest(lock)}\n{pins}")
    print(f"{lock.name}: {len(list(pinned(lock)))} packages")


def recorded_digest(lock: Lock) -> str:
    try:
        lines = lock.path.read_text().splitlines()
    except FileNotFoundError:
        return ""
    return next((line.removeprefix(DIGEST) for line in lines if line.startswith(DIGEST)), "")


def digest(lock: Lock) -> str:
    """Of the requirements alone, so that neither a comment nor a version of ours makes a lock stale."""
    inputs = {
        "sources": {name: requirements(ROOT / name) for name in lock.sources},
        "agrees_with": [
            line for other in LOCKS if other.name in lock.agrees_with for line in pinned(other)
        ],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def requirements(source: Path) -> list[str]:
    if source.suffix == ".toml":
        project = tomllib.loads(source.read_text())["project"]
        own = re.compile(r"outrider\s*==")
        found = [*project["dependencies"]]
        for extra, names in project.get("optional-dependencies", {}).items():
            found += [f"{name} [{extra}]" for name in names]
        return sorted(line for line in found if not own.match(line))
    lines = (line.split("#")[0].strip() for line in source.read_text().splitlines())
    return sorted(line for line in lines if line)


def pinned(lock: Lock) -> Iterator[str]:
    """The lock's `name==version` parts, with their markers."""
    if not lock.path.exists():
        return
    for line in lock.path.read_text().splitlines():
        if line and line[0].isalnum():
            yield line.removesuffix("\\").strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
