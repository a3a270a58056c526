"""CKKS with real TenSEAL: what is encrypted, added and opened, and what whoever lacks the key can do with it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from xcloud.codecs import Array, Bytes, Frame
from xcloud.errors import ConfigError, SecurityError
from xcloud.secure import ckks
from xcloud.secure.ckks import (
    CIPHERTEXT,
    DEGREE,
    MODULUS,
    SLOTS,
    Cipher,
    Encrypted,
    bytes_of,
    check_residues,
    encrypted_bytes,
    most_of,
    words_of,
)

KEY = bytes(range(32))
ERROR = 5e-7
"""Most that one encryption changes a value by; of n that are added, sqrt(n) as much. docs/decisions/0035 says what was measured."""


@pytest.fixture(scope="module")
def cipher() -> Cipher:
    pytest.importorskip("tenseal")
    return Cipher(KEY)


def values(seed: int, length: int, size: float = 1e-3) -> Array:
    return np.random.default_rng(seed).normal(0, size, length).astype(np.float32)


def added(parts: list[Bytes]) -> Bytes:
    total = parts[0].copy()
    for part in parts[1:]:
        Encrypted().add(total, part, Frame())
    return total


@pytest.mark.parametrize("members", [1, 2, 3, 16, 64])
@pytest.mark.parametrize("length", [1, SLOTS - 1, SLOTS, 2 * SLOTS + 5])
def test_a_sum_is_right_within_the_stated_error(cipher: Cipher, members: int, length: int) -> None:
    updates = [values(seed, length) for seed in range(members)]
    found = cipher.decrypt(added([cipher.encrypt(update) for update in updates]), length)
    exact = np.sum(np.array(updates, np.float64), axis=0)
    assert np.abs(found - exact).max() < ERROR * members**0.5
    assert found.dtype == np.float32


def test_the_error_is_a_tenth_of_that_of_sixteen_bits(cipher: Cipher) -> None:
    update = values(0, 20 * SLOTS)
    lost = cipher.decrypt(cipher.encrypt(update), update.size) - update
    assert np.sqrt(np.mean(lost**2)) / 1e-3 < 6e-4 / 8


def test_the_largest_values_that_are_allowed_add_up(cipher: Cipher) -> None:
    members = 5
    most = most_of(members)
    update = np.where(np.random.default_rng(1).random(SLOTS) < 0.5, -most, most).astype(np.float32)
    found = cipher.decrypt(added([cipher.encrypt(update)] * members), SLOTS)
    np.testing.assert_allclose(found, members * update, rtol=1e-6)


def test_one_key_gives_the_same_bits_in_another_process(cipher: Cipher) -> None:
    """Regions share a seed, and must end with the same model."""
    sent = cipher.encrypt(values(3, SLOTS))
    code = (
        "import sys, hashlib, numpy as np; from xcloud.secure.ckks import Cipher;"
        f"data = np.frombuffer(sys.stdin.buffer.read(), np.uint8); c = Cipher({KEY!r});"
        f"print(hashlib.sha256(c.decrypt(data, {SLOTS})).hexdigest())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], input=sent.tobytes(), capture_output=True, check=True)
        for _ in range(2)
    ]
    here = hashlib.sha256(cipher.decrypt(sent, SLOTS)).hexdigest()
    assert [run.stdout.decode().strip() for run in runs] == [here, here]


def test_nothing_is_encrypted_twice_alike(cipher: Cipher) -> None:
    """The generator is seeded for the secret alone: the same randomness twice would give the difference of two updates away."""
    update = values(0, SLOTS)
    one, two, other = cipher.encrypt(update), cipher.encrypt(update), Cipher(KEY).encrypt(update)
    masks = [words_of(data)[DEGREE:] for data in (one, two, other)]
    for i, mask in enumerate(masks):
        for another in masks[:i]:
            assert np.mean(mask == another) < 0.01


@pytest.mark.parametrize("key", [bytes(32), KEY[:-1] + b"\0", KEY[::-1]])
def test_another_key_opens_nothing(cipher: Cipher, key: bytes) -> None:
    update = values(0, SLOTS)
    found = Cipher(key).decrypt(cipher.encrypt(update), SLOTS)
    assert abs(np.corrcoef(found, update)[0, 1]) < 0.1
    assert np.abs(found).max() > 1


def test_who_has_the_parameters_alone_cannot_decrypt(cipher: Cipher) -> None:
    """All that is public: SEAL asks for a secret, and without one (zero) what is left is the masked polynomial."""
    seal, context = cipher._seal, ckks._context(cipher._seal)
    update = values(0, SLOTS)
    with pytest.raises((TypeError, ValueError)):
        seal.Decryptor(context, seal.SecretKey())
    data = cipher.encrypt(update)
    words = words_of(data)
    words[DEGREE:] = 0  # what whoever takes the mask for zero would decode
    found = cipher.decrypt(bytes_of(words), SLOTS)
    assert abs(np.corrcoef(found, update)[0, 1]) < 0.1
    spread = np.bincount((words_of(data) * np.uint64(16) // np.uint64(MODULUS)).astype(int), minlength=16)
    assert np.abs(spread / (2 * DEGREE) * 16 - 1).max() < 0.25  # as even as random numbers


def test_the_parameters_are_as_secure_as_they_say(cipher: Cipher) -> None:
    """SEAL holds them against its table for 256 bits, and refuses a modulus that is too long for it."""
    seal = cipher._seal
    assert seal.CoeffModulus.MaxBitCount(DEGREE, seal.SEC_LEVEL_TYPE.TC256) >= ckks.WIDTH
    assert seal.CoeffModulus.Create(DEGREE, [ckks.WIDTH])[0].value() == MODULUS


def test_residues_are_packed_without_loss() -> None:
    words = np.random.default_rng(0).integers(0, MODULUS, 2 * DEGREE, dtype=np.uint64)
    assert np.array_equal(words_of(bytes_of(words)), words)
    assert bytes_of(words).size == CIPHERTEXT


def test_residues_add_modulo_the_prime() -> None:
    numbers = np.random.default_rng(0)
    one, two = (numbers.integers(0, MODULUS, 64, dtype=np.uint64) for _ in range(2))
    one[:3], two[:3] = [MODULUS - 1, MODULUS - 1, 0], [MODULUS - 1, 1, 0]
    total = bytes_of(one)
    Encrypted().add(total, bytes_of(two), Frame())
    expected = [(int(a) + int(b)) % MODULUS for a, b in zip(one, two, strict=True)]
    assert words_of(total).tolist() == expected


def test_what_cannot_be_ciphertexts_is_refused() -> None:
    good = np.zeros(encrypted_bytes(5), np.uint8)
    check_residues(good, 5)
    with pytest.raises(ValueError, match="5 values as CKKS ciphertexts take 40960 bytes, got 40959"):
        check_residues(good[:-1], 5)
    with pytest.raises(ValueError, match=f"residues of {MODULUS} or more"):
        check_residues(np.full_like(good, 255), 5)
    edge = words_of(good)
    edge[-1] = MODULUS
    with pytest.raises(ValueError, match="residues of"):
        check_residues(bytes_of(edge), 5)
    edge[-1] = MODULUS - 1
    check_residues(bytes_of(edge), 5)


def test_bytes_that_are_no_ciphertexts_end_in_a_named_error(cipher: Cipher) -> None:
    sent = cipher.encrypt(values(0, SLOTS))
    for bad in (sent[:-1], sent[:0], np.full_like(sent, 255), np.concatenate([sent, sent])):
        with pytest.raises(SecurityError, match=r"CKKS ciphertexts|residues of"):
            cipher.decrypt(bad, SLOTS)


def test_any_residues_decrypt_to_something(cipher: Cipher) -> None:
    """A sum that was altered, if it ever came past the signatures, is noise and no crash."""
    numbers = np.random.default_rng(0)
    for _ in range(20):
        words = numbers.integers(0, MODULUS, 2 * DEGREE, dtype=np.uint64)
        assert np.isfinite(cipher.decrypt(bytes_of(words), SLOTS)).all()
    assert np.isfinite(cipher.decrypt(np.zeros(CIPHERTEXT, np.uint8), SLOTS)).all()


def test_the_cost_is_measured(cipher: Cipher) -> None:
    pace = ckks.measure()
    assert 0.1 < pace.encrypt < 1000
    assert 0.1 < pace.decrypt < 1000
    assert ckks.measure() is pace


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenseal.sealapi", None)
    with pytest.raises(ConfigError, match=r"pip install 'xcloud\[he\]'"):
        Cipher(bytes(31) + b"\1")


def test_adding_needs_neither_key_nor_package() -> None:
    """The aggregator's part, in a process that cannot import TenSEAL."""
    code = (
        "import sys, json; sys.modules['tenseal'] = None\n"
        "import numpy as np; from xcloud.codecs import Frame; from xcloud.secure.ckks import Encrypted, CIPHERTEXT\n"
        "one = np.zeros(CIPHERTEXT, np.uint8); one[0] = 200; two = one.copy()\n"
        "Encrypted().add(one, two, Frame()); print(json.dumps(one[:3].tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [144, 1, 0]
