"""Masks on every ring: they cancel, whoever applies them in whatever pieces, and leave nothing behind."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from xcloud.codecs import Ring, ring_add
from xcloud.secure import masks
from xcloud.secure.masks import Masker
from xcloud.secure.primitives import Keystream

KEYS = tuple(bytes([i]) * 32 for i in range(5))


def test_known_answers_of_the_stream() -> None:
    """AES-256-CTR of a zero text: the counter block is chunk and block, big-endian (SP 800-38A)."""
    out = np.empty(40, np.uint8)
    Keystream(bytes(32)).fill(0, out)
    assert out[:16].tobytes().hex() == "dc95c078a2408989ad48a21492842087"  # AES-256 of the zero block
    assert out.tobytes() == masked_zeros(bytes(32), 0, 40)
    Keystream(bytes(32)).fill(1, out)
    assert out[:16].tobytes().hex() != "dc95c078a2408989ad48a21492842087"


def masked_zeros(key: bytes, chunk: int, size: int) -> bytes:
    blocks = b"".join(chunk.to_bytes(8, "big") + i.to_bytes(8, "big") for i in range(-(-size // 16)))
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(blocks)[:size]


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(2, 16),
    blocks=st.integers(0, 3),
    rest=st.integers(0, 200),
    piece=st.sampled_from([64, 512, 1 << 17]),
)
def test_masks_come_off_again(width: int, blocks: int, rest: int, piece: int) -> None:
    size = 4 * blocks + 64 * width * blocks + rest
    ring = Ring(size, front=4 * blocks, width=width)
    plain = np.random.default_rng(width).integers(0, 256, size, np.uint8)
    data = plain.copy()
    masker = Masker(KEYS[:2], KEYS[2:])
    before, masks.PIECE = masks.PIECE, piece
    try:
        masker.apply(data, 7, ring)
    finally:
        masks.PIECE = before
    if plain.size > 16:
        assert not np.array_equal(data, plain)
    other = plain.copy()
    masker.apply(other, 7, ring)
    assert np.array_equal(data, other)  # pieces do not matter
    masker.inverse().apply(data, 7, ring)
    assert np.array_equal(data, plain)


@pytest.mark.parametrize("width", [2, 3, 5, 8, 11, 16, 64])
def test_pair_masks_cancel_in_the_sum(width: int) -> None:
    ring = Ring(8 + 8 * width * 3, front=8, width=width)
    numbers = np.random.default_rng(width)
    plain = [numbers.integers(0, 256, 8 + 8 * width * 3, np.uint8) for _ in range(3)]
    pairs = {(0, 1): KEYS[0], (0, 2): KEYS[1], (1, 2): KEYS[2]}
    total, expected = np.zeros_like(plain[0]), np.zeros_like(plain[0])
    for mine, data in enumerate(plain):
        masked = data.copy()
        added = tuple(key for (low, _), key in pairs.items() if low == mine)
        taken = tuple(key for (_, high), key in pairs.items() if high == mine)
        Masker(added, taken).apply(masked, 3, ring)
        for sum_, one in ((total, masked), (expected, data)):
            ring_add(sum_[:8], one[:8], 32)
            ring_add(sum_[8:], one[8:], width)
    assert np.array_equal(total, expected)


def test_every_chunk_has_a_stream_of_its_own() -> None:
    one, two, ring = np.zeros(4096, np.uint8), np.zeros(4096, np.uint8), Ring(4096, 0, 8)
    Masker(KEYS[:1]).apply(one, 0, ring)
    Masker(KEYS[:1]).apply(two, 1, ring)
    assert np.mean(one == two) < 0.03
