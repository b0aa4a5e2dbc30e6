import os
import stat
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from outrider_server.secrets.errors import KeyFileError
from outrider_server.secrets.keys import (
    KEYS_MAX,
    KeyEncryptionKey,
    KeyRing,
    add_key,
    load,
    load_or_create,
)

LINE = "kek_" + b64encode(b"k" * 32).decode()


def test_the_file_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "keys"
    first = load_or_create(path, os.urandom)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_create(path, os.urandom) == first
    assert load(path) == first
    assert list(path.parent.iterdir()) == [path], "nothing temporary stays"


def test_processes_that_start_at_once_agree_on_one_key(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    with ThreadPoolExecutor(8) as threads:
        rings = list(threads.map(lambda _: load_or_create(path, os.urandom), range(32)))
    assert set(rings) == {load(path)}


def test_an_existing_file_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("not a key\n")
    path.chmod(0o600)
    with pytest.raises(KeyFileError):
        load_or_create(path, os.urandom)
    assert path.read_text() == "not a key\n"


def test_a_new_key_becomes_the_first_and_the_old_ones_stay(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    old = load_or_create(path, os.urandom)
    new = add_key(path, os.urandom)
    assert new.keys[1:] == old.keys
    assert new.primary != old.primary
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o604, 0o620, 0o666, 0o602])
def test_a_file_open_to_others_is_refused_and_the_remedy_told(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys"
    load_or_create(path, os.urandom)
    path.chmod(mode)
    with pytest.raises(KeyFileError, match="chmod 600"):
        load(path)


@pytest.mark.parametrize("mode", [0o400, 0o440, 0o640])
def test_a_file_that_its_group_may_read_is_accepted(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys"
    ring = load_or_create(path, os.urandom)
    path.chmod(mode)
    assert load(path) == ring


def test_a_missing_file_is_told_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_text_may_hold_comments_and_several_keys() -> None:
    other = "kek_" + b64encode(b"o" * 32).decode()
    ring = KeyRing.parse(f"# mine\n\n {LINE} \r\n{other}\n")
    assert [key.key for key in ring.keys] == [b"k" * 32, b"o" * 32]
    assert ring.primary.id != ring.keys[1].id


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "k" * 44,
        "kek_!!!!",
        "kek_" + b64encode(b"k" * 31).decode(),
        "kek_" + b64encode(b"k" * 33).decode(),
        f"{LINE}\n{LINE}\n",
        "\n".join(
            "kek_" + b64encode(bytes([number]) * 32).decode() for number in range(KEYS_MAX + 1)
        ),
    ],
    ids=["empty", "comment", "prefix", "base64", "short", "long", "twice", "many"],
)
def test_text_without_usable_keys_is_refused_without_being_repeated(text: str) -> None:
    with pytest.raises(KeyFileError) as caught:
        KeyRing.parse(text)
    for line in text.split():
        assert len(line) < 8 or line not in repr(caught.value)


def test_binary_and_oversized_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    for content in (b"\xff\xfe", b"#" * 100_000):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(KeyFileError):
            load(path)


def test_keys_do_not_show_themselves() -> None:
    ring = KeyRing((KeyEncryptionKey.of(b"secretsecretsecretsecretsecretse"),))
    assert "secret" not in repr(ring)


def test_a_file_that_was_lost_is_not_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "state" / "keys"
    with pytest.raises(KeyFileError, match=str(path)):
        load_or_create(path, os.urandom, in_use=True)
    assert not path.parent.exists()
    made = load_or_create(path, os.urandom)
    assert load_or_create(path, os.urandom, in_use=True) == made
