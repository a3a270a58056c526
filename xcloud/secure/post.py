"""One process's end of the envelopes: who it is, whom it trusts, and its keys for the rounds that are under way.

A region seals its update when it has made it. Whom for is settled when it is merged: the driver asks everybody for a
fresh key of the round (`Posted`) and passes the keys on (`PostOrder`, `Mail`); each sender then wraps its content key for
the receivers (`Letter`). So an aggregation actor that was restarted, or an update that is merged rounds later, costs
new headers and no new sealing.

With `envelope.keys` identities and roster are files, pinned out of band, and nobody who only relays can put a key of its own
in between. Without, each process makes an identity when it starts and the driver introduces it to the others. That keeps
out whoever reads or writes the traffic, object store and spill files between them, but not whoever rules the cluster.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field

from xcloud.errors import ForeignKeyError, ReplayError, SecurityError
from xcloud.secure.envelope import (
    Envelope,
    Opening,
    ReceiverKey,
    Route,
    Sealing,
    close_envelope,
    unwrap_envelope,
)
from xcloud.secure.identity import Identity, Member, PublicKey, Role, Roster
from xcloud.secure.keyring import Keyring
from xcloud.secure.messages import SecureMessage
from xcloud.secure.primitives import digest, exchange

__all__ = [
    "EnvelopeConfig",
    "Letter",
    "Mail",
    "Post",
    "PostOrder",
    "Posted",
    "aggregator_name",
    "is_reserved",
    "largest",
    "round_hash",
]

KEPT = 64
"""Rounds whose keys are kept: a merge that a slow region has missed waits for it."""

MOST_PARTIES = 4096
DRIVER = "driver"
AGGREGATOR = "aggregator"
ROSTER = "roster.json"

Round = Annotated[int, Field(ge=1, lt=1 << 63)]


class EnvelopeConfig(BaseModel):
    """The job's section `envelope`: what travels between regions and aggregation actors is sealed and signed.

    Attributes:
        keys: folder with the roster and, on each machine, the private keys of who runs there; null: every process makes
            an identity of its own, which the driver vouches for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: str | None = None


class Letter(SecureMessage):
    """An envelope's header and table; the chunks travel beside it."""

    envelope: Envelope
    table: Annotated[bytes, Field(max_length=1 << 30)]


class PostOrder(SecureMessage):
    """What a party is asked for: keys for these rounds, and, if it has sealed an update, its header for `receivers`.

    `introduced` is the roster of those who have none that is pinned.
    """

    job: Annotated[str, Field(min_length=1, max_length=256)]
    rounds: Annotated[tuple[Round, ...], Field(max_length=MOST_PARTIES)]
    attempt: Round
    receivers: Annotated[tuple[ReceiverKey, ...], Field(max_length=MOST_PARTIES)] = ()
    introduced: Annotated[tuple[Member, ...], Field(max_length=MOST_PARTIES)] = ()


class Posted(SecureMessage):
    """Who a party is, and its keys, one for each round that it was asked for."""

    card: PublicKey
    keys: Annotated[tuple[ReceiverKey, ...], Field(max_length=MOST_PARTIES)]
    letter: Letter | None = None


class Mail(SecureMessage):
    """What a folder needs to open what it is sent, and to seal what it sends.

    Attributes:
        attempt: of the merge.
        manifest: digest of the layout.
        chunks: half-open range of chunk ids that the senders' envelopes hold.
        letters: of the senders, by name.
        direction: of what is sent on.
        receivers: of what is sent on; none: it is not sealed.
        introduced: see `PostOrder`.
    """

    attempt: Round
    manifest: str
    chunks: tuple[int, int]
    letters: Annotated[dict[str, Letter], Field(max_length=MOST_PARTIES, default_factory=dict)]
    direction: Literal["up", "down"] = "down"
    receivers: Annotated[tuple[ReceiverKey, ...], Field(max_length=MOST_PARTIES)] = ()
    introduced: Annotated[tuple[Member, ...], Field(max_length=MOST_PARTIES)] = ()


@dataclass(frozen=True)
class _Own:
    """A receiver key of ours, with both sides."""

    private: X25519PrivateKey
    public: ReceiverKey


class Post:
    """One party's identity, trust and keys.

    Args:
        identity: its own.
        pinned: whom it trusts; None: whom it is introduced to.
    """

    def __init__(self, identity: Identity, pinned: Roster | None = None) -> None:
        self.identity, self._pinned = identity, pinned
        self._keys: dict[tuple[str, int], _Own] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, name: str, config: EnvelopeConfig) -> Post:
        """The end of the party `name`.

        Raises:
            KeyFileError: names the file that is missing or wrong.
        """
        if config.keys is None:
            return cls(Identity.generate(name))
        folder = Path(config.keys).expanduser()
        return cls(Keyring(folder).load(name), Roster.load(folder / ROSTER))

    def answer(self, order: PostOrder, letter: Letter | None = None) -> Posted:
        """Its card and its keys."""
        keys = tuple(self._key(order.job, round).public for round in dict.fromkeys(order.rounds))
        return Posted(card=PublicKey.of(self.identity), keys=keys, letter=letter)

    def wrap(
        self,
        sealing: Sealing,
        table: bytes,
        attempt: int,
        receivers: Iterable[ReceiverKey],
        role: Role,
        introduced: Sequence[Member],
    ) -> Letter:
        """The header of what was sealed, for these receivers.

        Raises:
            ForeignKeyError: one of them is not in the roster, or in another role.
            SecurityError: its key is not one to seal to.
        """
        roster, route = self._trusted(introduced), replace(sealing.route, attempt=attempt)
        fitting = [key for key in receivers if key.round == route.round]
        if role == "region":  # one whose key is bad keeps the sum from itself alone
            fitting = [key for key in fitting if _is_good(key, roster, route, role)]
        for key in fitting:
            roster.member(key.name, role)
        if not fitting:
            raise ForeignKeyError(f"{route.sender}: nobody offers a key for round {route.round}")
        envelope = close_envelope(route, sealing.secret, table, self.identity, fitting, roster)
        return Letter(envelope=envelope, table=table)

    def unwrap(
        self, letter: Letter, route: Route, role: Role, most: int, introduced: Sequence[Member]
    ) -> Opening:
        """What opens the chunks of a letter.

        Args:
            letter: as it has arrived.
            route: what it must be for.
            role: that its sender must have.
            most: bytes of a chunk.
            introduced: see `PostOrder`.

        Raises:
            SecurityError: see `envelope.unwrap_envelope`; the sender has another role; or there is no key for the round.
        """
        roster = self._trusted(introduced)
        roster.member(route.sender, role)
        own = self._keys.get((route.job, route.round))
        if own is None:
            raise ReplayError(f"{route.sender}: sealed for round {route.round}, for which no key is held")
        name = self.identity.name
        return unwrap_envelope(letter.envelope, letter.table, route, name, own.private, roster, most)

    def forget(self, round: int) -> None:
        """Drop the keys of a round that is over, and of those before it: what was sealed for them stays sealed."""
        with self._lock:
            self._keys = {at: own for at, own in self._keys.items() if at[1] > round}

    def _key(self, job: str, round: int) -> _Own:
        with self._lock:
            own = self._keys.get((job, round))
            if own is None:
                private = X25519PrivateKey.generate()
                own = _Own(private, ReceiverKey.of(self.identity, job, round, private))
                for old in list(self._keys)[: max(0, len(self._keys) + 1 - KEPT)]:
                    del self._keys[old]
                self._keys[job, round] = own
            return own

    def _trusted(self, introduced: Sequence[Member]) -> Roster:
        if self._pinned is not None:
            return self._pinned
        if not introduced:
            raise SecurityError(f"{self.identity.name}: nobody was introduced, and no roster is pinned")
        return Roster.of(introduced)


def _is_good(key: ReceiverKey, roster: Roster, route: Route, role: Role) -> bool:
    try:
        roster.member(key.name, role)
        exchange(X25519PrivateKey.generate(), key.check(roster, route.job, route.round), key.name)
    except SecurityError:
        return False
    return True


def round_hash(job: str, round: int, manifest: str) -> bytes:
    """What a round's envelopes are bound to besides their route: 32 bytes that both sides take from what they hold."""
    return digest("xcloud/envelope/round/v1", job, round, manifest)


def aggregator_name(share: int | str) -> str:
    """Of the actor that folds a share of the chunks, or the regions of a cloud."""
    if isinstance(share, str):
        return f"{AGGREGATOR}-of-{share}"
    return AGGREGATOR if share == 0 else f"{AGGREGATOR}-{share}"


def is_reserved(name: str) -> bool:
    """Whether a region of that name could be taken for the driver or an aggregator."""
    return name in (DRIVER, AGGREGATOR) or name.startswith(f"{AGGREGATOR}-")


def largest(length: int) -> int:
    """Bytes that the encoding of a chunk of so many elements may claim: no codec takes more than 8 an element."""
    return 8 * length + 4096
