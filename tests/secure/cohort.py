"""A whole sync between members and a server in one process, with places where an attacker can stand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from xcloud.codecs import Codec, FixedConfig, Frame, ring_of
from xcloud.errors import SecurityError
from xcloud.secure import primitives
from xcloud.secure.masks import Masker
from xcloud.secure.member import Member, Sync, threshold
from xcloud.secure.messages import PLAN, Result, SignedPlan, SyncPlan, Upload
from xcloud.secure.server import Server
from xcloud.secure.tags import Sealed, add_tags, tags_of

JOB = "three-clouds"
LENGTHS = (5000, 4096, 1)


@dataclass
class Key:
    """An identity in memory."""

    name: str
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    def sign(self, label: str, *fields: Any) -> bytes:
        return primitives.sign(self.key, label, *fields)


class Pinned:
    """A roster in memory."""

    def __init__(self, keys: Collection[Key]) -> None:
        self.keys = {key.name: primitives.public_of(key.key) for key in keys}

    def verify(self, name: str, signature: bytes, label: str, *fields: Any) -> None:
        if name not in self.keys:
            raise SecurityError(f"{name!r} is not in the roster")
        primitives.verify(self.keys[name], signature, name, label, *fields)


class Remembered:
    """A memory that outlives its member, as the journal's file does."""

    def __init__(self) -> None:
        self.last: dict[str, tuple[int, int, int]] = {}
        self.survivors: dict[bytes, bytes] = {}
        self.unmasked: dict[tuple[str, int], tuple[str, ...]] = {}
        self.given: set[bytes] = set()

    def accept(self, job: str, start: int, round: int, attempt: int) -> None:
        if (start, round, attempt) <= self.last.get(job, (0, 0, 0)):
            raise SecurityError(f"round {round}, attempt {attempt} of {job!r} was taken up before")
        self.last[job] = start, round, attempt

    def last_start(self, job: str) -> int:
        return self.last.get(job, (0, 0, 0))[0]

    def agree(self, plan: bytes, survivors: bytes) -> None:
        if self.survivors.setdefault(plan, survivors) != survivors:
            raise SecurityError("it has signed other survivors for this plan")

    def unmask(self, job: str, round: int, plan: bytes, names: Sequence[str]) -> None:
        if plan in self.given:
            raise SecurityError(f"it has given its shares for round {round} of {job!r} already")
        if self.unmasked.setdefault((job, round), tuple(names)) != tuple(names):
            raise SecurityError(f"it has given its shares for round {round} of {job!r} to other survivors")
        self.given.add(plan)


@dataclass
class Cohort:
    """Regions `r00`, `r01`, ... with random updates, and everything that they send in one sync.

    Attributes:
        updates: what each encodes, by name; `weights` go into the lane.
        tamper: called as `tamper(stage, sent, cohort)` with what was sent in it, by name, before the server has it; may change it.
    """

    count: int
    colluders: int = 0
    codec: Codec = field(default_factory=lambda: FixedConfig(bits=8).build())
    seed: int = 0
    tamper: Callable[[str, dict[str, Any], Cohort], None] = lambda *_: None
    lengths: tuple[int, ...] = LENGTHS
    tagged: bool = False

    def __post_init__(self) -> None:
        self.names = [f"r{i:02d}" for i in range(self.count)]
        self.driver = Key("driver")
        self.keys = {name: Key(name) for name in self.names}
        self.roster = Pinned([self.driver, *self.keys.values()])
        self.memories = {name: Remembered() for name in self.names}
        self.members = {name: self.member(name) for name in self.names}
        numbers = np.random.default_rng(self.seed)
        self.updates = {
            name: [numbers.normal(0, 1e-3, length).astype(np.float32) for length in self.lengths]
            for name in self.names
        }
        self.weights = {name: i + 1 for i, name in enumerate(self.names)}
        self.syncs: dict[str, Sync] = {}
        self.maskers: dict[str, Masker] = {}
        self.masked: dict[str, list[Any]] = {}
        self.sent: list[tuple[str, Any]] = []

    def member(self, name: str) -> Member:
        """A fresh member with what `name` remembers, as after a restart."""
        return Member(self.keys[name], self.roster, self.memories[name], lambda plan: None)

    def plan(self, **changes: Any) -> SyncPlan:
        planned = dict(
            job=JOB,
            round=1,
            attempt=1,
            roster="roster",
            cohort=tuple(self.names),
            threshold=threshold(self.count, self.colluders),
            minimum=min(self.count, max(3, self.colluders + 2)),
            model="model",
            manifest="manifest",
            update="fixed",
            chunks=(0, len(self.lengths)),
            most_weight=1000,
            tagged=self.tagged,
        )
        return SyncPlan(**(planned | changes))

    def signed(self, plan: SyncPlan | None = None, by: Key | None = None) -> SignedPlan:
        raw = (plan or self.plan()).to_wire()
        return SignedPlan(plan=raw, signature=(by or self.driver).sign(PLAN, raw))

    def frame(self, chunk: int, name: str = "") -> Frame:
        private = int.from_bytes(name.encode()[:7], "big") * 1000 + chunk
        return Frame(shared=chunk, private=private, members=self.count)

    def encoded(self, name: str, chunk: int) -> Any:
        return self.codec.encode(self.updates[name][chunk], self.frame(chunk, name)).copy()

    def ring(self, chunk: int) -> Any:
        found = ring_of(self.codec, self.lengths[chunk], self.frame(chunk))
        assert found is not None
        return found

    def exact(self, names: Collection[str]) -> list[Any]:
        """The sum of the encodings, in the clear."""
        totals = []
        for chunk in range(len(self.lengths)):
            first, *rest = (self.encoded(name, chunk) for name in sorted(names))
            for other in rest:
                self.codec.add(first, other, self.frame(chunk))
            totals.append(first)
        return totals

    def run(
        self, silent: Mapping[str, Collection[str]] | None = None, signed: SignedPlan | None = None
    ) -> tuple[list[Any], Result]:
        """A whole sync; returns the opened sum's chunks and its header.

        Args:
            silent: by stage, who sends nothing in it, nor later.
            signed: the plan; None makes one.
        """
        signed = signed or self.signed()
        server, gone = Server(signed, self.roster), set()

        def stage(name: str, ask: Callable[[str], Any], whom: Collection[str]) -> dict[str, Any]:
            gone.update((silent or {}).get(name, ()))
            sent = {one: ask(one) for one in whom if one not in gone}
            self.tamper(name, sent, self)
            self.sent += [(name, message) for message in sent.values()]
            return sent

        def advert(one: str) -> Any:
            self.syncs[one] = self.members[one].open(signed)
            return self.syncs[one].advert()

        adverts = server.adverts(stage("advert", advert, self.names))
        first = [message.name for message in adverts]
        shares = server.shares(stage("share", lambda one: self.syncs[one].share(adverts), first))
        second = [message.name for message in shares]
        inbox = {one: server.for_one(one, shares) for one in second}
        self.tamper("inbox", inbox, self)

        def upload(one: str) -> Upload:
            self.maskers[one] = self.syncs[one].receive(inbox[one])
            return self.mask(one)

        uploads = stage("upload", upload, second)
        survivors = server.uploads(uploads, len(self.lengths))
        for name in survivors.names:
            for index, data in enumerate(self.masked[name]):
                server.check_chunk(name, index, hashlib.sha256(data).digest())
        asked = dict.fromkeys(survivors.names, survivors)
        self.tamper("survivors", asked, self)
        quorum = server.agreed(stage("agree", lambda one: self.syncs[one].agree(asked[one]), survivors.names))
        unmaskings = stage("unmask", lambda one: self.syncs[one].unmask(asked[one], quorum), survivors.names)
        opening = server.opening(unmaskings)
        totals = []
        for chunk in range(len(self.lengths)):
            total = self.masked[survivors.names[0]][chunk].copy()
            for other in survivors.names[1:]:
                self.codec.add(total, self.masked[other][chunk], self.frame(chunk))
            opening.apply(total, chunk, self.ring(chunk))
            totals.append(total)
        result = server.result([hashlib.sha256(total).digest() for total in totals], opening)
        received = {one: (result, [total.copy() for total in totals]) for one in survivors.names}
        self.tamper("result", received, self)

        def confirm(one: str) -> bytes:
            said, chunks = received[one]
            hashes = [hashlib.sha256(chunk).digest() for chunk in chunks]
            return self.syncs[one].confirm(said, hashes, self.tags(one, chunks))

        confirmed = server.confirmed(result, stage("confirm", confirm, survivors.names))
        for one in survivors.names:
            if one not in gone:
                self.syncs[one].accept(received[one][0], confirmed)
        return totals, result

    def mask(self, name: str, weight: int | None = None) -> Upload:
        """One region's chunks, masked, and its upload message."""
        self.masked[name] = []
        for chunk in range(len(self.lengths)):
            data = self.encoded(name, chunk)
            self.maskers[name].apply(data, chunk, self.ring(chunk))
            self.masked[name].append(data)
        hashes = [hashlib.sha256(data).digest() for data in self.masked[name]]
        weight = self.weights[name] if weight is None else weight
        tags = self.tags(name, [self.encoded(name, chunk) for chunk in range(len(self.lengths))])
        return self.syncs[name].upload(hashes, self.maskers[name], weight, tags)

    def tags(self, name: str, chunks: list[Any]) -> tuple[int, int]:
        """Of all chunks, as region `name` makes them; (0, 0) where the sync has none."""
        key = self.maskers[name].tag
        found = [
            tags_of(data, chunk, self.ring(chunk), key) if key else (0, 0)
            for chunk, data in enumerate(chunks)
        ]
        return add_tags([Sealed(b"", tags) for tags in found])
