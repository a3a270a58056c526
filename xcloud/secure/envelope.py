"""Envelopes: chunks that only their receivers can read, and that nobody can alter, swap, drop or send again.

This protects the wire. The receiver reads what is inside: whoever aggregates sees every update.

1. A receiver offers an X25519 key for one round, signed by its identity (`ReceiverKey`).
2. The sender derives a content key and an ephemeral X25519 key from a secret of its own (`new_secret`), seals chunk after
   chunk (`Sealer`), and notes each one's length and SHA-256 in a table.
3. It wraps the content key for each receiver and signs the header (`close_envelope`). Upwards there is one receiver;
   downwards there are many, and the chunks are sealed once for all of them.
4. A receiver checks signature, purpose and table before it opens anything (`open_envelope`), and each chunk against the
   table before it decrypts it (`Opener`).

Chunks are sealed with AES-256-GCM: nonce = chunk id, bound = version, plan, sender, chunk id, chunks, plain length.
It takes 0.6 of the processor time of ChaCha20-Poly1305 where the processor has AES instructions: 3.4 against 1.9 GB/s a core
in chunks of 16 MiB. With the SHA-256 of each sealed chunk, sealing and opening run at about 1 GB/s a core (decision 0021).

Why a retry may use the same keys: the secret is random, is made where the update is, and is forgotten with it. One
secret and purpose give one key, whatever the attempt; one key and chunk id give one nonce; and a `Sealer` refuses to seal other content
for a chunk. So AES-GCM never meets a nonce with two texts, and a retry is the same bytes. After a crash both the update and
the secret are gone, and what is trained anew is sealed under other keys.

Sources: X25519 RFC 7748, HKDF RFC 5869, AES-GCM SP 800-38D, Ed25519 RFC 8032. The content key is committed to in
the signed header, since AES-GCM alone lets a sender make one text that opens differently under two keys
(Dodis et al. 2018, eprint 2019/016).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import Field

from xcloud.errors import ForeignKeyError, ReplayError, SecurityError, TamperError, TruncatedError
from xcloud.messages import Message
from xcloud.secure.identity import NAME, Identity, Roster, fingerprint
from xcloud.secure.primitives import (
    KEY_BYTES,
    TAG_BYTES,
    digest,
    exchange,
    exchange_key,
    hkdf,
    open_sealed,
    packed,
    public_of,
    seal,
)
from xcloud.secure.primitives import Field as Signed

__all__ = [
    "ROW_BYTES",
    "Envelope",
    "Opener",
    "Opening",
    "ReceiverKey",
    "Route",
    "Sealer",
    "Sealing",
    "close_envelope",
    "new_secret",
    "open_envelope",
    "table_of",
    "unwrap_envelope",
]

Bytes = npt.NDArray[np.uint8]

ROW_BYTES = 8 + KEY_BYTES
"""Of a table: a chunk's plain length (big endian) and the SHA-256 of its sealed bytes."""

CHUNK = "xcloud/envelope/chunk/v1"
COMMITMENT = "xcloud/envelope/commitment/v1"
CONTENT = "xcloud/envelope/content/v1"
EPHEMERAL = "xcloud/envelope/ephemeral/v1"
HEADER = "xcloud/envelope/header/v1"
RECEIVER = "xcloud/envelope/receiver/v1"
ROOT = "xcloud/envelope/root/v1"
WRAP = "xcloud/envelope/wrap/v1"

Name = Annotated[str, Field(pattern=NAME)]
Job = Annotated[str, Field(min_length=1, max_length=256)]
Number = Annotated[int, Field(ge=0, lt=1 << 63)]
Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Hex48 = Annotated[str, Field(pattern=r"^[0-9a-f]{96}$")]
Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


def new_secret() -> bytes:
    """A sender's secret for one update: kept as long as the update is, never written down, never sent."""
    return os.urandom(KEY_BYTES)


@dataclass(frozen=True)
class Route:
    """What an envelope is for. Both sides take it from the plan they follow, never from the envelope.

    Attributes:
        plan: SHA-256 of the signed plan.
        direction: `up` to an aggregator, `down` from it.
        chunks: ids of its chunks, without gaps.
    """

    plan: bytes
    job: str
    round: int
    attempt: int
    direction: Literal["up", "down"]
    sender: str
    chunks: range

    def __post_init__(self) -> None:
        assert self.chunks.step == 1
        assert len(self.plan) == KEY_BYTES

    @property
    def fields(self) -> tuple[Signed, ...]:
        """All of it, to be bound."""
        return (*self.content, self.attempt)

    @property
    def content(self) -> tuple[Signed, ...]:
        """All but the attempt: in another attempt the same chunks go under a new header."""
        first, count = self.chunks.start, len(self.chunks)
        return (self.plan, self.job, self.round, self.direction, self.sender, first, count)


class ReceiverKey(Message):
    """An X25519 key to seal to in one round of one job, signed by its owner's identity."""

    name: Name
    job: Job
    round: Number
    key: Hex32
    signature: Hex64

    @classmethod
    def of(cls, identity: Identity, job: str, round: int, key: X25519PrivateKey) -> ReceiverKey:
        """The public side of `key`. Forget `key` after the round: then nobody can open it any more."""
        public = public_of(key)
        signature = identity.sign(RECEIVER, identity.name, job, round, public)
        return cls(name=identity.name, job=job, round=round, key=public.hex(), signature=signature.hex())

    def check(self, roster: Roster, job: str, round: int) -> bytes:
        """The 32 bytes of the key, for this round of this job.

        Raises:
            ForeignKeyError: its owner is not in the roster.
            TamperError: its owner has not signed it.
            ReplayError: it is for another job or round.
        """
        public = bytes.fromhex(self.key)
        fields = (self.name, self.job, self.round, public)
        _check_signature(roster, self.name, bytes.fromhex(self.signature), RECEIVER, fields)
        if (self.job, self.round) != (job, round):
            raise ReplayError(
                f"{self.name}: its key is for round {self.round} of {self.job!r}; expected round {round} of {job!r}"
            )
        return public


class Envelope(Message):
    """The signed header of an envelope. The table and the sealed chunks travel beside it.

    `root` stands for the table, `commitment` for the content key, `wraps` holds that key for each receiver.
    `signer` is the sender's public key, so that a key that was rotated can be told from an altered header.
    """

    plan: Hex32
    job: Job
    round: Number
    attempt: Number
    direction: Literal["up", "down"]
    sender: Name
    first: Number
    count: Number
    root: Hex32
    commitment: Hex32
    ephemeral: Hex32
    wraps: dict[Name, Hex48]
    signer: Hex32
    signature: Hex64

    @property
    def signed(self) -> tuple[Signed, ...]:
        """Everything but the signature."""
        wraps = [(name, bytes.fromhex(wrap)) for name, wrap in sorted(self.wraps.items())]
        keys = [bytes.fromhex(key) for key in (self.root, self.commitment, self.ephemeral, self.signer)]
        return (*self.route.fields, *keys, wraps)

    @property
    def route(self) -> Route:
        """What it says it is for."""
        return Route(
            plan=bytes.fromhex(self.plan),
            job=self.job,
            round=self.round,
            attempt=self.attempt,
            direction=self.direction,
            sender=self.sender,
            chunks=range(self.first, self.first + self.count),
        )


@dataclass(frozen=True)
class Sealing:
    """What seals the chunks of one envelope: a sender may hand it to its own processes, which seal a share each."""

    route: Route
    secret: bytes = field(repr=False)

    def sealer(self) -> Sealer:
        """A fresh one."""
        return Sealer(self.route, self.secret)

    def opening(self, table: bytes) -> Opening:
        """For the sender itself."""
        return Opening(self.route, table, _content_key(self.route, self.secret))


class Sealer:
    """Seals chunks of one envelope. Several processes with the same route and secret may each seal their own chunks."""

    def __init__(self, route: Route, secret: bytes) -> None:
        self.route = route
        self.rows: dict[int, bytes] = {}
        """By chunk id, for `table_of`."""
        self._cipher = AESGCM(_content_key(route, secret))

    def seal(self, chunk: int, plain: Bytes, out: Bytes) -> None:
        """Seal a chunk into `out`, which is `TAG_BYTES` longer and does not overlap it. Both are contiguous.

        Raises:
            ReplayError: the chunk was sealed before, with other content. Nothing is left in `out`.
        """
        assert chunk in self.route.chunks
        assert out.size == plain.size + TAG_BYTES
        self._cipher.encrypt_into(_nonce(chunk), plain.data, _bound(self.route, chunk, plain.size), out.data)
        row = plain.size.to_bytes(8, "big") + hashlib.sha256(out).digest()
        if self.rows.setdefault(chunk, row) != row:
            out.fill(0)
            raise ReplayError(
                f"{self.route.sender}: chunk {chunk} was sealed with other content before; a retry offers the same bytes"
            )


def table_of(route: Route, rows: Mapping[int, bytes]) -> bytes:
    """The table of an envelope, from the rows of all its sealers.

    Raises:
        TruncatedError: a chunk was not sealed.
    """
    missing = next((chunk for chunk in route.chunks if chunk not in rows), None)
    if missing is not None:
        raise TruncatedError(
            f"{route.sender}: chunk {missing} was not sealed; expected {len(route.chunks)} chunks"
        )
    return b"".join(rows[chunk] for chunk in route.chunks)


def close_envelope(
    route: Route,
    secret: bytes,
    table: bytes,
    identity: Identity,
    receivers: Iterable[ReceiverKey],
    roster: Roster,
) -> Envelope:
    """The header: the content key wrapped for each receiver, and all of it signed.

    Raises:
        ForeignKeyError, TamperError, ReplayError: a receiver's key is not one to seal to, as in `ReceiverKey.check`.
        SecurityError: a receiver's key is of low order.
    """
    assert identity.name == route.sender
    assert len(table) == ROW_BYTES * len(route.chunks)
    content, ephemeral = _content_key(route, secret), _ephemeral_key(route, secret)
    wraps = {}
    for receiver in receivers:
        public = receiver.check(roster, route.job, route.round)
        shared = exchange(ephemeral, public, receiver.name)
        key = _wrapping_key(shared, route, receiver.name, public_of(ephemeral), public)
        wraps[receiver.name] = seal(key, content, packed(WRAP, *route.fields)).hex()
    unsigned = Envelope(
        plan=route.plan.hex(),
        job=route.job,
        round=route.round,
        attempt=route.attempt,
        direction=route.direction,
        sender=route.sender,
        first=route.chunks.start,
        count=len(route.chunks),
        root=_root(table).hex(),
        commitment=digest(COMMITMENT, content).hex(),
        ephemeral=public_of(ephemeral).hex(),
        wraps=wraps,
        signer=identity.public.hex(),
        signature="0" * 128,
    )
    return unsigned.model_copy(update={"signature": identity.sign(HEADER, *unsigned.signed).hex()})


@dataclass(frozen=True)
class Opening:
    """What opens the chunks of one envelope: a receiver may hand it to its own processes."""

    route: Route
    table: bytes = field(repr=False)
    content: bytes = field(repr=False)

    def opener(self) -> Opener:
        """A fresh one."""
        return Opener(self.route, self.table, self.content)


def open_envelope(
    envelope: Envelope,
    table: bytes,
    route: Route,
    receiver: str,
    key: X25519PrivateKey,
    roster: Roster,
    largest: int,
) -> Opener:
    """Like `unwrap_envelope`, and ready to open chunks."""
    return unwrap_envelope(envelope, table, route, receiver, key, roster, largest).opener()


def unwrap_envelope(
    envelope: Envelope,
    table: bytes,
    route: Route,
    receiver: str,
    key: X25519PrivateKey,
    roster: Roster,
    largest: int,
) -> Opening:
    """Check everything but the chunks themselves, and unwrap the content key.

    Args:
        envelope: as it has arrived.
        table: as it has arrived.
        route: what is expected, from the receiver's own plan.
        receiver: the receiver's name.
        key: whose public side its `ReceiverKey` has offered for this round.
        roster: pins the sender's key.
        largest: plain bytes that a chunk may have.

    Raises:
        ForeignKeyError: by somebody else than the expected sender, by a key that the roster does not have, or sealed
            for somebody else.
        TamperError: header or table are not what the sender has signed, or claim chunks that are too long.
        ReplayError: for another plan, job, round, attempt or direction.
        TruncatedError: not all chunks, or not the whole table.
        SecurityError: the ephemeral key is of low order.
    """
    sender = route.sender
    _check_sender(envelope, sender, roster)
    _check_purpose(envelope.route, route)
    _check_table(envelope, table, largest)
    if receiver not in envelope.wraps:
        raise ForeignKeyError(
            f"{sender}: sealed for {', '.join(sorted(envelope.wraps)) or 'nobody'}, not for {receiver}"
        )
    ephemeral = bytes.fromhex(envelope.ephemeral)
    wrapping = _wrapping_key(exchange(key, ephemeral, sender), route, receiver, ephemeral, public_of(key))
    try:
        content = open_sealed(
            wrapping, bytes.fromhex(envelope.wraps[receiver]), packed(WRAP, *route.fields), sender
        )
    except SecurityError:
        raise ForeignKeyError(f"{sender}: sealed for another key than {receiver}'s of this round") from None
    if digest(COMMITMENT, content) != bytes.fromhex(envelope.commitment):
        raise TamperError(f"{sender}: the content key is not the one that the header commits to")
    return Opening(route, table, content)


class Opener:
    """Opens the chunks of one envelope, each once, in any order. Made by `open_envelope`."""

    def __init__(self, route: Route, table: bytes, content: bytes) -> None:
        self.route = route
        self._table = table
        self._cipher = AESGCM(content)
        self._opened: set[int] = set()

    def size(self, chunk: int) -> int:
        """Plain bytes of a chunk.

        Raises:
            TamperError: the envelope has no such chunk.
        """
        return int.from_bytes(self._row(chunk)[:8], "big")

    def open(self, chunk: int, sealed: Bytes, out: Bytes) -> None:
        """Open a chunk into `out`, which is `size(chunk)` long and does not overlap it. Both are contiguous.

        Raises:
            TamperError: not the bytes that the sender has signed for this chunk; says if they are another chunk's.
            TruncatedError: too short.
            ReplayError: the chunk was opened before.
        """
        sender, size = self.route.sender, self.size(chunk)
        assert out.size == size
        if chunk in self._opened:
            raise ReplayError(f"{sender}: chunk {chunk} has come a second time")
        if sealed.size != size + TAG_BYTES or hashlib.sha256(sealed).digest() != self._row(chunk)[8:]:
            raise self._mismatch(chunk, sealed)
        try:
            self._cipher.decrypt_into(_nonce(chunk), sealed.data, _bound(self.route, chunk, size), out.data)
        except InvalidTag:
            out.fill(0)
            raise TamperError(
                f"{sender}: chunk {chunk} does not open; its sender has sealed it wrongly"
            ) from None
        self._opened.add(chunk)

    def finish(self, chunks: range | None = None) -> None:
        """Check that nothing is missing: of these chunks, or of all.

        Raises:
            TruncatedError: names the first chunk that was not opened.
        """
        for chunk in self.route.chunks if chunks is None else chunks:
            if chunk not in self._opened:
                raise TruncatedError(f"{self.route.sender}: chunk {chunk} has not come")

    def _row(self, chunk: int) -> bytes:
        if chunk not in self.route.chunks:
            raise TamperError(f"{self.route.sender}: no chunk {chunk} in its envelope")
        start = ROW_BYTES * self.route.chunks.index(chunk)
        return self._table[start : start + ROW_BYTES]

    def _mismatch(self, chunk: int, sealed: Bytes) -> SecurityError:
        sender, found, expected = (
            self.route.sender,
            hashlib.sha256(sealed).digest(),
            self.size(chunk) + TAG_BYTES,
        )
        for other in self.route.chunks:
            if self._row(other)[8:] == found:
                return TamperError(f"{sender}: came as chunk {chunk}, but is chunk {other}")
        if sealed.size < expected:
            return TruncatedError(f"{sender}: chunk {chunk} has {sealed.size} bytes; expected {expected}")
        return TamperError(f"{sender}: chunk {chunk} is not what its sender has signed")


def _check_sender(envelope: Envelope, sender: str, roster: Roster) -> None:
    if envelope.sender != sender:
        raise ForeignKeyError(f"{sender}: an envelope by {envelope.sender} came in its place")
    pinned, signer = roster.member(sender).public, bytes.fromhex(envelope.signer)
    if signer != pinned:
        raise ForeignKeyError(
            f"{sender}: signed by key {fingerprint(signer[:8])}...; the roster has {fingerprint(pinned[:8])}... "
            "If it was rotated, everybody needs the new roster"
        )
    _check_signature(roster, sender, bytes.fromhex(envelope.signature), HEADER, envelope.signed)


def _check_signature(
    roster: Roster, name: str, signature: bytes, label: str, fields: tuple[Signed, ...]
) -> None:
    try:
        roster.verify(name, signature, label, *fields)
    except ForeignKeyError:
        raise
    except SecurityError as error:
        raise TamperError(str(error)) from None


def _check_purpose(found: Route, expected: Route) -> None:
    for what in ("job", "round", "attempt", "direction", "plan"):
        is_, want = getattr(found, what), getattr(expected, what)
        if is_ != want:
            is_, want = (value.hex() if isinstance(value, bytes) else value for value in (is_, want))
            raise ReplayError(f"{expected.sender}: sealed for {what} {is_}; expected {want}")
    if found.chunks != expected.chunks:
        raise TruncatedError(
            f"{expected.sender}: holds {len(found.chunks)} chunks from {found.chunks.start} on; "
            f"expected {len(expected.chunks)} from {expected.chunks.start} on"
        )


def _check_table(envelope: Envelope, table: bytes, largest: int) -> None:
    sender, expected = envelope.sender, ROW_BYTES * envelope.count
    if len(table) < expected:
        raise TruncatedError(f"{sender}: its table has {len(table)} bytes; expected {expected}")
    if _root(table) != bytes.fromhex(envelope.root) or len(table) > expected:
        raise TamperError(f"{sender}: its table is not what it has signed")
    for index in range(envelope.count):
        size = int.from_bytes(table[ROW_BYTES * index : ROW_BYTES * index + 8], "big")
        if size > largest:
            raise TamperError(
                f"{sender}: chunk {envelope.first + index} claims {size} bytes; expected {largest} at most"
            )


def _content_key(route: Route, secret: bytes) -> bytes:
    assert len(secret) == KEY_BYTES
    return hkdf(secret, route.plan, CONTENT, *route.content)


def _ephemeral_key(route: Route, secret: bytes) -> X25519PrivateKey:
    return exchange_key(hkdf(secret, route.plan, EPHEMERAL, *route.fields))


def _wrapping_key(shared: bytes, route: Route, receiver: str, ephemeral: bytes, public: bytes) -> bytes:
    return hkdf(shared, route.plan, WRAP, *route.fields, receiver, ephemeral, public)


def _nonce(chunk: int) -> bytes:
    return chunk.to_bytes(12, "big")


def _bound(route: Route, chunk: int, size: int) -> bytes:
    first, count = route.chunks.start, len(route.chunks)
    return packed(CHUNK, route.plan, route.sender, chunk, first, count, size)


def _root(table: bytes) -> bytes:
    return digest(ROOT, table)
