"""The building blocks: published vectors, known answers, and what each face refuses."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import packed_fields, quick
from xcloud.errors import SecurityError
from xcloud.secure.primitives import (
    PIECE,
    TAG_BYTES,
    Keystream,
    digest,
    exchange,
    exchange_key,
    hkdf,
    open_sealed,
    packed,
    public_of,
    seal,
    sign,
    verify,
)

h = bytes.fromhex
P = 2**255 - 19

# RFC 7748 5.2: scalar, u-coordinate, output
X25519_VECTORS = [
    (
        "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
        "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
        "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
    ),
    (
        "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
        "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
        "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
    ),
]

# RFC 8032 7.1: secret key, public key, message, signature (tests 1, 2, 3 and SHA(abc))
ED25519_VECTORS = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        (
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
            "d25bf5f0595bbe24655141438e7a100b"
        ),
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        (
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
            "387b2eaeb4302aeeb00d291612bb0c00"
        ),
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        (
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
            "4a7c15e9716ed28dc027beceea1ec40a"
        ),
    ),
    (
        "833fe62409237b9d62ec77587520911e9a759cec1d19755b7da901b96dca3d42",
        "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        (
            "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a2192992a274fc1a836ba3c23a3feebbd"
            "454d4423643ce80e2a9ac94fa54ca49f"
        ),
        (
            "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b58909351fc9ac90b3ecfdfbc7c66431e030"
            "3dca179c138ac17ad9bef1177331a704"
        ),
    ),
]

# RFC 8439 2.4.2 and 2.8.2: the same text under other keys and nonces
SUNSCREEN = (
    b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
    b"sunscreen would be it."
)
CHACHA20 = h(
    "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0bf91b65c5524733ab8f593dabcd62b357"
    "1639d624e65152ab8f530c359f0861d807ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736"
    "5af90bbf74a35be6b40b8eedf2785e42874d"
)
AEAD_KEY = bytes(range(0x80, 0xA0))
AEAD_NONCE = h("070000004041424344454647")
AEAD_BOUND = h("50515253c0c1c2c3c4c5c6c7")
AEAD_SEALED = h(
    "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d63dbea45e8ca9671282fafb69da92728b"
    "1a71de0a9e060b2905d6a5b67ecd3b3692ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585808b4831d7bc"
    "3ff4def08e4b7a9de576d26586cec64b61161ae10b594f09e26a7e902ecbd0600691"
)

# SP 800-38A F.5.5, CTR-AES256.Encrypt
CTR_KEY = h("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
CTR_COUNTER = bytes(range(0xF0, 0x100))
CTR_PLAIN = h(
    "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
    "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
)
CTR_SEALED = h(
    "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
    "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
)

# Every encoding of a point of small order on Curve25519, bit 255 aside, which is ignored
# (cr.yp.to/ecdh.html#validate): 0, 1, two points of order 8, p - 1, p, p + 1.
ORDER_8 = [
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
]
LOW_ORDER = [
    (u | sign_bit << 255).to_bytes(32, "little")
    for u in (0, 1, *ORDER_8, P - 1, P, P + 1)
    for sign_bit in (0, 1)
]


@pytest.mark.parametrize(("scalar", "point", "expected"), X25519_VECTORS)
def test_x25519_rfc_7748(scalar: str, point: str, expected: str) -> None:
    assert exchange(X25519PrivateKey.from_private_bytes(h(scalar)), h(point), "peer") == h(expected)


def test_x25519_rfc_7748_iterated() -> None:
    scalar = point = h("09" + "00" * 31)
    for count in range(1, 1001):
        scalar, point = exchange(X25519PrivateKey.from_private_bytes(scalar), point, "peer"), scalar
        if count == 1:
            assert scalar == h("422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079")
    assert scalar == h("684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51")


def test_hkdf_rfc_5869_a1() -> None:
    derived = HKDF(hashes.SHA256(), 42, bytes(range(13)), h("f0f1f2f3f4f5f6f7f8f9")).derive(b"\x0b" * 22)
    assert derived == h(
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )


@given(st.binary(min_size=1, max_size=40), st.binary(max_size=40), packed_fields())
@quick
def test_hkdf_is_that_of_rfc_5869_over_the_packed_purpose(key: bytes, salt: bytes, fields: Any) -> None:
    """Extract, then one block of expand, written out with HMAC."""
    extracted = hmac.digest(salt or bytes(32), key, "sha256")
    expected = hmac.digest(extracted, packed("label", *fields) + b"\x01", "sha256")
    assert hkdf(key, salt, "label", *fields) == expected


def test_chacha20_rfc_8439_2_4_2() -> None:
    nonce = (1).to_bytes(4, "little") + h("000000000000004a00000000")
    stream = Cipher(algorithms.ChaCha20(bytes(range(32)), nonce), mode=None).encryptor()
    assert stream.update(SUNSCREEN) == CHACHA20


def test_chacha20_poly1305_rfc_8439_2_8_2() -> None:
    nonce = int.from_bytes(AEAD_NONCE, "big")
    assert seal(AEAD_KEY, SUNSCREEN, AEAD_BOUND, nonce) == AEAD_SEALED
    assert open_sealed(AEAD_KEY, AEAD_SEALED, AEAD_BOUND, "peer", nonce) == SUNSCREEN


@pytest.mark.parametrize(("secret", "public", "message", "signature"), ED25519_VECTORS)
def test_ed25519_rfc_8032(secret: str, public: str, message: str, signature: str) -> None:
    key = Ed25519PrivateKey.from_private_bytes(h(secret))
    assert public_of(key) == h(public)
    assert key.sign(h(message)) == h(signature)
    key.public_key().verify(h(signature), h(message))
    assert sign(key, "label", h(message)) == key.sign(packed("label", h(message)))


def test_aes_256_ctr_sp_800_38a_f_5_5() -> None:
    stream = Cipher(algorithms.AES(CTR_KEY), modes.CTR(CTR_COUNTER)).encryptor()
    assert stream.update(CTR_PLAIN) == CTR_SEALED


def test_the_keystream_known_answers() -> None:
    """The key of F.5.5; block 0 of chunks 0 and 1, and of the chunk that F.5.5's counter begins with."""
    out = np.empty(16, np.uint8)
    found = {}
    for chunk in (0, 1, int.from_bytes(CTR_COUNTER[:8], "big")):
        Keystream(CTR_KEY).fill(chunk, out)
        found[chunk] = out.tobytes().hex()
    assert found == {
        0: "e568f68194cf76d6174d4cc04310a854",
        1: "579be1a0d892238805feb810a4a10aaa",
        0xF0F1F2F3F4F5F6F7: "b4b0374fbf3694c871e1d290c5ba13a7",
    }


@given(chunk=st.integers(0, 2**64 - 1), blocks=st.integers(0, 4), odd=st.integers(0, 15))
@quick
def test_the_keystream_is_aes_of_chunk_and_block(chunk: int, blocks: int, odd: int) -> None:
    aes = Cipher(algorithms.AES(CTR_KEY), modes.ECB()).encryptor()  # the block cipher itself, as a reference
    counters = b"".join(chunk.to_bytes(8, "big") + block.to_bytes(8, "big") for block in range(blocks + 1))
    out = np.empty(blocks * 16 + odd, np.uint8)
    Keystream(CTR_KEY).fill(chunk, out)
    assert out.tobytes() == aes.update(counters)[: out.size]


def test_the_keystream_goes_on_over_pieces() -> None:
    """Longer than what is made at a time, and cut elsewhere: one stream."""
    whole, cut = np.empty(2 * PIECE + 33, np.uint8), np.empty(2 * PIECE + 33, np.uint8)
    keystream = Keystream(CTR_KEY)
    keystream.fill(7, whole)
    piece = keystream.of(7)
    for start, end in ((0, 5), (5, 5), (5, PIECE + 5), (PIECE + 5, 2 * PIECE), (2 * PIECE, cut.size)):
        piece(cut[start:end])
    assert np.array_equal(whole, cut)
    assert np.count_nonzero(whole[-4096:]) > 4000


def test_a_piece_that_is_too_long_is_never_filled_in_part() -> None:
    with pytest.raises(AssertionError):
        Keystream(CTR_KEY).of(0)(np.zeros(PIECE + 1, np.uint8))


def test_packed_known_answers() -> None:
    assert packed() == b""
    assert packed(b"ab") == b"b" + h("0000000000000002") + b"ab"
    assert packed("é") == b"s" + h("0000000000000002") + h("c3a9")
    assert packed(258) == b"i" + h("0000000000000008") + h("0000000000000102")
    assert packed([1], "") == (
        b"l" + h("0000000000000011") + b"i" + h("0000000000000008") + h("0000000000000001") + b"s" + bytes(8)
    )


@given(packed_fields())
@quick
def test_packed_can_be_read_back(fields: list[Any]) -> None:
    """An encoding that can be read back is injective."""
    assert _unpacked(packed(*fields)) == fields


@given(packed_fields(), packed_fields())
@quick
def test_packed_of_different_fields_differs(one: list[Any], other: list[Any]) -> None:
    assert (packed(*one) == packed(*other)) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c"), ("a", "bc")),
        (("1",), (1,)),
        ((b"a",), ("a",)),
        (((1, 2), 3), (1, (2, 3))),
        (((),), ()),
        ((b"", b""), (b"",)),
    ],
)
def test_packed_keeps_apart_what_joins_would_not(one: Any, other: Any) -> None:
    assert packed(*one) != packed(*other)
    assert digest("label", *one) != digest("label", *other)


@pytest.mark.parametrize("number", [-1, 2**64])
def test_packed_refuses_what_does_not_fit(number: int) -> None:
    with pytest.raises(OverflowError):
        packed(number)


def test_digest_known_answer() -> None:
    assert digest("l", 1) == hashlib.sha256(packed("l", 1)).digest()
    assert digest("l", 1) != digest("l/1")


def test_a_key_from_a_seed_is_that_seeds_alone() -> None:
    assert public_of(exchange_key(bytes(32))) == public_of(exchange_key(bytes(32)))
    assert public_of(exchange_key(bytes(32))) != public_of(exchange_key(b"\x01" + bytes(31)))
    assert exchange_key(b"s").private_bytes_raw() == digest("xcloud/x25519/v1", b"s")


def test_both_ends_agree() -> None:
    one, other = exchange_key(b"1"), exchange_key(b"2")
    assert exchange(one, public_of(other), "b") == exchange(other, public_of(one), "a")


@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda point: point.hex()[-4:] + point.hex()[:4])
def test_points_of_low_order_are_refused(point: bytes) -> None:
    with pytest.raises(SecurityError, match=r"us-east-1: .*low order"):
        exchange(exchange_key(b"own"), point, "us-east-1")


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(SecurityError, match="us-east-1"):
        exchange(exchange_key(b"own"), bytes(length), "us-east-1")


SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIGNATURE = sign(SIGNER, "xcloud/test/v1", "job", 7, b"content")


@pytest.mark.parametrize(
    ("label", "fields"),
    [
        ("xcloud/test/v2", ("job", 7, b"content")),
        ("xcloud/test/v1", ("job", 8, b"content")),
        ("xcloud/test/v1", ("job", 7)),
        ("xcloud/test/v1", (b"job", 7, b"content")),
    ],
)
def test_a_signature_for_something_else_is_refused(label: str, fields: Sequence[Any]) -> None:
    verify(public_of(SIGNER), SIGNATURE, "eu", "xcloud/test/v1", "job", 7, b"content")
    with pytest.raises(SecurityError, match=f"eu: .*{label}"):
        verify(public_of(SIGNER), SIGNATURE, "eu", label, *fields)


@pytest.mark.parametrize(
    "public", [public_of(Ed25519PrivateKey.from_private_bytes(bytes(32))), b"", bytes(31)]
)
def test_a_signature_by_another_key_is_refused(public: bytes) -> None:
    with pytest.raises(SecurityError, match="eu: "):
        verify(public, SIGNATURE, "eu", "xcloud/test/v1", "job", 7, b"content")


@given(place=st.integers(0, 64 * 8 - 1))
@quick
def test_no_bit_of_a_signature_may_change(place: int) -> None:
    with pytest.raises(SecurityError, match="eu: "):
        verify(public_of(SIGNER), _flipped(SIGNATURE, place), "eu", "xcloud/test/v1", "job", 7, b"content")


@given(
    text=st.binary(max_size=80), bound=st.binary(max_size=20), nonce=st.integers(0, 2**96 - 1), data=st.data()
)
@quick
def test_what_is_sealed_opens_for_the_same_purpose_only(
    text: bytes, bound: bytes, nonce: int, data: Any
) -> None:
    key = bytes(range(32))
    sealed = seal(key, text, bound, nonce)
    assert len(sealed) == len(text) + TAG_BYTES
    assert open_sealed(key, sealed, bound, "eu", nonce) == text
    altered = _flipped(sealed, data.draw(st.integers(0, 8 * len(sealed) - 1)))
    cut = sealed[: data.draw(st.integers(0, len(sealed) - 1))]
    for wrong in (
        (key, altered, bound, nonce),
        (key, cut, bound, nonce),
        (bytes(32), sealed, bound, nonce),
        (key, sealed, bound + b"x", nonce),
        (key, sealed, bound, nonce ^ 1),
    ):
        with pytest.raises(SecurityError, match="eu: a sealed message does not open"):
            open_sealed(*wrong[:3], "eu", wrong[3])


def _flipped(data: bytes, bit: int) -> bytes:
    out = bytearray(data)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def _unpacked(data: bytes) -> list[Any]:
    fields: list[Any] = []
    while data:
        kind, length = data[:1], int.from_bytes(data[1:9], "big")
        body, data = data[9 : 9 + length], data[9 + length :]
        assert len(body) == length
        if kind == b"l":
            fields.append(_unpacked(body))
        else:
            fields.append({b"b": bytes, b"s": bytes.decode, b"i": _integer}[kind](body))
    return fields


def _integer(body: bytes) -> int:
    assert len(body) == 8
    return int.from_bytes(body, "big")
