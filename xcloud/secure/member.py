"""A region's side of secure aggregation: what it tells, what it checks, and what it will never do twice.

Bonawitz et al., Practical secure aggregation (CCS 2017), complete graph, with the consistency round that holds
against a malicious aggregator, and fresh keys for every sync:

    advert    keys of this sync, signed with the region's identity              -> U1: whose adverts all have
    share     its seeds, split among U1 and sealed for each                     -> U2: whose shares all have
    masker    keys of the streams that its ranks add to every chunk
    upload    hashes of the masked chunks, signed                               -> U3: whose uploads arrived
    agree     a signature on one U3 for each sync, remembered before it is given
    unmask    with enough signatures on the same U3: shares of the survivors' own masks, of the dropped ones' pair masks
    confirm   a signature on the sum; applied only with enough of them

Nothing here knows of Ray, files or models. What must outlive a crash is in the `Memory`; whom the region trusts is in
the roster, which is pinned and never taken from a message.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from xcloud.codecs import Bytes
from xcloud.errors import SecurityError, TamperError
from xcloud.secure.masks import LANE_CHUNK, LANES, Masker
from xcloud.secure.messages import (
    PLAN,
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
from xcloud.secure.primitives import (
    KEY_BYTES,
    digest,
    exchange,
    exchange_key,
    hkdf,
    open_sealed,
    packed,
    public_of,
    seal,
)
from xcloud.secure.shamir import SHARE_BYTES, split

__all__ = [
    "Member",
    "Memory",
    "Signer",
    "Sync",
    "Verifier",
    "commitment",
    "lanes_of",
    "minimum_survivors",
    "pair_key",
    "self_key",
    "threshold",
]

ADVERT = "xcloud/advert/v1"
SHARE = "xcloud/share/v1"
UPLOAD = "xcloud/upload/v1"
AGREE = "xcloud/agree/v1"
CONFIRM = "xcloud/confirm/v1"
MODEL = "xcloud/model/v1"


class Signer(Protocol):
    """A region's identity."""

    name: str

    def sign(self, label: str, *fields: Any) -> bytes: ...


class Verifier(Protocol):
    """The pinned roster."""

    def verify(self, name: str, signature: bytes, label: str, *fields: Any) -> None:
        """Raises SecurityError if it is not `name`'s signature, or `name` is unknown."""
        ...


class Memory(Protocol):
    """What a region remembers over a crash. Every call has written it down when it returns.

    Raises:
        SecurityError: it contradicts what was remembered before.
    """

    def accept(self, job: str, start: int, round: int, attempt: int) -> None:
        """A plan is taken up: none before it in (start, round, attempt), and not this one again."""
        ...

    def last_start(self, job: str) -> int:
        """The latest start of a job of which a plan was taken up; 0: none."""
        ...

    def agree(self, plan: bytes, survivors: bytes) -> None:
        """These are the survivors that it signs for; no others for the same plan."""
        ...

    def unmask(self, job: str, round: int, plan: bytes, names: Sequence[str]) -> None:
        """It gives its shares away: once for a plan, and for one set of survivors in each round of a job, even if the
        round is played again from a checkpoint. The difference of two sums over other sets would be somebody's update."""
        ...


def threshold(cohort: int, colluders: int) -> int:
    """The smallest t with 2t > n + c: two sets of t members share one who is honest."""
    return (cohort + colluders) // 2 + 1


def minimum_survivors(colluders: int, two_regions: bool = False) -> int:
    """Regions that a sum must hold, so that it hides one of them from c colluders: c + 2, and at least 3.

    With `two_regions` at least 2, and then each of the two learns the other's update from the sum.
    """
    return max(2 if two_regions else 3, colluders + 2)


class Member:
    """One region, over all syncs.

    Args:
        identity: its own.
        roster: everybody else's, and the driver's.
        memory: over crashes.
        check: raises for a plan that the region's own policy forbids.
        driver: whose plans it takes.
    """

    def __init__(
        self,
        identity: Signer,
        roster: Verifier,
        memory: Memory,
        check: Callable[[SyncPlan], None],
        driver: str = "driver",
    ) -> None:
        self.identity, self.roster, self.memory = identity, roster, memory
        self._check, self.driver = check, driver

    def endorse(self, job: str, round: int, model: str) -> bytes:
        """A signature: this model is what a sum that the regions have signed made of the one before."""
        return self.identity.sign(MODEL, job, round, model)

    def check_model(
        self,
        job: str,
        round: int,
        model: str,
        endorsements: Mapping[str, bytes],
        allowed: Collection[str],
        least: int,
    ) -> None:
        """Refuse a model that too few regions have endorsed. What is no signature of an allowed region does not count: one bad
        region could else keep all from going on.

        Raises:
            SecurityError: says how many have.
        """
        good = 0
        for name, signature in endorsements.items():
            try:
                self.roster.verify(name, signature, MODEL, job, round, model)
            except SecurityError:
                continue
            good += name in allowed
        if good < least:
            raise SecurityError(
                f"model of round {round}: {good} regions have endorsed it, expected at least {least}"
            )

    def open(self, signed: SignedPlan) -> Sync:
        """Take up a plan.

        Raises:
            MessageError: it is no plan.
            SecurityError: it is not by the driver, was taken up before, leaves this region out, or breaks its policy.
        """
        self.roster.verify(self.driver, signed.signature, PLAN, signed.plan)
        plan = SyncPlan.from_wire(signed.plan, self.driver)
        if self.identity.name not in plan.cohort:
            raise SecurityError(f"plan of round {plan.round}: its cohort leaves {self.identity.name!r} out")
        self.check_rules(plan)
        self.memory.accept(plan.job, plan.start, plan.round, plan.attempt)
        return Sync(self, plan, signed.hash)

    def check_rules(self, plan: SyncPlan) -> None:
        """Refuse a plan whose numbers protect nobody, or that breaks this region's policy.

        Raises:
            SecurityError: says which.
        """
        who = f"plan of round {plan.round}"
        if not 2 * plan.threshold > len(plan.cohort) >= plan.threshold:
            raise SecurityError(
                f"{who}: threshold {plan.threshold} of {len(plan.cohort)}, expected more than half of them: "
                "else two sets of regions could open the same update in two ways"
            )
        if plan.minimum > len(plan.cohort):
            raise SecurityError(f"{who}: it asks for {plan.minimum} survivors of {len(plan.cohort)} regions")
        self._check(plan)


class Sync:
    """One sync of one region; the stages are called in order, each once."""

    def __init__(self, member: Member, plan: SyncPlan, plan_hash: bytes) -> None:
        self._me, self.plan, self.hash = member, plan, plan_hash
        self.name = member.identity.name
        self._channel, self._mask_seed, self._self_seed, self._tag_seed = (
            secrets.token_bytes(KEY_BYTES) for _ in range(4)
        )
        self._channel_key, self._mask_key = exchange_key(self._channel), exchange_key(self._mask_seed)
        self._adverts: dict[str, Advert] = {}
        self._shares: dict[str, tuple[bytes, bytes]] = {}
        self.first = self.second = b""
        self._uploaded = b""
        self._agreed: Survivors | None = None
        self._confirmed: Result | None = None
        self._done: set[str] = set()

    # -- keys -----------------------------------------------------------------------------

    def advert(self) -> Advert:
        """This sync's public keys."""
        unsigned = Advert(
            name=self.name,
            channel=public_of(self._channel_key),
            mask=public_of(self._mask_key),
            self_commitment=commitment("self", self.hash, self.name, self._self_seed),
            tag_commitment=commitment("tag", self.hash, self.name, self._tag_seed),
            signature=bytes(64),
        )
        signature = self._me.identity.sign(ADVERT, self.hash, *unsigned.fields())
        return unsigned.model_copy(update={"signature": signature})

    def share(self, adverts: Sequence[Advert]) -> SealedShares:
        """Split this region's seeds among those who sent an advert.

        Raises:
            SecurityError: too few, one outside the cohort, one twice, one not signed by its region, a key used twice or of
                low order, or this region's own is not as it was sent.
        """
        names = [advert.name for advert in adverts]
        for name in names:
            if name not in self.plan.cohort:
                raise SecurityError(f"advert of {name!r}, which is not in the cohort")
        if len(set(names)) != len(names):
            raise SecurityError("two adverts of one region")
        if len(names) < max(self.plan.threshold, self.plan.minimum):
            raise SecurityError(
                f"{len(names)} regions sent adverts, expected at least {max(self.plan.threshold, self.plan.minimum)}"
            )
        for advert in adverts:
            self._me.roster.verify(advert.name, advert.signature, ADVERT, self.hash, *advert.fields())
        keys = [key for advert in adverts for key in (advert.channel, advert.mask)]
        if len(set(keys)) != len(keys):
            raise SecurityError("two adverts hold the same key")
        heard = {advert.name: advert for advert in adverts}
        mine = heard.get(self.name)
        if (
            mine is None
            or mine.channel != public_of(self._channel_key)
            or mine.mask != public_of(self._mask_key)
        ):
            raise SecurityError(f"the adverts do not hold that of {self.name!r} as it was sent")
        self._once("share")  # a second answer would seal other shares under the same keys and nonces
        self._adverts = heard
        self.first = first_hash(self.hash, adverts)
        count = len(self.plan.cohort)
        own, pair = (split(s, self.plan.threshold, count) for s in (self._self_seed, self._mask_seed))
        self._shares[self.name] = self._of(own, pair, self.name)
        sealed = {}
        for peer, advert in self._adverts.items():
            if peer != self.name:
                text = b"".join(self._of(own, pair, peer)) + self._tag_seed
                secret = exchange(self._channel_key, advert.channel, peer)
                sealed[peer] = seal(
                    self._share_key(secret, self.name, peer), text, self._bound(self.name, peer)
                )
        return SealedShares(name=self.name, sealed=sealed)

    def receive(self, delivered: Sequence[SealedShares]) -> Masker:
        """Take the shares that others have sealed for this region; returns the keys of its masks.

        Args:
            delivered: of everyone in U2, this region among them.

        Raises:
            SecurityError: too few, from one without an advert, or one that does not open.
        """
        self._once("receive")
        tags = {self.name: self._tag_seed}
        for message in delivered:
            peer = message.name
            if peer == self.name:
                continue
            advert = self._adverts.get(peer)
            if advert is None or peer in self._shares:
                raise SecurityError(f"shares of {peer!r}, which sent no advert or sent them twice")
            if self.name not in message.sealed:
                raise SecurityError(f"{peer!r} sealed no shares for {self.name!r}")
            secret = exchange(self._channel_key, advert.channel, peer)
            key = self._share_key(secret, peer, self.name)
            text = open_sealed(key, message.sealed[self.name], self._bound(peer, self.name), peer)
            tags[peer] = text[2 * SHARE_BYTES :]
            if commitment("tag", self.hash, peer, tags[peer]) != advert.tag_commitment:
                raise SecurityError(f"{peer!r} sealed another seed for the tags than it had committed to")
            self._shares[peer] = text[:SHARE_BYTES], text[SHARE_BYTES : 2 * SHARE_BYTES]
        needed = max(self.plan.threshold, self.plan.minimum)
        if len(self._shares) < needed:
            raise SecurityError(f"{len(self._shares)} regions delivered shares, expected at least {needed}")
        self.second = digest("xcloud/u2/v1", self.hash, self.first, sorted(self._shares))
        added = [self_key(self.hash, self.name, self._self_seed)]
        taken: list[bytes] = []
        for peer in sorted(self._shares):
            if peer != self.name:
                key = pair_key(self._mask_key, self._adverts[peer].mask, self._context(), self.name, peer)
                (added if self.name < peer else taken).append(key)
        # Of all regions and nobody else: each part was sealed for its receiver, and checked against its commitment.
        seed = digest("xcloud/tag-seed/v1", self.hash, [tags[peer] for peer in sorted(tags)])
        tag = cipher = b""
        if self.plan.tagged:
            tag = hkdf(seed, self.hash, "xcloud/tags/v1", self.first, self.second)
        if self.plan.scheme == "ckks":
            cipher = hkdf(seed, self.hash, "xcloud/ckks/v1", self.first, self.second)
        return Masker(tuple(added), tuple(taken), tag, cipher)

    # -- the update -----------------------------------------------------------------------

    def upload(
        self, hashes: Sequence[bytes], masker: Masker, weight: int, tags: tuple[int, int] = (0, 0)
    ) -> Upload:
        """Sign what was masked and sent, once for each sync.

        Args:
            hashes: SHA-256 of each masked chunk, in order.
            masker: that it was masked with; masks the lanes too.
            weight: of this region, at most the plan's largest.
            tags: of all chunks together.

        Raises:
            SecurityError: other chunks were uploaded in this sync before, or the weight is out of bounds.
        """
        if not 0 <= weight <= self.plan.most_weight:
            raise SecurityError(f"weight {weight}, expected 0 to {self.plan.most_weight} as planned")
        lanes = lanes_of(weight, *tags)
        masker.apply(lanes, LANE_CHUNK, LANES)
        unsigned = Upload(name=self.name, hashes=tuple(hashes), lanes=lanes.tobytes(), signature=bytes(64))
        if self._uploaded not in (b"", unsigned.root):
            raise SecurityError(f"{self.name!r} would mask a second update with the keys of the first")
        self._uploaded = unsigned.root
        signature = self._me.identity.sign(UPLOAD, *self._context(), self.name, unsigned.root)
        return unsigned.model_copy(update={"signature": signature})

    def agree(self, survivors: Survivors) -> bytes:
        """A signature on the survivors, on these and no others.

        Raises:
            SecurityError: too few, not of U2, this region's upload is not as it was sent, or it has signed others.
        """
        names = survivors.names
        if not set(names) <= set(self._shares):
            raise SecurityError(f"survivors {sorted(set(names) - set(self._shares))} never delivered shares")
        needed = max(self.plan.threshold, self.plan.minimum)
        if len(names) < needed:
            raise SecurityError(f"{len(names)} survivors, expected at least {needed}")
        if self.name in names and survivors.roots[names.index(self.name)] != self._uploaded:
            raise SecurityError(f"the upload of {self.name!r} is not as it was sent")
        self._me.memory.agree(self.hash, survivors.packed())
        self._agreed = survivors
        return self._me.identity.sign(AGREE, *self._context(), survivors.packed())

    def unmask(self, survivors: Survivors, quorum: Quorum) -> Unmasking:
        """The shares that open the sum of these survivors.

        Raises:
            SecurityError: these are not the survivors it signed, too few others signed them, or it has given its shares
                already.
        """
        if survivors != self._agreed:
            raise SecurityError(f"{self.name!r} did not sign these survivors")
        self._count(quorum, survivors.names, AGREE, *self._context(), survivors.packed())
        self._me.memory.unmask(self.plan.job, self.plan.round, self.hash, survivors.names)
        alive = set(survivors.names)
        return Unmasking(
            name=self.name,
            survivors={peer: own for peer, (own, _) in self._shares.items() if peer in alive},
            dropped={peer: pair for peer, (_, pair) in self._shares.items() if peer not in alive},
        )

    # -- the sum --------------------------------------------------------------------------

    def confirm(self, result: Result, hashes: Sequence[bytes], tags: tuple[int, int] = (0, 0)) -> bytes:
        """A signature on the sum that this region has before it.

        Args:
            result: what it is said to be.
            hashes: SHA-256 of the chunks as this region received them.
            tags: of all these chunks together.

        Raises:
            SecurityError: they are others, it is of other survivors than agreed on, its weight cannot be, or it has signed
                another before: with signatures on two, some regions could be given the one and some the other.
        """
        if self._agreed is None or result.names != self._agreed.names:
            raise SecurityError("the sum is of other regions than were agreed on")
        if tuple(hashes) != result.hashes:
            raise SecurityError("the sum is not what the aggregator says that it is")
        if self.plan.tagged and tags != result.tags:
            raise TamperError("the sum is not that of the survivors' updates: its tags do not fit it")
        if not 0 < result.weight <= self.plan.most_weight * len(result.names):
            raise SecurityError(
                f"the sum's weight is {result.weight}, expected 1 to {self.plan.most_weight} for each of "
                f"{len(result.names)} regions"
            )
        if self._confirmed not in (None, result):
            raise SecurityError(f"{self.name!r} has signed another sum of this sync before")
        self._confirmed = result
        return self._me.identity.sign(CONFIRM, *self._context(), result.packed())

    def accept(self, result: Result, quorum: Quorum) -> None:
        """Let the sum be applied, once.

        Raises:
            SecurityError: too few regions have signed the same sum, or it was let through before.
        """
        self._count(quorum, result.names, CONFIRM, *self._context(), result.packed())
        self._once("accept")

    def check_beside(self, proof: Proof) -> tuple[str, ...]:
        """Check the sum of another group of the same round; returns its cohort.

        Raises:
            SecurityError: it is not of a sync like this one but for its regions, or too few of them have signed it.
        """
        signed = proof.plan
        if signed is None:
            raise SecurityError(f"round {self.plan.round}: another group's sum came without its plan")
        self._me.roster.verify(self._me.driver, signed.signature, PLAN, signed.plan)
        plan = SyncPlan.from_wire(signed.plan, self._me.driver)
        own = self.plan.model_copy(
            update={"cohort": plan.cohort, "threshold": plan.threshold, "minimum": plan.minimum}
        )
        if plan != own or set(plan.cohort) & set(self.plan.cohort):
            raise SecurityError(
                f"round {self.plan.round}: another group's sum is not of this round, or of the same regions"
            )
        self._me.check_rules(plan)
        names = proof.result.names
        if len(names) < max(plan.threshold, plan.minimum) or not set(names) <= set(plan.cohort):
            raise SecurityError(
                f"round {self.plan.round}: another group's sum is of {len(names)} regions of {len(plan.cohort)}, "
                f"expected at least {max(plan.threshold, plan.minimum)}"
            )
        context = signed.hash, proof.first, proof.second
        self._count(proof.quorum, names, CONFIRM, *context, proof.result.packed(), least=plan.threshold)
        return plan.cohort

    @property
    def accepted(self) -> bool:
        """Whether its sum was let through."""
        return "accept" in self._done

    # -- parts ----------------------------------------------------------------------------

    def _once(self, stage: str) -> None:
        if stage in self._done:
            raise SecurityError(f"{self.name!r} was asked for {stage!r} a second time in one sync")
        self._done.add(stage)

    def _count(
        self,
        quorum: Quorum,
        allowed: Sequence[str],
        label: str,
        *fields: bytes,
        least: int | None = None,
    ) -> None:
        """Refuse fewer than `least` (the plan's threshold) good signatures of `allowed` regions, or a bad one."""
        least = self.plan.threshold if least is None else least
        for name, signature in quorum.signatures.items():
            if name not in allowed:
                raise SecurityError(f"a signature of {name!r}, which is not among {sorted(allowed)}")
            self._me.roster.verify(name, signature, label, *fields)
        if len(quorum.signatures) < least:
            raise SecurityError(f"{len(quorum.signatures)} regions signed {label}, expected at least {least}")

    def _context(self) -> tuple[bytes, bytes, bytes]:
        return self.hash, self.first, self.second

    def _of(self, own: Sequence[bytes], pair: Sequence[bytes], peer: str) -> tuple[bytes, bytes]:
        point = self.plan.cohort.index(peer)
        return own[point], pair[point]

    def _share_key(self, secret: bytes, sender: str, receiver: str) -> bytes:
        return hkdf(secret, self.hash, SHARE, sender, receiver)

    def _bound(self, sender: str, receiver: str) -> bytes:
        return packed(SHARE, self.hash, self.first, sender, receiver)


def commitment(what: str, plan_hash: bytes, name: str, seed: bytes) -> bytes:
    """To a seed of 32 random bytes; it hides the seed and fits no other."""
    return digest(f"xcloud/commit-{what}/v1", plan_hash, name, seed)


def first_hash(plan_hash: bytes, adverts: Sequence[Advert]) -> bytes:
    """U1: everything that was advertised, in the order of names."""
    ordered = sorted(adverts, key=lambda advert: advert.name)
    return digest("xcloud/u1/v1", plan_hash, [packed(*advert.fields()) for advert in ordered])


def self_key(plan_hash: bytes, name: str, seed: bytes) -> bytes:
    """Of the stream that only a region's own seed makes."""
    return hkdf(seed, plan_hash, "xcloud/self-mask/v1", name)


def pair_key(own: Any, other: bytes, context: tuple[bytes, bytes, bytes], name: str, peer: str) -> bytes:
    """Of the stream that two regions share: the one first in name order adds it, the other takes it off."""
    plan_hash, first, second = context
    secret = exchange(own, other, peer)
    return hkdf(secret, plan_hash, "xcloud/pair-mask/v1", min(name, peer), max(name, peer), first, second)


def lanes_of(weight: int, *tags: int) -> Bytes:
    """64-bit integers that add beside the update, little-endian."""
    return np.array([weight, *tags], "<u8").view(np.uint8)
