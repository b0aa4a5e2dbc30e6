"""Key-encryption keys: a file (or text) of one key a line, the first of which seals.

    # a comment
    kek_<base64 of 32 random bytes>      seals and unseals
    kek_<base64 of 32 random bytes>      older: unseals what was sealed before a rotation

A key's id is a digest of the key, so it need not be configured and cannot be given twice. Rule: the file is made once,
readable by its owner alone, and never replaced by a half-written or different one: a lost key loses every secret sealed
under it, and a new one in its place would only hide that.
"""

from __future__ import annotations

import binascii
import contextlib
import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from outrider_server.secrets.errors import KeyFileError

KEY_BYTES = 32
KEY_ID_BYTES = 8
KEYS_MAX = 32
_KEY_PREFIX = "kek_"
_FILE_BYTES_MAX = 64 * 1024
_OTHERS_MAY = stat.S_IWGRP | stat.S_IROTH | stat.S_IWOTH

RandomBytes = Callable[[int], bytes]
"""A source of random bytes such as `os.urandom`."""


@dataclass(frozen=True, slots=True)
class KeyEncryptionKey:
    """One key with its id."""

    id: bytes
    key: bytes = field(repr=False)

    @classmethod
    def of(cls, key: bytes) -> KeyEncryptionKey:
        """The key with the id that is its own."""
        if len(key) != KEY_BYTES:
            raise KeyFileError(f"a key-encryption key holds {KEY_BYTES} bytes, not {len(key)}")
        return cls(hashlib.sha256(b"outrider key id\0" + key).digest()[:KEY_ID_BYTES], key)


@dataclass(frozen=True, slots=True)
class KeyRing:
    """All keys of an installation, the one that seals first."""

    keys: tuple[KeyEncryptionKey, ...]

    @property
    def primary(self) -> KeyEncryptionKey:
        """The key that seals."""
        return self.keys[0]

    @classmethod
    def parse(cls, text: str) -> KeyRing:
        """The keys of a key file's text, which may also come from the environment."""
        keys: list[KeyEncryptionKey] = []
        for number, raw in enumerate(text.splitlines(), start=1):
            line = raw.strip()
            if not line or line.startswith("#"):
                continue
            key = KeyEncryptionKey.of(_decode(line, number))
            if key in keys:
                raise KeyFileError(f"line {number} of the keys repeats an earlier key")
            keys.append(key)
        if not keys:
            raise KeyFileError("there is no key: expected a line that starts with kek_")
        if len(keys) > KEYS_MAX:
            raise KeyFileError(f"at most {KEYS_MAX} keys, not {len(keys)}")
        return cls(tuple(keys))


def load_or_create(path: Path, random: RandomBytes, *, in_use: bool = False) -> KeyRing:
    """The keys of the file at `path`, which is made with one new key if it is not there.

    `in_use`: values are sealed already, so a file that is not there was lost, and is not made anew.
    Several processes may start at once: one makes the file, all read the same.
    """
    if not path.exists():
        if in_use:
            raise KeyFileError(
                f"the key file {path} is missing, and the database holds secrets sealed under its keys: restore it"
            )
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            _publish(path, _HEADER + _line(random), random, replace=False)
    return load(path)


def load(path: Path) -> KeyRing:
    """The keys of the file at `path`; KeyFileError if it is missing or open to others."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            raw = file.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise KeyFileError(f"cannot read the key file {path}: {error.strerror}") from None
    if mode & _OTHERS_MAY:
        raise KeyFileError(f"the key file {path} is open to others: run chmod 600 on it")
    if len(raw) > _FILE_BYTES_MAX:
        raise KeyFileError(f"the key file {path} is larger than {_FILE_BYTES_MAX} bytes")
    try:
        return KeyRing.parse(raw.decode("ascii"))
    except UnicodeDecodeError:
        raise KeyFileError(f"the key file {path} is not text") from None
    except KeyFileError as error:
        raise KeyFileError(f"{path}: {error}") from None


def add_key(path: Path, random: RandomBytes) -> KeyRing:
    """Begin a rotation: a new key becomes the first of the file at `path`; the others stay and unseal.

    A person runs this, one at a time; running nodes take the new key when they read the file again. A key may be
    removed once nothing is sealed under it any more (`Sealer.is_current`).
    """
    load(path)  # refuse to touch a file that cannot be used
    _publish(path, _line(random) + path.read_text("ascii"), random, replace=True)
    return load(path)


_HEADER = (
    "# Key-encryption keys of this Outrider installation. Keep a copy in a safe place:\n"
    "# without it the stored secrets cannot be read. The first key seals, all unseal.\n"
)


def _line(random: RandomBytes) -> str:
    return _KEY_PREFIX + binascii.b2a_base64(random(KEY_BYTES), newline=False).decode() + "\n"


def _decode(line: str, number: int) -> bytes:
    if line.startswith(_KEY_PREFIX):
        # The cause would carry the line into a traceback.
        with contextlib.suppress(ValueError):
            return binascii.a2b_base64(line[len(_KEY_PREFIX) :], strict_mode=True)
    raise KeyFileError(f"line {number} of the keys is not kek_ and base64")


def _publish(path: Path, text: str, random: RandomBytes, *, replace: bool) -> None:
    """Put a complete, flushed file at `path` in one step; FileExistsError if there is one and `replace` is false."""
    temporary = path.with_name(f".{path.name}.{random(8).hex()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            path.hardlink_to(temporary)  # fails where a rename would overwrite
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except FileExistsError:
        raise
    except OSError as error:
        raise KeyFileError(f"cannot write the key file {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
