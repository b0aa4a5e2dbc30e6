"""What can go wrong with keys and sealed values. Nobody's call causes these: an operator has to act.

SecretsError
|-- KeyFileError     the file of key-encryption keys cannot be read, or must not be used as it is
|-- UnknownKeyError  sealed under a key that this installation does not have
`-- SealBrokenError  not what was sealed: damaged, or moved from where it was sealed for

Rule: none of them holds a key or a plaintext.
"""

from __future__ import annotations


class SecretsError(Exception):
    """Base of every error of this room."""


class KeyFileError(SecretsError):
    """The key file cannot be used; the message says what to do."""


class UnknownKeyError(SecretsError):
    """A value was sealed under a key that is not in the key file."""

    def __init__(self, key_id: str) -> None:
        super().__init__(
            f"a value is sealed under key {key_id}, which this installation does not have: "
            "restore that line of the key file"
        )
        self.key_id = key_id


class SealBrokenError(SecretsError):
    """A sealed value is damaged, or stands where it was not sealed for."""
