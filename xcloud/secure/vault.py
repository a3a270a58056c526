"""What a region keeps outside its own machine: sealed for itself alone, in files that anybody may hold.

A region's checkpoint says nearly as much as an update: residuals, optimizer moments, local weights. It lies where every
region and the driver can reach it, so a region seals it with a key that comes from its identity, which stays on its machine.

AES-256-GCM, each file under a key of its own: HKDF-SHA256 of the vault's key with 32 random bytes as salt, which stand
in front of the text. So no nonce is ever used twice, however many files there are (SP 800-38D, RFC 5869).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from xcloud.errors import TamperError
from xcloud.secure.identity import Identity
from xcloud.secure.primitives import KEY_BYTES, Field, hkdf, packed

__all__ = ["Vault", "is_sealed"]

MAGIC = b"xcloud/vault/v1\n"
FILE = "xcloud/vault/file/v1"
KEY = "xcloud/vault/key/v1"


def is_sealed(data: bytes) -> bool:
    """Whether a file is one of a vault."""
    return data.startswith(MAGIC)


class Vault:
    """Seals files for one region of one job, and opens them.

    Args:
        owner: whose files these are, for errors.
        keys: to open with; the first one seals. The others are of identities that were rotated away.
        strict: whether a file that is not sealed is refused.
    """

    def __init__(self, owner: str, keys: Sequence[bytes], strict: bool) -> None:
        assert keys
        self.owner, self.strict, self._keys = owner, strict, tuple(keys)

    @classmethod
    def of(cls, identities: Sequence[Identity], job: str, strict: bool) -> Vault:
        """Of a region's identity, and of those that it had before."""
        keys = [one.derive(KEY, job) for one in identities]
        return cls(identities[0].name, keys, strict)

    def seal(self, data: bytes, *bound: Field) -> bytes:
        """A file's content; `bound` must be the same when it is opened."""
        salt = os.urandom(KEY_BYTES)
        sealed = AESGCM(self._of_file(self._keys[0], salt)).encrypt(bytes(12), data, self._bound(*bound))
        return b"".join((MAGIC, salt, sealed))

    def open(self, data: bytes, origin: str, *bound: Field) -> bytes:
        """What `seal` was given; `origin` names the file in errors.

        Raises:
            TamperError: it is not sealed, was altered, is another file, or is sealed with a key that is not here.
        """
        if not is_sealed(data):
            if not self.strict:
                return data
            raise TamperError(
                f"{origin}: not sealed, though region {self.owner!r} seals what it saves; "
                "a checkpoint from before that, or one that somebody else has put there"
            )
        salt, sealed = data[len(MAGIC) :][:KEY_BYTES], memoryview(data)[len(MAGIC) + KEY_BYTES :]
        for key in self._keys:
            try:
                return AESGCM(self._of_file(key, salt)).decrypt(bytes(12), sealed, self._bound(*bound))
            except (InvalidTag, ValueError):
                continue
        raise TamperError(
            f"{origin}: does not open with the key of region {self.owner!r}: altered, of another round, region or job, "
            "or sealed with a key that is no longer in its folder"
        )

    def _bound(self, *bound: Field) -> bytes:
        return packed(FILE, self.owner, *bound)

    @staticmethod
    def _of_file(key: bytes, salt: bytes) -> bytes:
        return hkdf(key, salt, FILE)
