"""What the documents name is there: tests, files, and the order of rooms that import-linter checks."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "server" / "outrider_server"
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "RELIABILITY.md")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
TEST = re.compile(r"`(tests/[\w/]+\.py)::([\w:]+)`")


def section(title: str) -> str:
    """The text of one section of ARCHITECTURE.md."""
    _, found, rest = ARCHITECTURE.partition(f"\n## {title}\n")
    assert found, f"ARCHITECTURE.md has no section {title!r}"
    return rest.partition("\n## ")[0]


def rows(text: str) -> dict[str, str]:
    """The first cell of each table row, with the last."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0].strip("`"): row[-1] for row in cells}


@cache
def named_tests(path: str) -> frozenset[str]:
    """The tests that pytest finds in a file, as they stand behind its name."""
    tree = ast.parse((ROOT / path).read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return frozenset(
        prefix + node.name
        for prefix, body in [("", tree.body), *((f"{c.name}::", c.body) for c in classes)]
        for node in body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
    )


GUARANTEES = rows(section("Guarantees, and the tests that show them"))


@pytest.mark.parametrize("number", [f"G{n}" for n in range(1, 8)])
def test_each_guarantee_names_its_tests(number: str) -> None:
    assert TEST.search(GUARANTEES[number])


def test_each_stage_of_the_path_names_its_tests() -> None:
    path = re.sub(r"\(.*?\)", "", section("The path of an event").split("```")[1])
    stages = set(re.findall(r"\b(?:api|pipeline|policy|transport|upkeep)/\w+\.py", path))
    assert len(stages) > 10
    assert {stage for stage in stages if not TEST.search(GUARANTEES.get(stage, ""))} == set()


def test_every_test_that_is_named_exists() -> None:
    named = TEST.findall(ARCHITECTURE)
    assert named
    for path, test in named:
        assert (ROOT / path).is_file(), path
        assert test in named_tests(path), f"{path}::{test}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_exists(document: str) -> None:
    """Paths from the root, or from the server's package; a link's target from the root."""
    text = (ROOT / document).read_text()
    named = re.findall(r"(?<![\w./-])[\w.-]+/[\w./-]*\w\.(?:py|sql|toml|md|proto|txt)\b", text)
    named += re.findall(r"\]\((?!http)([^)#]+)\)", text)
    missing = [
        name
        for name in named
        if "NNNN" not in name and not (ROOT / name).exists() and not (PACKAGE / name).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("document", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_the_order_of_rooms_is_the_one_that_is_checked(document: str) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    (written,) = re.findall(r"```\n(__main__ >.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert [layer.split(" | ") for layer in layers] == [
        layer.split(" | ") for layer in " ".join(written.split()).split(" > ")
    ]
