"""Shamir's secret sharing: any `threshold` shares give the secret back, fewer say nothing about it.

A. Shamir, How to share a secret, CACM 22 (1979). Over the integers modulo the Mersenne prime 2^521 - 1, which
holds a 32-byte secret with room to spare. Lagrange's weights depend on who answers alone, so they are computed once for all
secrets of a sync (`Opener`).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from xcloud.errors import SecurityError

__all__ = ["PRIME", "SHARE_BYTES", "Opener", "split", "weights_at_zero"]

PRIME = (1 << 521) - 1
SHARE_BYTES = 66
SECRET_BYTES = 32


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares of a 32-byte secret for the points 1 to `count`, 66 bytes each.

    Raises:
        ValueError: the secret is not of 32 bytes, or the threshold is not from 1 to `count`.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret of {len(secret)} bytes, expected {SECRET_BYTES}")
    if not 1 <= threshold <= count:
        raise ValueError(f"threshold {threshold} of {count} shares, expected 1 to {count}")
    rest = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    polynomial = [int.from_bytes(secret, "big"), *rest]
    return [value_at(polynomial, x).to_bytes(SHARE_BYTES, "big") for x in range(1, count + 1)]


def value_at(polynomial: Sequence[int], x: int, prime: int = PRIME) -> int:
    """The value of a polynomial, lowest coefficient first."""
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % prime
    return value


def weights_at_zero(points: Sequence[int], prime: int = PRIME) -> dict[int, int]:
    """Lagrange's weights: what the values at `points` (distinct, not 0) count in the value at 0."""
    weights = {}
    for mine in points:
        above, below = 1, 1
        for other in points:
            if other != mine:
                above = above * other % prime
                below = below * (other - mine) % prime
        weights[mine] = above * pow(below, -1, prime) % prime
    return weights


class Opener:
    """Puts secrets together from the shares of the same members.

    Args:
        points: the members' points, at least `threshold`; the first `threshold` of them are used.
        threshold: that the secrets were split with.
    """

    def __init__(self, points: Sequence[int], threshold: int) -> None:
        if len(points) < threshold:
            raise SecurityError(f"{len(points)} members gave their shares, expected at least {threshold}")
        self._weights = weights_at_zero(sorted(points)[:threshold])

    def open(self, shares: Mapping[int, bytes], whose: str) -> bytes:
        """The secret behind shares, by point.

        Raises:
            SecurityError: a share is missing or malformed, or the shares are of no 32-byte secret.
        """
        total = 0
        for point, weight in self._weights.items():
            share = shares.get(point, b"")
            if len(share) != SHARE_BYTES:
                raise SecurityError(
                    f"{whose}: a share of its secret has {len(share)} bytes, expected {SHARE_BYTES}"
                )
            total += weight * int.from_bytes(share, "big")
        total %= PRIME
        if total >> (8 * SECRET_BYTES):
            raise SecurityError(
                f"{whose}: the shares of its secret do not fit together; one of them is wrong"
            )
        return total.to_bytes(SECRET_BYTES, "big")
