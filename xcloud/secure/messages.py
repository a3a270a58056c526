"""Headers of the secure-aggregation protocol: strict JSON, versioned, every field bounded before it is used.

Bytes travel as base64. What is signed is not the JSON but the fields, through `primitives.packed`, except the
plan, whose very bytes are signed and hashed (`SignedPlan`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from xcloud.messages import Message
from xcloud.secure.primitives import KEY_BYTES, TAG_BYTES, digest, packed
from xcloud.secure.shamir import SHARE_BYTES

__all__ = [
    "PLAN",
    "Advert",
    "Adverts",
    "Delivered",
    "Name",
    "Opening",
    "Proof",
    "Quorum",
    "Result",
    "SealedShares",
    "SecureMessage",
    "SignedPlan",
    "Survivors",
    "SyncPlan",
    "Unmasking",
    "Upload",
]

PLAN = "xcloud/plan/v1"
SEALED_BYTES = 2 * SHARE_BYTES + KEY_BYTES + TAG_BYTES

Name = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Key = Annotated[bytes, Field(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Signature = Annotated[bytes, Field(min_length=64, max_length=64)]
Share = Annotated[bytes, Field(min_length=SHARE_BYTES, max_length=SHARE_BYTES)]
Sealed = Annotated[bytes, Field(min_length=SEALED_BYTES, max_length=SEALED_BYTES)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Hex = Annotated[str, StringConstraints(max_length=128)]


class SecureMessage(Message):
    """Base of the protocol's headers."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        ser_json_bytes="base64",
        val_json_bytes="base64",
        ser_json_inf_nan="constants",
    )


class SyncPlan(SecureMessage):
    """What one sync is, signed by the driver: everything after it is bound to the hash of its bytes.

    Attributes:
        job: its name; `start`, `round`, `attempt`: which sync of it. A run that goes on from a checkpoint has a later start.
        roster: hash of the roster that all hold pinned.
        cohort: regions asked to take part, in the roster's order, each once.
        threshold: regions without which nothing is opened (t).
        minimum: fewest regions whose sum may be opened.
        model: digest of the model that they start from.
        manifest: digest of its layout.
        update: digest of codec, ring and clipping: how updates become integers.
        chunks: half-open range of chunk ids; (0, 0): all of the layout's.
        most_weight: the largest weight one region may have.
        tagged: whether regions check the sum by its tags (`secure.tags`).
        scheme: what hides updates (`secure.masks`, `secure.ckks`).
    """

    job: Name
    start: Annotated[int, Field(ge=1, lt=1 << 63)] = 1
    round: Annotated[int, Field(ge=1, lt=1 << 63)]
    attempt: Annotated[int, Field(ge=1, lt=1 << 63)]
    roster: Hex
    cohort: Annotated[tuple[Name, ...], Field(min_length=1, max_length=4096)]
    threshold: Annotated[int, Field(ge=1, le=4096)]
    minimum: Annotated[int, Field(ge=1, le=4096)]
    model: Hex
    manifest: Hex
    update: Hex
    chunks: tuple[Count, Count]
    most_weight: Annotated[int, Field(ge=1, lt=1 << 48)] = 1
    tagged: bool = False
    scheme: Literal["masks", "ckks"] = "masks"

    @model_validator(mode="after")
    def _each_once(self) -> SyncPlan:
        if len(set(self.cohort)) != len(self.cohort):
            raise ValueError("the cohort names a region twice")
        return self


class SignedPlan(SecureMessage):
    """A plan as it was signed."""

    plan: Annotated[bytes, Field(max_length=1 << 20)]
    signature: Signature

    @property
    def hash(self) -> bytes:
        """`ph`: binds all that follows."""
        return digest(PLAN, self.plan)


class Advert(SecureMessage):
    """A region's fresh keys for one sync.

    Attributes:
        channel: X25519 key under which peers seal shares for it.
        mask: X25519 key from which pair masks come.
        self_commitment: to the seed of its own mask.
        tag_commitment: to its part of the tags' seed.
        signature: over the plan's hash and all of it.
    """

    name: Name
    channel: Key
    mask: Key
    self_commitment: Key
    tag_commitment: Key
    signature: Signature

    def fields(self) -> list[str | bytes]:
        """What is signed besides the plan's hash."""
        return [self.name, self.channel, self.mask, self.self_commitment, self.tag_commitment]


class SealedShares(SecureMessage):
    """For each peer: its shares of both seeds of `name`, and `name`'s part of the tags' seed, sealed for it alone."""

    name: Name
    sealed: Annotated[dict[Name, Sealed], Field(max_length=4096)]


class Adverts(SecureMessage):
    """U1, as the server passes it on."""

    adverts: Annotated[tuple[Advert, ...], Field(max_length=4096)]


class Delivered(SecureMessage):
    """U2, with what was sealed for the one who gets it."""

    shares: Annotated[tuple[SealedShares, ...], Field(max_length=4096)]


class Upload(SecureMessage):
    """What a region has masked and sent.

    Attributes:
        hashes: SHA-256 of each masked chunk, in order.
        lanes: masked 64-bit lanes beside it: the weight, and two tags.
        signature: over the plan's hash, U1, U2, name and root.
    """

    name: Name
    hashes: Annotated[tuple[Key, ...], Field(max_length=1 << 24)]
    lanes: Annotated[bytes, Field(min_length=24, max_length=24)]
    signature: Signature

    @property
    def root(self) -> bytes:
        """One hash over all that was uploaded."""
        return digest("xcloud/upload-root/v1", b"".join(self.hashes), len(self.hashes), self.lanes)


class Survivors(SecureMessage):
    """U3: whose uploads are in the sum, and which uploads."""

    names: Annotated[tuple[Name, ...], Field(max_length=4096)]
    roots: Annotated[tuple[Key, ...], Field(max_length=4096)]

    @model_validator(mode="after")
    def _one_root_each(self) -> Survivors:
        if len(self.names) != len(self.roots) or list(self.names) != sorted(set(self.names)):
            raise ValueError("expected the names in order, each once, and one root for each")
        return self

    def packed(self) -> bytes:
        """What is signed."""
        return packed(list(self.names), list(self.roots))


class Quorum(SecureMessage):
    """Signatures by name, over something that all have before them."""

    signatures: Annotated[dict[Name, Signature], Field(max_length=4096)]


class Opening(SecureMessage):
    """What a survivor needs before it gives its shares."""

    survivors: Survivors
    quorum: Quorum


class Unmasking(SecureMessage):
    """A region's shares that open the sum: of a survivor's own mask, or of a dropped region's pair masks; never both."""

    name: Name
    survivors: Annotated[dict[Name, Share], Field(max_length=4096)]
    dropped: Annotated[dict[Name, Share], Field(max_length=4096)]


class Result(SecureMessage):
    """What the sum is: all regions sign it before any applies it.

    Attributes:
        names: of those whose updates are in it.
        hashes: SHA-256 of each chunk of it.
        weight: total, from its lane.
        tags: totals of the tag lanes.
    """

    names: Annotated[tuple[Name, ...], Field(max_length=4096)]
    hashes: Annotated[tuple[Key, ...], Field(max_length=1 << 24)]
    weight: Annotated[int, Field(ge=0, lt=1 << 64)]
    tags: tuple[Annotated[int, Field(ge=0, lt=1 << 64)], Annotated[int, Field(ge=0, lt=1 << 64)]]

    def packed(self) -> bytes:
        """What is signed."""
        lanes = b"".join(value.to_bytes(8, "big") for value in (self.weight, *self.tags))
        return packed(list(self.names), b"".join(self.hashes), len(self.hashes), lanes)


class Proof(SecureMessage):
    """The sum, and enough signatures on it.

    `plan`, `first` and `second` are those of its sync, for regions that are in another group's.
    """

    result: Result
    quorum: Quorum
    plan: SignedPlan | None = None
    first: Annotated[bytes, Field(max_length=KEY_BYTES)] = b""
    second: Annotated[bytes, Field(max_length=KEY_BYTES)] = b""
