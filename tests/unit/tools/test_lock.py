"""When a lock counts as made from other requirements than those that stand now."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools import lock as module
from tools.lock import DIGEST, Lock, digest, recorded_digest

FIRST = Lock("first.txt", ("project.toml",))
SECOND = Lock("second.txt", ("second.in",), ("first.txt",))

PROJECT = """\
[project]
version = "1"
dependencies = ["outrider==1", "one>=1"]
[project.optional-dependencies]
extra = ["two"]
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "LOCKS", (FIRST, SECOND))
    (tmp_path / "project.toml").write_text(PROJECT)
    (tmp_path / "second.in").write_text("# why\nthree\n")
    for lock, pins in ((FIRST, "one==1.0 \\\n    --hash=x\n"), (SECOND, "three==3.0\n")):
        (tmp_path / lock.name).write_text(pins)
        (tmp_path / lock.name).write_text(f"# Heading\n{DIGEST}{digest(lock)}\n{pins}")
    return tmp_path


def fresh(lock: Lock) -> bool:
    return recorded_digest(lock) == digest(lock)


def test_locks_as_made_are_fresh(checkout: Path) -> None:
    assert fresh(FIRST)
    assert fresh(SECOND)
    assert module.check() == 0


@pytest.mark.parametrize(
    ("before", "after"),
    [("one>=1", "one>=2"), ('"one>=1"', '"one>=1", "four"'), ('extra = ["two"]', "extra = []")],
)
def test_another_requirement_makes_a_lock_stale(checkout: Path, before: str, after: str) -> None:
    (checkout / "project.toml").write_text(PROJECT.replace(before, after))
    assert not fresh(FIRST)
    assert module.check() == 1


def test_a_version_of_ours_does_not(checkout: Path) -> None:
    text = PROJECT.replace('"1"', '"2"').replace("outrider==1", "outrider==2")
    (checkout / "project.toml").write_text(text)
    assert fresh(FIRST)


def test_a_comment_does_not(checkout: Path) -> None:
    (checkout / "second.in").write_text("three # another reason\n")
    assert fresh(SECOND)


def test_another_version_in_a_lock_that_it_repeats_does(checkout: Path) -> None:
    path = checkout / FIRST.name
    path.write_text(path.read_text().replace("one==1.0", "one==1.1"))
    assert not fresh(SECOND)


def test_a_lock_that_is_missing_or_without_a_digest_is_stale(checkout: Path) -> None:
    (checkout / FIRST.name).unlink()
    (checkout / SECOND.name).write_text("three==3.0\n")
    assert not fresh(FIRST)
    assert not fresh(SECOND)
