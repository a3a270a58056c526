"""Secure aggregation by CKKS: updates are encrypted, ciphertexts are added, and only regions can open the sum.

Cheon, Kim, Kim, Song, Homomorphic encryption for arithmetic of approximate numbers (ASIACRYPT 2017), symmetric: all
regions of a sync derive one secret key from what each of them has sealed for the others (`member.Sync.receive`); neither
driver nor aggregator is among the receivers. There is no public key, and no key that switches keys: nothing is multiplied.

    region       fp32 -> 4,096 values a ciphertext, as 2,048 complex numbers -> 2 x 4,096 residues of 40 bits
    aggregator   adds residues modulo `MODULUS`: plain integers, no library, no key
    region       decrypts the sum

TenSEAL (Microsoft SEAL) encrypts and decrypts, and is imported where that is done. What travels are the residues alone, so
that whoever adds parses no foreign format. Parameters: degree 4,096 with one 40-bit prime; the table of
HomomorphicEncryption.org (2018) allows 109 bits for 128-bit security and 58 for 256-bit, both with a ternary secret. SEAL
checks the latter.
"""

from __future__ import annotations

import importlib
import math
import os
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from xcloud.codecs import Array, Bytes, CodecConfig, Frame, Ring
from xcloud.codecs.base import expect_bytes
from xcloud.errors import ConfigError, SecurityError
from xcloud.secure.primitives import hkdf

__all__ = [
    "DEGREE",
    "MODULUS",
    "SLOTS",
    "Cipher",
    "Encrypted",
    "EncryptedConfig",
    "Pace",
    "check_residues",
    "cipher_of",
    "encrypted_bytes",
    "measure",
    "most_of",
    "require",
]

DEGREE = 4096
"""Of the ring's polynomials."""
MODULUS = 1_099_511_480_321
"""The largest 40-bit prime that is 1 modulo twice the degree: what SEAL picks for 40 bits."""
WIDTH = 40
WORD = WIDTH // 8
SLOTS = DEGREE
"""fp32 values of one ciphertext: each complex slot carries two."""
CIPHERTEXT = 2 * DEGREE * WORD
SCALE = 2.0**31
"""Steps of 1; the noise of one encryption is about 150 steps (`docs/decisions/0035`)."""
ROOM = 0.9 * (MODULUS / 2) / SCALE
"""What the modulus of a sum's slots may reach; a tenth is kept for the noise."""
KEPT = 8
"""Keys that stay expanded: a few syncs."""

# SEAL's file: a header, and behind it, compressed or not, a prefix of fixed length and the residues as 64-bit words.
HEADER = struct.Struct("<HBBBBHQ")
PREFIX = 97
PLAIN, ZSTD = 0, 2
INNER = PREFIX + 2 * DEGREE * 8


def require() -> Any:
    """SEAL, as TenSEAL exports it.

    Raises:
        ConfigError: TenSEAL is not installed.
    """
    try:
        return importlib.import_module("tenseal.sealapi")
    except ImportError:
        raise ConfigError(
            "secure_aggregation.scheme ckks needs the package TenSEAL: pip install 'xcloud[he]'"
        ) from None


def ciphertexts(length: int) -> int:
    """That so many values take."""
    return -(-length // SLOTS)


def encrypted_bytes(length: int) -> int:
    """What so many fp32 values become."""
    return ciphertexts(length) * CIPHERTEXT


def most_of(members: int) -> float:
    """The largest magnitude of a value of which `members` may be added."""
    return ROOM / (math.sqrt(2) * members)


# -- residues ---------------------------------------------------------------------------------


def words_of(data: Bytes) -> npt.NDArray[np.uint64]:
    """The residues, one in each word."""
    words = np.zeros((data.size // WORD, 8), np.uint8)
    words[:, :WORD] = data.reshape(-1, WORD)
    return words.reshape(-1).view("<u8")


def bytes_of(words: npt.NDArray[np.uint64]) -> Bytes:
    """The inverse of `words_of`."""
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, 8)[:, :WORD]).reshape(-1)


def check_residues(data: Bytes, length: int) -> None:
    """Refuse what cannot be ciphertexts of `length` values.

    Raises:
        ValueError: says why.
    """
    expect_bytes(data, encrypted_bytes(length), length, "CKKS ciphertexts")
    if int(words_of(data).max(initial=0)) >= MODULUS:
        raise ValueError(f"its ciphertexts hold residues of {MODULUS} or more")


class Encrypted:
    """The codec of an encrypted sum: fp32 inside a region, residues outside; what adds is the latter.

    `UpdatePath.protect` encrypts what `encode` gives, `UpdatePath.opened` decrypts what `decode` is given.
    """

    linear = True
    feedback = 0.0

    def encode(self, values: Array, frame: Frame) -> Bytes:
        del frame
        return values.view(np.uint8)

    def decode(self, data: Bytes, length: int, frame: Frame) -> Array:
        del frame
        expect_bytes(data, 4 * length, length, "fp32")
        return data.view(np.float32)

    def add(self, total: Bytes, other: Bytes, frame: Frame) -> None:
        del frame
        words = words_of(total)
        words += words_of(other)
        np.subtract(words, np.uint64(MODULUS), out=words, where=words >= MODULUS)
        total[:] = bytes_of(words)

    def next_scale(self, merged: Array, total: Bytes, contributors: int, frame: Frame) -> Array | None:
        del merged, total, contributors, frame
        return None

    def ring(self, length: int, frame: Frame) -> Ring:
        """How long and how wide residues are. They wrap at `MODULUS`, so no mask may be added to them."""
        del frame
        return Ring(encrypted_bytes(length), 0, WIDTH)

    def check(self, data: Bytes, length: int) -> None:
        """See `check_residues`."""
        check_residues(data, length)


class EncryptedConfig(CodecConfig):
    """Not registered: `secure_aggregation.scheme: ckks` puts it in the place of `identity`."""

    type: Literal["ckks"] = "ckks"

    def build(self) -> Encrypted:
        return Encrypted()


# -- encryption -------------------------------------------------------------------------------


@lru_cache(maxsize=KEPT)
def cipher_of(key: bytes) -> Cipher:
    """A `Cipher`, made once for each key."""
    return Cipher(key)


class Cipher:
    """Encrypts updates and opens sums under the secret key that a 32-byte seed stands for.

    The secret polynomial is drawn by SEAL's generator (SHAKE-256) from the seed, so that a seed is all that regions have to
    share; every encryption draws from the system's randomness.

    Raises:
        ConfigError: TenSEAL is not installed.
        SecurityError: it is a version that works in another way.
    """

    def __init__(self, key: bytes) -> None:
        seal = self._seal = require()
        self._version = 0, 0
        context, seeded = _context(seal), _context(seal, key)
        secret = seal.KeyGenerator(seeded).secret_key()
        self._context, self._encoder = context, seal.CKKSEncoder(context)
        self._encryptor, self._decryptor = seal.Encryptor(context, secret), seal.Decryptor(context, secret)
        self._prefix = self._saved(self._encrypted(np.zeros(SLOTS)))[:PREFIX]
        probe = np.linspace(-1, 1, SLOTS, dtype=np.float32)
        if float(np.abs(self.decrypt(self.encrypt(probe), SLOTS) - probe).max()) > 1e-5:
            raise SecurityError("this version of TenSEAL does not decrypt what it has encrypted")

    def encrypt(self, values: Array) -> Bytes:
        """The residues of fp32 values; fresh randomness, so twice the same values are never the same bytes.

        Raises:
            SecurityError: see `Cipher`.
        """
        padded = np.zeros(ciphertexts(values.size) * SLOTS)
        padded[: values.size] = values
        out = np.empty(encrypted_bytes(values.size), np.uint8)
        for index, part in enumerate(padded.reshape(-1, SLOTS)):
            inner = self._saved(self._encrypted(part))
            if inner[:PREFIX] != self._prefix:
                raise SecurityError("TenSEAL wrote two ciphertexts of one kind in different ways")
            words = np.frombuffer(inner, "<u8", offset=PREFIX)
            out[index * CIPHERTEXT : (index + 1) * CIPHERTEXT] = bytes_of(words)
        return out

    def decrypt(self, data: Bytes, length: int) -> Array:
        """The `length` fp32 values of a ciphertext or of a sum; the same bytes give the same bits.

        Raises:
            SecurityError: they are no ciphertexts.
        """
        try:
            check_residues(data, length)
        except ValueError as error:
            raise SecurityError(str(error)) from None
        seal, parts = self._seal, []
        for part in data.reshape(-1, CIPHERTEXT):
            sealed, plain = seal.Ciphertext(), seal.Plaintext()
            inner = self._prefix + words_of(part).tobytes()
            with _file() as path:
                with open(path, "wb") as file:
                    file.write(HEADER.pack(0xA15E, 16, *self._version, PLAIN, 0, 16 + INNER) + inner)
                try:
                    sealed.load(self._context, path)
                    self._decryptor.decrypt(sealed, plain)
                except (RuntimeError, ValueError) as error:
                    raise SecurityError(f"a ciphertext does not open: {error}") from None
            slots = np.array(self._encoder.decode_complex(plain), np.complex128)
            parts.append(slots.view(np.float64))
        found: Array = np.concatenate(parts or [np.zeros(0)])[:length].astype(np.float32)
        return found

    def _encrypted(self, part: npt.NDArray[np.float64]) -> Any:
        plain, sealed = self._seal.Plaintext(), self._seal.Ciphertext()
        self._encoder.encode(part.view(np.complex128).tolist(), SCALE, plain)
        self._encryptor.encrypt_symmetric(plain, sealed)
        return sealed

    def _saved(self, sealed: Any) -> bytes:
        """A ciphertext as SEAL writes it, without its header and uncompressed."""
        with _file() as path:
            sealed.save(path)
            with open(path, "rb") as file:
                data = file.read()
        magic, size, major, minor, mode, _, whole = HEADER.unpack_from(data)
        if (magic, size, whole) != (0xA15E, 16, len(data)) or mode not in (PLAIN, ZSTD):
            raise SecurityError("this version of TenSEAL writes ciphertexts in a format that is not known")
        self._version = major, minor
        inner = data[16:]
        if mode == ZSTD:
            pa = importlib.import_module("pyarrow")  # it takes its time, and most jobs do without
            inner = pa.CompressedInputStream(pa.BufferReader(inner), "zstd").read()
        if len(inner) != INNER:
            raise SecurityError(
                f"this version of TenSEAL writes ciphertexts of {len(inner)} bytes, expected {INNER}"
            )
        return bytes(inner)


def _context(seal: Any, key: bytes = b"") -> Any:
    """SEAL's context: parameters, checked for 256-bit security. With `key` its generator is not random but seeded: for the
    secret alone, never for an encryption."""
    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(DEGREE)
    parameters.set_coeff_modulus([seal.Modulus(MODULUS)])
    if key:
        seed = b"".join(hkdf(key, b"", "xcloud/ckks-secret/v1", part) for part in range(2))
        parameters.set_random_generator(seal.Shake256PRNGFactory(list(struct.unpack("<8Q", seed))))
    context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC256)
    if not context.parameters_set():
        raise SecurityError(f"TenSEAL refuses the parameters: {context.parameters_error_message()}")
    return context


@contextmanager
def _file() -> Iterator[str]:
    """A file for SEAL, which reads and writes ciphertexts by name: in memory where the system has that."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("ciphertext")
        try:
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
        return
    with tempfile.NamedTemporaryFile() as file:
        yield file.name


# -- cost -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """MB of fp32 a second, in one thread of this machine."""

    encrypt: float
    decrypt: float


@lru_cache(maxsize=1)
def measure() -> Pace:
    """What encryption costs here: about a tenth of a second, once for each process.

    Raises:
        ConfigError, SecurityError: see `Cipher`.
    """
    cipher, values = Cipher(bytes(32)), np.zeros(4 * SLOTS, np.float32)
    turns = []
    for _ in range(3):
        began = time.perf_counter()
        data = cipher.encrypt(values)
        between = time.perf_counter()
        cipher.decrypt(data, values.size)
        turns.append((between - began, time.perf_counter() - between))
    size = values.nbytes / 1e6
    return Pace(size / min(one for one, _ in turns), size / min(two for _, two in turns))
