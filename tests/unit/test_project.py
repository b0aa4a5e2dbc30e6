"""The checkout as a whole: one version, one licence, packages that carry what they need, locks without places."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECTS = (ROOT, ROOT / "client", ROOT / "server")
LOCKS = sorted(ROOT.glob("requirements*.txt"))


def project(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return table


def test_every_distribution_has_the_same_version_licence_and_python() -> None:
    for key in ("version", "license", "requires-python"):
        assert len({project(folder)[key] for folder in PROJECTS}) == 1, key


def test_the_server_requires_the_client_of_its_own_version() -> None:
    assert f"outrider=={project(ROOT)['version']}" in project(ROOT / "server")["dependencies"]


def test_the_changelog_tells_of_this_version_or_of_what_is_unreleased() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(
        rf"^## \[(Unreleased|{re.escape(project(ROOT)['version'])})\]", text, re.MULTILINE
    )


def test_licence_and_notice_go_with_each_distribution() -> None:
    for name in ("LICENSE", "NOTICE"):
        text = (ROOT / name).read_text()
        assert "The Outrider authors" in text
        for folder in PROJECTS[1:]:
            assert (folder / name).read_text() == text


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_a_lock_pins_and_hashes_every_package_and_names_no_place(lock: Path) -> None:
    text = lock.read_text()
    assert "://" not in text
    assert str(ROOT) not in text
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.IGNORECASE | re.MULTILINE)[1:]
    assert entries
    for entry in entries:
        assert re.match(r"[A-Za-z0-9._-]+==[^\s]+", entry), entry
        assert "--hash=sha256:" in entry, entry


def test_every_lock_that_shares_a_package_pins_the_same_version() -> None:
    # The generator has runtimes of its own, older than the server's.
    pins: dict[str, set[str]] = {}
    for lock in LOCKS:
        if lock.name != "requirements-generate.txt":
            for name, version in re.findall(
                r"^([a-z0-9-]+)==([^\s]+)", lock.read_text(), re.MULTILINE
            ):
                pins.setdefault(name, set()).add(version)
    assert {name: versions for name, versions in pins.items() if len(versions) > 1} == {}


def test_the_client_wheel_holds_the_client_and_nothing_of_the_server(tmp_path: Path) -> None:
    names = wheel(ROOT / "client", tmp_path)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"buf", "outrider"}
    assert {"outrider/py.typed", "buf/py.typed", "buf/validate/validate_pb2.py"} <= names
    assert {
        f"outrider/v1/{path.name}" for path in (ROOT / "client/outrider/v1").glob("*_pb2*.py*")
    } <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_server_wheel_holds_every_file_of_its_package_and_no_stubs(tmp_path: Path) -> None:
    names = wheel(ROOT / "server", tmp_path)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"outrider_server"}
    package = ROOT / "server" / "outrider_server"
    wanted = {
        str(path.relative_to(ROOT / "server"))
        for pattern in ("*.py", "*.sql", "py.typed")
        for path in package.rglob(pattern)
    }
    assert any(name.endswith(".sql") for name in wanted)
    assert wanted - names == set()


def wheel(folder: Path, out: Path) -> set[str]:
    """The file names in the wheel of `folder`, built as it stands and without a network."""
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())
