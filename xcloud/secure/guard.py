"""A region's door: what it is asked in the protocol and answers, stage by stage, as bytes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from xcloud.errors import SecurityError, TamperError
from xcloud.secure.masks import Masker
from xcloud.secure.member import Member, Sync
from xcloud.secure.messages import (
    Adverts,
    Delivered,
    Opening,
    Proof,
    Result,
    SignedPlan,
    Survivors,
    SyncPlan,
)
from xcloud.secure.tags import Sealed, add_tags

__all__ = ["KEPT", "SCALE", "Guard"]

SCALE = 1 << 20
"""A share of the weight, from 0 to 1, in the lane of integers."""
KEPT = 4
"""Rounds whose keys are kept: with overlap one is merged while the next trains."""


class Guard:
    """The syncs of one region that are under way, by round.

    Args:
        member: of the protocol.
        shares: of the weight, of every region: public, since the job decides them. The region's own goes into the masked lane.
        least: regions that must have endorsed a model before this one goes on from it.
    """

    def __init__(self, member: Member, shares: Mapping[str, float], least: int = 1) -> None:
        self._member, self._least = member, least
        self._weights = {region: round(share * SCALE) for region, share in shares.items()}
        self._name = member.identity.name
        self._syncs: dict[int, Sync] = {}
        self._maskers: dict[int, Masker] = {}
        self._unused: set[int] = set()
        # A region is asked in several threads, and no check may race with another.
        self._lock = threading.RLock()

    def answer(self, stage: str, number: int, asked: bytes) -> bytes:
        """One stage of the sync of round `number`.

        Raises:
            MessageError, SecurityError: see `secure.member`.
        """
        with self._lock:
            return self._stages[stage](self, number, asked)

    def plan(self, number: int) -> SyncPlan:
        """What the driver has signed for the sync of a round.

        Raises:
            SecurityError: there is none.
        """
        return self._sync(number).plan

    def spend(self, number: int) -> Masker:
        """The keys to mask a round's update with, given out once for each sync: two updates under the same masks would
        give away their difference, and are sent before anybody signs them.

        Raises:
            SecurityError: there are none, or something was masked with them before.
        """
        with self._lock:
            masker = self.masker(number)
            if number not in self._unused:
                raise SecurityError(f"round {number}: its keys have masked an update already")
            self._unused.remove(number)
            return masker

    def masker(self, number: int) -> Masker:
        """Of the sync that a round's update goes into.

        Raises:
            SecurityError: there is none; nothing leaves the region unmasked.
        """
        if number not in self._maskers:
            raise SecurityError(f"round {number}: no keys were agreed on, so the update is not sent")
        return self._maskers[number]

    def upload(self, number: int, chunks: Sequence[Sealed]) -> bytes:
        """Header of what was masked: all chunks, in order."""
        hashes = [chunk.hash for chunk in chunks]
        with self._lock:
            sync, masker = self._sync(number), self.masker(number)
            return sync.upload(hashes, masker, self._weights[self._name], add_tags(chunks)).to_wire()

    def confirm(self, number: int, result: bytes, chunks: Sequence[Sealed]) -> bytes:
        """Signature on the sum of these chunks.

        Raises:
            TamperError: its weight is not that of the regions in it, whose update it would make larger or smaller.
        """
        said, hashes = Result.from_wire(result, "aggregator"), [chunk.hash for chunk in chunks]
        self._check_weight(number, said)
        with self._lock:
            return self._sync(number).confirm(said, hashes, add_tags(chunks))

    def accept(self, number: int, proof: bytes) -> Result:
        """Let the sum of a round be applied, once; returns what it is, for nothing else was signed."""
        found = Proof.from_wire(proof, "aggregator")
        with self._lock:
            self._sync(number).accept(found.result, found.quorum)
        return found.result

    def accept_beside(self, number: int, proofs: Sequence[str]) -> list[Result]:
        """Let the sums of the other groups of a round be applied beside this region's own; no region is in two.

        Raises:
            SecurityError: see `Sync.check_beside`.
        """
        found, seen = [], set[str]()
        with self._lock:
            sync = self._sync(number)
            for wire in proofs:
                proof = Proof.from_wire(wire.encode(), "aggregator")
                cohort = sync.check_beside(proof)
                if seen & set(cohort):
                    raise SecurityError(f"round {number}: two groups hold {sorted(seen & set(cohort))[0]!r}")
                seen |= set(cohort)
                self._check_weight(number, proof.result)
                found.append(proof.result)
        return found

    def _check_weight(self, number: int, said: Result) -> None:
        """Refuse a sum whose weight is not that of the regions in it."""
        whole = sum(self._weights.get(region, 0) for region in said.names)
        if said.weight != whole:
            raise TamperError(
                f"round {number}: the sum's weight is {said.weight / SCALE:g}, expected {whole / SCALE:g}"
            )

    def endorse(self, number: int, model: str) -> bytes:
        """Signature on the model that came of the sum of a round.

        Raises:
            SecurityError: no sum of that round was let through.
        """
        with self._lock:
            sync = self._sync(number)
            if not sync.accepted:
                raise SecurityError(f"round {number}: no sum was accepted, so no model of it is endorsed")
            return self._member.endorse(sync.plan.job, number, model)

    def check_model(self, job: str, number: int, model: str, endorsements: Mapping[str, str]) -> None:
        """Refuse to go on from a model that too few regions have endorsed.

        Raises:
            SecurityError: see `Member.check_model`.
        """
        signatures = {}
        for name, signature in endorsements.items():
            with contextlib.suppress(ValueError):  # nonsense does not count
                signatures[name] = bytes.fromhex(signature)
        self._member.check_model(job, number, model, signatures, self._weights, self._least)

    def _sync(self, number: int) -> Sync:
        if number not in self._syncs:
            raise SecurityError(f"round {number}: {self._name!r} takes no part in its sync")
        return self._syncs[number]

    def _open(self, number: int, asked: bytes) -> bytes:
        sync = self._member.open(SignedPlan.from_wire(asked, "driver"))
        if sync.plan.round != number:
            raise SecurityError(f"a plan of round {sync.plan.round} came for round {number}")
        self._syncs[number] = sync
        self._forget_keys(number)
        for old in sorted(self._syncs)[:-KEPT]:
            del self._syncs[old]
            self._forget_keys(old)
        return sync.advert().to_wire()

    def _forget_keys(self, number: int) -> None:
        self._maskers.pop(number, None)
        self._unused.discard(number)

    def _share(self, number: int, asked: bytes) -> bytes:
        return self._sync(number).share(Adverts.from_wire(asked, "aggregator").adverts).to_wire()

    def _receive(self, number: int, asked: bytes) -> bytes:
        self._maskers[number] = self._sync(number).receive(Delivered.from_wire(asked, "aggregator").shares)
        self._unused.add(number)
        return b""

    def _agree(self, number: int, asked: bytes) -> bytes:
        return self._sync(number).agree(Survivors.from_wire(asked, "aggregator"))

    def _unmask(self, number: int, asked: bytes) -> bytes:
        opening = Opening.from_wire(asked, "aggregator")
        return self._sync(number).unmask(opening.survivors, opening.quorum).to_wire()

    def _last_start(self, number: int, asked: bytes) -> bytes:
        del number
        return str(self._member.memory.last_start(asked.decode())).encode()

    _stages: ClassVar[dict[str, Callable[[Guard, int, bytes], bytes]]] = {
        "start": _last_start,
        "open": _open,
        "share": _share,
        "receive": _receive,
        "agree": _agree,
        "unmask": _unmask,
    }
