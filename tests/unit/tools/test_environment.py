"""When an environment of the checkout is left alone, mended or made anew, and what is said when that fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tools import environment
from tools.environment import Environment, explanation, stamp_of, state


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of one lock and one project, in a folder with a space in its name."""
    root = tmp_path / "a checkout"
    (root / "server" / "package").mkdir(parents=True)
    (root / "server" / "package" / "__init__.py").touch()
    (root / "server" / "pyproject.toml").write_text("[project]\n")
    (root / "lock.txt").write_text("one==1\n")
    monkeypatch.setattr(environment, "ROOT", root)
    return root


@pytest.fixture
def made(checkout: Path) -> Environment:
    """An environment as it stands after its making."""
    made = Environment(checkout / ".venv", locks=("lock.txt",), projects=("server",))
    (made.folder / "bin").mkdir(parents=True)
    made.python.symlink_to(sys.executable)
    made.stamp.write_text(
        json.dumps(stamp_of(made) | {"python": environment.python_of_this_process()})
    )
    return made


def test_what_was_made_is_whole(made: Environment) -> None:
    assert state(made, named=False) == "whole"
    assert state(made, named=True) == "whole"


def test_without_a_stamp_it_is_made_anew(made: Environment) -> None:
    made.stamp.unlink()
    assert state(made, named=False) == "none"


def test_a_torn_stamp_counts_as_none(made: Environment) -> None:
    made.stamp.write_text(made.stamp.read_text()[:20])
    assert state(made, named=False) == "none"


def test_another_lock_makes_it_anew(made: Environment, checkout: Path) -> None:
    (checkout / "lock.txt").write_text("one==2\n")
    assert state(made, named=False) == "none"


def test_a_changed_project_is_installed_again(made: Environment, checkout: Path) -> None:
    (checkout / "server" / "pyproject.toml").write_text('[project]\nname = "x"\n')
    assert state(made, named=False) == "projects"


def test_a_new_package_is_installed_again(made: Environment, checkout: Path) -> None:
    (checkout / "server" / "second").mkdir()
    (checkout / "server" / "second" / "__init__.py").touch()
    assert state(made, named=False) == "projects"


def test_a_change_of_code_leaves_it_alone(made: Environment, checkout: Path) -> None:
    (checkout / "server" / "package" / "__init__.py").write_text("x = 1\n")
    assert state(made, named=False) == "whole"


def test_a_moved_checkout_makes_it_anew(
    made: Environment, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = checkout.rename(checkout.with_name("moved"))
    monkeypatch.setattr(environment, "ROOT", moved)
    there = Environment(moved / ".venv", locks=made.locks, projects=made.projects)
    assert there.stamp.exists()
    assert state(there, named=False) == "none"


def test_a_python_that_is_gone_makes_it_anew(made: Environment) -> None:
    made.python.unlink()
    made.python.symlink_to("/nonexistent/python")
    assert state(made, named=False) == "none"


def test_another_python_makes_it_anew_only_when_one_is_named(made: Environment) -> None:
    stamp = json.loads(made.stamp.read_text()) | {"python": "/usr 3.99.0"}
    made.stamp.write_text(json.dumps(stamp))
    assert state(made, named=False) == "whole"
    assert state(made, named=True) == "none"


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("OSError: [Errno 28] No space left on device", "make room"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE", "index"),
        ("ERROR: No matching distribution found for one==1", "make PYTHON="),
        ("WARNING: Retrying (Retry(total=0)) after connection broken", "check the network"),
    ],
)
def test_a_known_failure_is_one_sentence_that_says_what_to_do(
    said: str, sentence: str, checkout: Path
) -> None:
    explained = explanation(f"Collecting one\n{said}\n", checkout / "build" / "setup.log")
    assert sentence in explained
    assert "\n" not in explained


def test_an_unknown_failure_shows_its_last_words_and_where_the_rest_is(checkout: Path) -> None:
    said = "\n".join(f"line {number}" for number in range(100))
    explained = explanation(said, checkout / "build" / "setup.log")
    assert "build/setup.log" in explained.splitlines()[0]
    assert explained.endswith("line 99")
    assert "line 50" not in explained


def test_a_python_that_is_missing_is_told_in_one_sentence() -> None:
    root = Path(environment.__file__).resolve().parents[1]
    ran = subprocess.run(
        ["/bin/sh", str(root / "tools" / "setup.sh"), "dev"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": "/nonexistent/python"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert ran.stderr.splitlines() == [
        "Outrider: PYTHON=/nonexistent/python does not run:"
        " name a Python 3.11 or newer, for example make PYTHON=python3.11."
    ]
