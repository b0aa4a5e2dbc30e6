"""Build this checkout's environments, `.venv` and `.venv-generate`, from the hash-locked files: environment.py [NAME...].

The rule: an environment with a fitting stamp is whole and is left alone. The stamp goes before anything is touched and
comes back last, so an environment whose making was interrupted, that was moved or copied, or that was made from other
locks or another Python, is made anew. Standard library only, and nothing newer than Python 3.11: it runs first of all.

uv does the work where it is on the path, else the pip that ensurepip brings, else the pip of the Python that runs this.
Each follows its own configuration. Nothing is built in isolation, so nothing is installed that no lock names.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMP_FORMAT = 1
MACHINES = ("x86_64", "amd64", "aarch64", "arm64")
GLIBC_OLDEST = (2, 28)
FREE_MIB_MIN = 900
FREE_TEMPORARY_MIB_MIN = 200
LOG_LINES_SHOWN = 15
# Where a user's own pip settings would send packages elsewhere than into the environment.
PIP_VARIABLES_LEFT_OUT = (
    "PIP_TARGET",
    "PIP_PREFIX",
    "PIP_ROOT",
    "PIP_PYTHON",
    "PYTHONPATH",
    "PYTHONHOME",
)


class Stop(Exception):
    """What is in the way, as one sentence that says what to do."""


@dataclass(frozen=True)
class Environment:
    """What an environment is made of: locks installed in this order, then projects of this checkout, editable."""

    folder: Path
    locks: tuple[str, ...]
    projects: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def stamp(self) -> Path:
        return self.folder / "outrider-stamp.json"


ENVIRONMENTS = {
    "dev": Environment(
        folder=ROOT / ".venv",
        # What builds comes first: the rest holds a package without a wheel.
        locks=("requirements-build.txt", "requirements-dev.txt"),
        projects=("client", "server"),
        modules=("outrider", "outrider_server"),
    ),
    "generate": Environment(
        folder=ROOT / ".venv-generate",
        locks=("requirements-generate.txt",),
        modules=("grpc_tools",),
    ),
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="dev (the default), generate")
    parser.add_argument("--current", action="store_true", help="only tell, by exit status")
    options = parser.parse_args(arguments)
    environments = [ENVIRONMENTS[name] for name in options.names or ["dev"]]
    named = bool(os.environ.get("PYTHON"))
    if options.current:
        return 0 if all(state(one, named=False) == "whole" for one in environments) else 1
    try:
        check_system()
        with only_one():
            for environment in environments:
                make(environment, named=named)
    except Stop as stop:
        print(f"Outrider: {stop}", file=sys.stderr)
        return 1
    except PermissionError as error:
        print(
            f"Outrider: {error.filename or ROOT} cannot be written by this user: run make as the owner of the checkout,"
            " or use a checkout of your own.",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        print(f"Outrider: {full_disk_sentence(ROOT) if is_full(error) else error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nOutrider: interrupted; run make again to finish the setup.", file=sys.stderr)
        return 130
    return 0


def check_system() -> None:
    machine = platform.machine().lower()
    if machine not in MACHINES:
        raise Stop(
            f"the processor {machine} is not supported: its databases and filters come built for x86_64 and aarch64."
        )
    if sys.platform != "linux":
        return
    if "musl" in (sysconfig.get_config_var("SOABI") or ""):
        raise Stop("musl (Alpine) is not supported: use a Linux with glibc, for example Debian.")
    name, version = platform.libc_ver()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if name == "glibc" and numbers and numbers < GLIBC_OLDEST:
        raise Stop(f"glibc {version} is too old: use a Linux of 2019 or later (glibc 2.28).")


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Two at once would tear down what the other one builds; the second waits and then finds it made."""
    folder = ROOT / "build"
    folder.mkdir(exist_ok=True)
    with (folder / "setup.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another make setup of this checkout to end.", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def stamp_of(environment: Environment) -> dict[str, object]:
    """What a whole environment was made from. The folder is part of it: scripts in it name their own path."""
    return {
        "format": STAMP_FORMAT,
        "folder": str(environment.folder),
        "locks": digest([ROOT / lock for lock in environment.locks]),
        "projects": digest(
            # A project installed before its package exists would import nothing.
            [
                file
                for project in environment.projects
                for file in [
                    ROOT / project / "pyproject.toml",
                    *sorted((ROOT / project).glob("*/__init__.py")),
                ]
            ],
            contents=".toml",
        ),
    }


def digest(files: Sequence[Path], contents: str = "") -> str:
    hashed = hashlib.sha256()
    for file in files:
        hashed.update(f"{file.relative_to(ROOT)}\n".encode())
        if file.name.endswith(contents):
            hashed.update(file.read_bytes())
    return hashed.hexdigest()


def state(environment: Environment, *, named: bool) -> str:
    """`whole`; `projects` where only those must be installed again; else `none`."""
    try:
        found = json.loads(environment.stamp.read_text())
    except (OSError, ValueError):
        return "none"
    wanted = stamp_of(environment)
    if any(found.get(key) != wanted[key] for key in ("format", "folder", "locks")):
        return "none"
    if named and found.get("python") != python_of_this_process():
        return "none"
    if not runs([environment.python, "-I", "-c", ""]):
        return "none"
    return "whole" if found.get("projects") == wanted["projects"] else "projects"


def python_of_this_process() -> str:
    return f"{sys.base_prefix} {platform.python_version()}"


def make(environment: Environment, *, named: bool) -> None:
    before = state(environment, named=named)
    if before == "whole":
        return
    started = time.monotonic()
    check_disk()
    if before == "none":
        make_empty(environment.folder)
    else:
        environment.stamp.unlink()
    installer = Installer(environment)
    if before == "none":
        installer.install_locks()
    installer.install_projects()
    if environment.modules:
        installer.run([environment.python, "-I", "-c", f"import {', '.join(environment.modules)}"])
    stamp = stamp_of(environment) | {"python": python_of_this_process()}
    unfinished = environment.stamp.with_suffix(".new")
    unfinished.write_text(json.dumps(stamp, indent=1) + "\n")
    unfinished.replace(environment.stamp)
    print(f"{environment.folder.name} is ready ({time.monotonic() - started:.0f} s).", flush=True)


def make_empty(folder: Path) -> None:
    """A new environment without anything in it: pip comes later, from where it is to be had."""
    remove(folder)
    venv.EnvBuilder(symlinks=True, with_pip=False, prompt="outrider").create(folder)


def remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        # The stamp first: a removal that is cut short must not leave something that looks whole.
        (folder / "outrider-stamp.json").unlink(missing_ok=True)
        shutil.rmtree(folder)


class Installer:
    """Puts packages into one environment by uv or pip; what they print goes to a log, and is shown when they fail."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._log = ROOT / "build" / f"setup{environment.folder.name.removeprefix('.venv')}.log"
        self._log.write_text("")
        self._variables = {
            name: value for name, value in os.environ.items() if name not in PIP_VARIABLES_LEFT_OUT
        } | {
            "PIP_USER": "0",
            "PIP_NO_INPUT": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_ROOT_USER_ACTION": "ignore",
            "PIP_PROGRESS_BAR": "off",
        }
        # The environment itself may be activated in the calling shell; uv is told which one it is.
        self._variables.pop("VIRTUAL_ENV", None)
        self._uv = self._find_uv()

    def install_locks(self) -> None:
        name, python = self._environment.folder.name, platform.python_version()
        tool = "uv" if self._uv else "pip, about a minute"
        print(f"Making {name}: Python {python}, {tool}.", flush=True)
        if self._uv:
            try:
                self._install_locks(self._uv)
            except Stop:
                check_disk()
                # uv does not read pip's configuration, so it may know no index where pip knows one.
                print("uv failed; pip takes over, about a minute.", flush=True)
                self._uv = None
                make_empty(self._environment.folder)
            else:
                return
        self._install_locks(self._pip())

    def install_projects(self) -> None:
        if not self._environment.projects:
            return
        editable = [
            part for project in self._environment.projects for part in ("-e", f"./{project}")
        ]
        command = self._uv or self._pip()
        self.run([*command, "--no-deps", "--no-build-isolation", *editable])

    def _install_locks(self, command: Sequence[str]) -> None:
        for lock in self._environment.locks:
            self.run([*command, "--require-hashes", "--no-build-isolation", "-r", lock])

    def _find_uv(self) -> list[str] | None:
        path = shutil.which("uv")
        if path is None or not runs([path, "--version"]):
            return None
        return [path, "pip", "install", "--python", str(self._environment.python)]

    def _pip(self) -> list[str]:
        python = str(self._environment.python)
        if runs([python, "-I", "-m", "pip", "--version"]):
            return [python, "-m", "pip", "install"]
        if has("ensurepip"):
            self.run([python, "-I", "-m", "ensurepip", "--default-pip"])
            return [python, "-m", "pip", "install"]
        if has("pip"):
            return [sys.executable, "-m", "pip", "--python", python, "install"]
        raise Stop(
            f"{sys.executable} has neither ensurepip nor pip: install them"
            " (Debian, Ubuntu: apt-get install python3-venv) and run make again."
        )

    def run(self, command: Sequence[str | Path]) -> None:
        log = self._log
        with log.open("a") as output:
            print("$", *command, file=output, flush=True)
            begin = output.tell()
            finished = subprocess.run(
                command,
                cwd=ROOT,
                env=self._variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if finished.returncode != 0:
            with log.open(errors="replace") as output:
                output.seek(begin)
                raise Stop(explanation(output.read(), log))


def runs(command: Sequence[str | Path]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def has(program: str) -> bool:
    """Whether `-m program` would run: a folder that an uninstalled package left behind is not enough."""
    try:
        return importlib.util.find_spec(f"{program}.__main__") is not None
    except ImportError:
        return False


def explanation(said: str, log: Path) -> str:
    """What an installer's words come down to; its last words where that is not known."""
    shown = log.relative_to(ROOT)
    if "No space left on device" in said or "Disk quota exceeded" in said:
        return full_disk_sentence(ROOT)
    if "DO NOT MATCH THE HASHES" in said or "Hash mismatch" in said:
        return (
            "a downloaded package is not the one that the lock names: have the package index or its mirror put right"
            f" ({shown} tells which)."
        )
    if any(
        word in said
        for word in ("No matching distribution", "has no wheels", "has no usable wheels")
    ):
        return (
            f"a package has no build for Python {platform.python_version()} here, or the package index lacks it:"
            f" try another with make PYTHON=python3.11 ({shown} tells which)."
        )
    if any(
        word in said
        for word in (
            "Retrying (Retry",
            "Failed to fetch",
            "error sending request",
            "ConnectionError",
        )
    ):
        return (
            "the package index cannot be reached: check the network and pip's configuration (pip config list),"
            f" then run make again ({shown} tells more)."
        )
    tail = "\n".join(said.strip().splitlines()[-LOG_LINES_SHOWN:])
    return f"installing failed; the whole of it is in {shown}.\n{tail}"


def check_disk() -> None:
    for folder, needed in (
        (ROOT, FREE_MIB_MIN),
        (Path(tempfile.gettempdir()), FREE_TEMPORARY_MIB_MIN),
    ):
        if shutil.disk_usage(folder).free < needed << 20:
            raise Stop(full_disk_sentence(folder, needed))


def full_disk_sentence(folder: Path, needed_mib: int = FREE_MIB_MIN) -> str:
    free = shutil.disk_usage(folder).free >> 20
    return (
        f"the disk of {folder} is full ({free} MiB free, {needed_mib} needed): make room, or name another folder for"
        " temporary files with TMPDIR, and run make again."
    )


def is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
