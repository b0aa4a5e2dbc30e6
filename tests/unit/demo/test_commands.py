"""The lines to paste are whole shell commands, with the path of a program that exists."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from outrider_server.demo.commands import Tools, find_tools, to_try
from outrider_server.demo.scenario import EXAMPLE_TO_PUBLISH


def lines(tools: Tools) -> list[str]:
    return to_try(
        tools,
        "127.0.0.1:4510",
        publisher_key="ork_p",
        integration_key="ork_i",
        tenant="demo",
        event=EXAMPLE_TO_PUBLISH,
    )


def program(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(0o755)


def nowhere(_name: str) -> str | None:
    return None


def test_a_program_beside_the_running_python_is_named_from_here(tmp_path: Path) -> None:
    program(tmp_path / ".venv" / "bin" / "grpcurl")
    found = find_tools(tmp_path / ".venv" / "bin", tmp_path, nowhere)
    assert found == Tools(grpcurl=".venv/bin/grpcurl")


def test_a_path_from_elsewhere_is_whole_and_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "my programs"
    program(folder / "buf")
    found = find_tools(folder, tmp_path / "elsewhere", nowhere)
    assert shlex.split(found.buf) == [str(folder / "buf")]
    assert not found.grpcurl


def test_else_the_path_of_the_shell_is_looked_at(tmp_path: Path) -> None:
    def which(name: str) -> str | None:
        return "/usr/bin/grpcurl" if name == "grpcurl" else None

    assert find_tools(tmp_path, tmp_path, which) == Tools(grpcurl="grpcurl")


def test_grpcurl_lists_describes_and_publishes_with_the_key() -> None:
    listing, describing, publishing, subscriptions = (
        shlex.split(line) for line in lines(Tools(grpcurl=".venv/bin/grpcurl"))
    )
    assert listing == [".venv/bin/grpcurl", "-plaintext", "127.0.0.1:4510", "list"]
    assert describing[-2:] == ["describe", "outrider.v1.IngestService.Publish"]
    assert publishing[3] == "authorization: Bearer ork_p"
    sent = json.loads(publishing[5])
    assert sent["parent"] == "tenants/demo"
    assert json.loads(sent["events"][0]["dataJson"])["order"]["total"] == 12500
    assert "authorization: Bearer ork_i" in subscriptions


def test_buf_takes_its_place() -> None:
    made = lines(Tools(buf=".venv/bin/buf"))
    assert all(line.startswith(".venv/bin/buf curl --protocol grpc") for line in made)
    assert shlex.split(made[2])[-1] == "http://127.0.0.1:4510/outrider.v1.IngestService/Publish"


def test_without_either_it_says_how_to_get_one() -> None:
    (only,) = lines(Tools())
    assert "pip install grpcurl" in only
