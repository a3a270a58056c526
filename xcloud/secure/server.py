"""The aggregator's side of secure aggregation: it passes messages on, adds what is masked, and opens the sum.

It is not trusted with more than that. What it checks here (signatures, lengths, who is in which set) it checks so that
one region's bad message costs that region's update and not the round; what protects the regions, they check themselves
(`secure.member`). It learns the sum, who took part, sizes and timing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from xcloud.codecs import ring_add
from xcloud.errors import SecurityError
from xcloud.secure.masks import LANE_CHUNK, LANES, Masker
from xcloud.secure.member import (
    ADVERT,
    AGREE,
    CONFIRM,
    UPLOAD,
    Verifier,
    commitment,
    first_hash,
    pair_key,
    self_key,
)
from xcloud.secure.messages import (
    Advert,
    Proof,
    Quorum,
    Result,
    SealedShares,
    SignedPlan,
    Survivors,
    SyncPlan,
    Unmasking,
    Upload,
)
from xcloud.secure.primitives import digest, exchange, exchange_key, public_of
from xcloud.secure.shamir import Opener

__all__ = ["Server"]

M = TypeVar("M", Advert, SealedShares, Upload, Unmasking)


class Server:
    """One sync; the stages are called in order, each once. Messages come by the name of who sent them.

    Who sent none, or a bad one, is left out from then on: `faults` says why.

    Args:
        signed: the plan.
        roster: whose signatures count.
    """

    def __init__(self, signed: SignedPlan, roster: Verifier) -> None:
        self.signed, self.plan, self.hash = signed, SyncPlan.from_wire(signed.plan, "driver"), signed.hash
        self.needed = max(self.plan.threshold, self.plan.minimum)
        self.faults: dict[str, str] = {}
        self._roster = roster
        self._probe = exchange_key(self.hash)
        self._adverts: dict[str, Advert] = {}
        self._second: list[str] = []
        self._context: tuple[bytes, bytes, bytes] = (self.hash, b"", b"")
        self._uploads: dict[str, Upload] = {}
        self.survivors = Survivors(names=(), roots=())

    def adverts(self, received: Mapping[str, Advert]) -> list[Advert]:
        """U1: what all of it are to be sent.

        Raises:
            SecurityError: too few are good.
        """
        seen: set[bytes] = set()

        def check(name: str, advert: Advert) -> None:
            self._roster.verify(name, advert.signature, ADVERT, self.hash, *advert.fields())
            if advert.channel == advert.mask or {advert.channel, advert.mask} & seen:
                raise SecurityError(f"{name!r} uses a key that was used before")
            for key in (advert.channel, advert.mask):
                exchange(self._probe, key, name)  # one of low order would make all others refuse, and not it
            seen.update((advert.channel, advert.mask))

        self._adverts = self._good(received, check, "adverts")
        return list(self._adverts.values())

    def shares(self, received: Mapping[str, SealedShares]) -> list[SealedShares]:
        """U2: what all of it are to be sent; each needs no more than what is sealed for it (`for_one`).

        Raises:
            SecurityError: too few are good.
        """

        def check(name: str, message: SealedShares) -> None:
            if set(message.sealed) != set(self._adverts) - {name}:
                raise SecurityError(f"{name!r} did not seal shares for each of the others")

        good = self._good(received, check, "shares", self._adverts)
        self._second = sorted(good)
        first = first_hash(self.hash, list(self._adverts.values()))
        second = digest("xcloud/u2/v1", self.hash, first, self._second)
        self._context = self.hash, first, second
        return list(good.values())

    @staticmethod
    def for_one(name: str, delivered: Iterable[SealedShares]) -> list[SealedShares]:
        """What was sealed for one region, and nothing for others."""
        return [
            message.model_copy(
                update={"sealed": {name: message.sealed[name]} if name in message.sealed else {}}
            )
            for message in delivered
        ]

    def uploads(self, received: Mapping[str, Upload], chunks: int) -> Survivors:
        """U3: whose masked updates are to be added.

        Raises:
            SecurityError: too few are good.
        """

        def check(name: str, upload: Upload) -> None:
            if len(upload.hashes) != chunks:
                raise SecurityError(f"{name!r} uploaded {len(upload.hashes)} chunks, expected {chunks}")
            self._roster.verify(name, upload.signature, UPLOAD, *self._context, name, upload.root)

        good = self._good(received, check, "uploads", self._second)
        self._uploads = dict(sorted(good.items()))
        self.survivors = Survivors(
            names=tuple(self._uploads), roots=tuple(upload.root for upload in self._uploads.values())
        )
        return self.survivors

    def proof(self, result: Result, quorum: Quorum, alone: bool) -> Proof:
        """The sum as regions take it; `alone`: no other sync sums other regions of the round."""
        if alone:
            return Proof(result=result, quorum=quorum)
        _, first, second = self._context
        return Proof(result=result, quorum=quorum, plan=self.signed, first=first, second=second)

    def check_chunk(self, name: str, index: int, found: bytes) -> None:
        """Refuse a chunk whose SHA-256 is not what its region signed; `index` counts from the first chunk of the plan.

        Raises:
            SecurityError: it was altered on the way.
        """
        if self._uploads[name].hashes[index] != found:
            raise SecurityError(f"chunk {index} of {name!r} is not what it signed")

    def agreed(self, signatures: Mapping[str, bytes]) -> Quorum:
        """The survivors' signatures on the survivors.

        Raises:
            SecurityError: too few are good.
        """
        return self._signed(signatures, AGREE, *self._context, self.survivors.packed())

    def opening(self, received: Mapping[str, Unmasking]) -> Masker:
        """What, applied to the sum, takes off all that does not cancel.

        Raises:
            SecurityError: too few gave their shares, or these do not fit together.
        """
        alive = list(self.survivors.names)
        dropped = [name for name in self._second if name not in self._uploads]

        def check(name: str, message: Unmasking) -> None:
            if set(message.survivors) != set(alive) or set(message.dropped) != set(dropped):
                raise SecurityError(f"{name!r} gave shares of others than were asked for")

        good = self._good(received, check, "shares that open the sum", alive, self.plan.threshold)
        points = {name: self.plan.cohort.index(name) + 1 for name in good}
        added: list[bytes] = []
        taken: list[bytes] = []
        opener = _Openings(points, self.plan.threshold)
        for name in alive:
            shares = {points[peer]: message.survivors[name] for peer, message in good.items()}
            seed = opener.open(shares, name, self._fits_self)
            taken.append(self_key(self.hash, name, seed))
        for name in dropped:
            shares = {points[peer]: message.dropped[name] for peer, message in good.items()}
            seed = opener.open(shares, name, self._fits_pair)
            for peer in alive:  # who is first in name order has added their stream
                key = pair_key(exchange_key(seed), self._adverts[peer].mask, self._context, name, peer)
                (taken if peer < name else added).append(key)
        return Masker(tuple(added), tuple(taken))

    def lanes(self, opening: Masker) -> tuple[int, int, int]:
        """The totals of the lanes: weight and two tags."""
        total = np.zeros(24, np.uint8)
        for upload in self._uploads.values():
            ring_add(total, np.frombuffer(upload.lanes, np.uint8), LANES.width)
        opening.apply(total, LANE_CHUNK, LANES)
        weight, one, two = (int(value) for value in total.view("<u8"))
        return weight, one, two

    def result(self, hashes: Sequence[bytes], opening: Masker) -> Result:
        """What the sum is, from the SHA-256 of its chunks."""
        weight, *tags = self.lanes(opening)
        return Result(
            names=self.survivors.names, hashes=tuple(hashes), weight=weight, tags=(tags[0], tags[1])
        )

    def confirmed(self, result: Result, signatures: Mapping[str, bytes]) -> Quorum:
        """The survivors' signatures on the sum.

        Raises:
            SecurityError: too few are good.
        """
        return self._signed(signatures, CONFIRM, *self._context, result.packed())

    def _fits_self(self, name: str, seed: bytes) -> bool:
        return commitment("self", self.hash, name, seed) == self._adverts[name].self_commitment

    def _fits_pair(self, name: str, seed: bytes) -> bool:
        return public_of(exchange_key(seed)) == self._adverts[name].mask

    def _signed(self, signatures: Mapping[str, bytes], label: str, *fields: bytes) -> Quorum:
        good = {}
        for name, signature in signatures.items():
            try:
                self._admit(name, name, self.survivors.names)
                self._roster.verify(name, signature, label, *fields)
            except SecurityError as error:
                self.faults[name] = str(error)
            else:
                good[name] = signature
        if len(good) < self.plan.threshold:
            raise SecurityError(self._short(len(good), self.plan.threshold, f"signatures on {label}"))
        return Quorum(signatures=good)

    def _good(
        self,
        received: Mapping[str, M],
        check: Callable[[str, M], None],
        what: str,
        among: Iterable[str] | None = None,
        needed: int | None = None,
    ) -> dict[str, M]:
        good, allowed = {}, self.plan.cohort if among is None else list(among)
        for name, message in received.items():
            try:
                self._admit(name, message.name, allowed)
                check(name, message)
            except SecurityError as error:
                self.faults[name] = str(error)
            else:
                good[name] = message
        needed = self.needed if needed is None else needed
        if len(good) < needed:
            raise SecurityError(self._short(len(good), needed, what))
        return good

    def _admit(self, sender: str, name: str, allowed: Collection[str]) -> None:
        if sender != name:
            raise SecurityError(f"{sender!r} sent a message in the name of {name!r}")
        if sender not in allowed:
            raise SecurityError(f"{sender!r} is not among {sorted(allowed)}")

    def _short(self, found: int, needed: int, what: str) -> str:
        because = "".join(f"; {reason}" for reason in self.faults.values())
        return f"round {self.plan.round}: {found} good {what}, expected at least {needed}{because}"


class _Openings:
    """Opens secrets of which one member's shares may be wrong, as long as there is one share to spare."""

    def __init__(self, points: Mapping[str, int], threshold: int) -> None:
        self._points, self._threshold = sorted(points.values()), threshold
        self._whole = Opener(self._points, threshold)

    def open(self, shares: Mapping[int, bytes], whose: str, fits: Callable[[str, bytes], bool]) -> bytes:
        """The secret that `fits`.

        Raises:
            SecurityError: no choice of shares that leaves one out gives it.
        """
        openers = [self._whole]
        if len(self._points) > self._threshold:
            openers += [
                Opener([p for p in self._points if p != left_out], self._threshold)
                for left_out in self._points[: self._threshold]
            ]
        for opener in openers:
            try:
                secret = opener.open(shares, whose)
            except SecurityError:
                continue
            if fits(whose, secret):
                return secret
        raise SecurityError(f"{whose!r}: the shares of its secret give another than it had committed to")
