"""Secret sharing against a published vector, and over all choices of shares."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xcloud.errors import SecurityError
from xcloud.secure.shamir import PRIME, SHARE_BYTES, Opener, split, value_at, weights_at_zero


def test_shares_and_interpolation_are_those_of_rfc_9591() -> None:
    """RFC 9591, E.4: FROST(P-256), trusted dealer, 2 of 3; the field is the order of P-256."""
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    secret = 0x8BA9BBA2E0FD8C4767154D35A0B7562244A4AAF6F36C8FB8735FA48B301BD8DE
    slope = 0x80F25E6C0709353E46BFBE882A11BDBB1F8097E46340EB8673B7E14556E6C3A4
    shares = [value_at([secret, slope], x, order) for x in (1, 2, 3)]
    assert [f"{share:064x}" for share in shares] == [
        "0c9c1a0fe806c184add50bbdcac913dda73e482daf95dcb9f35dbb0d8a9f7731",
        "8d8e787bef0ff6c2f494ca45f4dad198c6bee01212d6c84067159c52e1863ad5",
        "0e80d6e8f6192c003b5488ce1eec8f5429587d48cf001541e713b2d53c09d928",
    ]
    weights = weights_at_zero([1, 3], order)
    assert (weights[1] * shares[0] + weights[3] * shares[2]) % order == secret


@given(st.binary(min_size=32, max_size=32), st.integers(1, 6), st.integers(0, 3))
def test_any_threshold_of_shares_opens_and_fewer_do_not(secret: bytes, threshold: int, more: int) -> None:
    count = threshold + more
    shares = dict(enumerate(split(secret, threshold, count), start=1))
    assert all(len(share) == SHARE_BYTES for share in shares.values())
    for chosen in itertools.islice(itertools.combinations(shares, threshold), 10):
        assert Opener(chosen, threshold).open({p: shares[p] for p in chosen}, "r0") == secret
    with pytest.raises(SecurityError, match=f"expected at least {threshold}"):
        Opener(list(shares)[: threshold - 1], threshold)


def test_fewer_shares_fit_every_secret() -> None:
    """With t - 1 shares each secret is as good as another: a polynomial of the right degree goes through both."""
    shares = split(bytes(32), 3, 5)
    for guess in (0, 1, 2**255):
        points = {0: guess, 1: int.from_bytes(shares[0], "big"), 2: int.from_bytes(shares[1], "big")}
        assert interpolate(points, 0) == guess
        assert interpolate(points, 1) == points[1]


def interpolate(points: dict[int, int], x: int) -> int:
    total = 0
    for i, y in points.items():
        above, below = 1, 1
        for j in points:
            if j != i:
                above, below = above * (x - j) % PRIME, below * (i - j) % PRIME
        total += y * above * pow(below, -1, PRIME)
    return total % PRIME


def test_malformed_shares_are_named() -> None:
    shares = dict(enumerate(split(bytes(32), 2, 3), start=1))
    opener = Opener([1, 2], 2)
    with pytest.raises(SecurityError, match="r7: a share of its secret has 0 bytes, expected 66"):
        opener.open({1: shares[1]}, "r7")
    with pytest.raises(SecurityError, match="r7: the shares of its secret do not fit together"):
        opener.open({1: shares[1], 2: bytes([shares[2][0] ^ 1]) + shares[2][1:]}, "r7")


@pytest.mark.parametrize(
    ("secret", "threshold"), [(bytes(31), 2), (bytes(33), 2), (bytes(32), 0), (bytes(32), 4)]
)
def test_a_secret_that_cannot_be_split_is_refused(secret: bytes, threshold: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        split(secret, threshold, 3)
