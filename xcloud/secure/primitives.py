"""The cryptographic building blocks, each a thin face of `cryptography`: nothing here is invented.

All that is signed, hashed or bound goes through `packed`, an injective encoding: two different lists of fields
never become the same bytes. Every use has a label of its own, with a version, so that what was made for one
purpose is worthless for another.

Sources: X25519 RFC 7748, HKDF RFC 5869, ChaCha20-Poly1305 RFC 8439, Ed25519 RFC 8032, AES-CTR SP 800-38A.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from xcloud.errors import SecurityError

__all__ = [
    "KEY_BYTES",
    "TAG_BYTES",
    "Keystream",
    "digest",
    "exchange",
    "exchange_key",
    "hkdf",
    "open_sealed",
    "packed",
    "public_of",
    "seal",
    "sign",
    "verify",
]

KEY_BYTES = 32
"""Of every key, seed, digest and public key here."""
TAG_BYTES = 16
"""What sealing adds to a text."""
PIECE = 1 << 18
"""Bytes of keystream that are made at a time: they stay in cache until they are used."""

Field = int | str | bytes | Sequence["Field"]


def packed(*fields: Field) -> bytes:
    """An injective encoding of fields: type, length, content; integers from 0 to 2^64 - 1, sequences nest."""
    out = bytearray()
    for field in fields:
        if isinstance(field, bytes):
            kind, body = b"b", field
        elif isinstance(field, str):
            kind, body = b"s", field.encode()
        elif isinstance(field, int):
            kind, body = b"i", field.to_bytes(8, "big")
        else:
            kind, body = b"l", packed(*field)
        out += kind + len(body).to_bytes(8, "big") + body
    return bytes(out)


def digest(label: str, *fields: Field) -> bytes:
    """SHA-256 of the labelled fields."""
    return hashlib.sha256(packed(label, *fields)).digest()


def hkdf(key: bytes, salt: bytes, label: str, *fields: Field) -> bytes:
    """A 32-byte key (HKDF-SHA256) for the one purpose that label and fields name."""
    return HKDF(hashes.SHA256(), KEY_BYTES, salt, packed(label, *fields)).derive(key)


def exchange_key(seed: bytes) -> X25519PrivateKey:
    """The X25519 key that a 32-byte seed stands for; the seed can be shared out, and checked against the public key."""
    return X25519PrivateKey.from_private_bytes(digest("xcloud/x25519/v1", seed))


def public_of(key: X25519PrivateKey | Ed25519PrivateKey) -> bytes:
    """The 32 bytes of its public key."""
    return key.public_key().public_bytes_raw()


def exchange(own: X25519PrivateKey, other: bytes, peer: str) -> bytes:
    """The shared secret with `peer`'s public key.

    Raises:
        SecurityError: a point of low order, which would make the secret known to all, or no key at all.
    """
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError:
        raise SecurityError(
            f"{peer}: its X25519 key {other[:8].hex()}... is of low order or malformed"
        ) from None


def sign(key: Ed25519PrivateKey, label: str, *fields: Field) -> bytes:
    """A 64-byte signature over the labelled fields."""
    return key.sign(packed(label, *fields))


def verify(public: bytes, signature: bytes, peer: str, label: str, *fields: Field) -> None:
    """Check `peer`'s signature over the labelled fields.

    Raises:
        SecurityError: it is not theirs, or was made for something else.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, packed(label, *fields))
    except (InvalidSignature, ValueError):
        raise SecurityError(
            f"{peer}: the signature on {label} is not by its key, or not over this content"
        ) from None


def seal(key: bytes, text: bytes | memoryview, bound: bytes, nonce: int = 0) -> bytes:
    """ChaCha20-Poly1305; `bound` is authenticated with it. A key may seal once for each `nonce`."""
    return ChaCha20Poly1305(key).encrypt(nonce.to_bytes(12, "big"), text, bound)


def open_sealed(key: bytes, sealed: bytes | memoryview, bound: bytes, peer: str, nonce: int = 0) -> bytes:
    """What `seal` has sealed.

    Raises:
        SecurityError: it was altered, cut, or sealed for something else.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(nonce.to_bytes(12, "big"), sealed, bound)
    except (InvalidTag, ValueError):
        raise SecurityError(
            f"{peer}: a sealed message does not open: altered, cut short, replayed, or for somebody else"
        ) from None


class Keystream:
    """AES-256-CTR: bytes that nobody without the key can tell from random ones.

    The counter block is the chunk's index (64 bits) and the block in the chunk (64 bits), so any rank can make
    any chunk's stream, and no two chunks share a block.
    """

    def __init__(self, key: bytes) -> None:
        self._key = algorithms.AES(key)

    def fill(self, chunk: int, out: npt.NDArray[np.uint8]) -> None:
        """Overwrite `out` (contiguous uint8) with the stream of `chunk` from its beginning."""
        stream = self.of(chunk)
        for start in range(0, out.size, PIECE):
            stream(out[start : start + PIECE])

    def of(self, chunk: int) -> Any:
        """A function that fills one uint8 array after the other, of up to `PIECE` bytes each, with the stream of `chunk`."""
        encryptor = Cipher(self._key, modes.CTR(chunk.to_bytes(8, "big") + bytes(8))).encryptor()

        def piece(out: npt.NDArray[np.uint8]) -> None:
            assert out.size <= PIECE, "the rest would stay as it was, and be sent as a mask"
            encryptor.update_into(_ZEROS[: out.size], memoryview(out))

        return piece


_ZEROS = memoryview(bytes(PIECE))
