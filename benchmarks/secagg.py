"""Secure aggregation: what a client and the aggregator pay, beside Flower's SecAgg+, homomorphic encryption and the limits.

MB/s are of fp32 update and of one core's CPU time, over chunks in one thread, as one rank works; ranks share a region's
chunks, so a region with r ranks does r times as much. The client quantises (rotation, stochastic rounding, packing) and
masks; hashing what it signs is a row of its own. The aggregator adds and hashes what came, and takes the masks off the sum.
The sync of 64 regions is the whole protocol, all regions one after the other in this process.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Options, Result
from benchmarks.peers import flower_python, last_line
from xcloud.codecs import CODECS, Bytes, Codec, FixedConfig, Frame, ring_of
from xcloud.secure.identity import Member as Entry
from xcloud.secure.identity import Roster
from xcloud.secure.journal import Journal
from xcloud.secure.keyring import Keyring
from xcloud.secure.masks import Masker
from xcloud.secure.member import Member, Sync, threshold
from xcloud.secure.messages import PLAN, SignedPlan, SyncPlan
from xcloud.secure.primitives import KEY_BYTES, Keystream
from xcloud.secure.server import Server

__all__ = ["run"]

CHUNK = 1 << 20
MB = 1e6


def run(options: Options) -> Result:
    """Clients and aggregator over cohorts and rings, then the peers, then a whole sync of 64 regions."""
    chunks, turns = (2, 3) if options.quick else (16, 7)
    numbers = np.random.default_rng(options.seed)
    update = [numbers.normal(0, 1e-3, CHUNK).astype(np.float32) for _ in range(chunks)]
    cases = [(3, 8), (3, 12), (3, 16), (8, 8), (8, 12), (8, 16), (16, 16), (64, 16)]
    subjects = [Subject(members, ring, update) for members, ring in cases]
    limits = Limits(update)
    for _ in range(turns):
        limits.turn()
        for subject in subjects:
            subject.turn()
    rows = [subject.row() for subject in subjects]
    main = next(row for row in rows if (row["regions"], row["ring"]) == (8, 16))
    flower = flower_client(1.0 if options.quick else 4.0)
    ckks = ckks_client(numbers, 1 if options.quick else 4)
    exact, seconds = whole_sync(8 if options.quick else 64, numbers)
    return Result(
        metrics={
            "client_n8_ring16_mb_per_s": main["client_mb_per_s"],
            "flower_client_mb_per_s": flower["client_mb_per_s"] if flower else None,
            "ratio_to_flower": main["client_mb_per_s"] / flower["client_mb_per_s"] if flower else None,
            "wire_ratio": main["wire_ratio"],
            "ckks_client_mb_per_s": ckks["client_mb_per_s"] if ckks else None,
            "ckks_wire_ratio": ckks["wire_ratio"] if ckks else None,
            "server_n8_ring16_mb_per_s": main["server_mb_per_s"],
            "keystream_mb_per_s": limits.median("keystream"),
            "memcpy_mb_per_s": limits.median("copy"),
            "regions_64_s": None if options.quick else seconds,
            "sum_exact": exact,
        },
        targets={
            "client_n8_ring16_mb_per_s": ">= 450",
            "ratio_to_flower": ">= 10 if measured",
            "wire_ratio": "<= 0.55",
        },
        rows=rows,
        notes=[
            f"{chunks} chunks of {CHUNK:,} fp32 values, {turns} turns, one thread, CPU time",
            "client: quantise and mask; signed: SHA-256 of what is sent, too",
            f"Flower: {flower['peer']}, ring 2^32, 8 clients"
            if flower
            else "Flower: python -m benchmarks.peers install",
            "CKKS: TenSEAL, N = 8192, encryption and serialisation"
            if ckks
            else "CKKS: not measured; pip install -e '.[he]'",
            "a sync of 64 regions: all of them in turn in one process, chunks of 4,096 values",
        ],
    )


class Limits:
    """What masking cannot be faster than: the keystream into a buffer that is in cache, and a copy of memory."""

    def __init__(self, update: list[Any]) -> None:
        self._update, self._into = update, np.empty_like(update[0])
        self._stream, self._small = Keystream(secrets.token_bytes(KEY_BYTES)), np.empty(1 << 18, np.uint8)
        self._found: dict[str, list[float]] = {"keystream": [], "copy": []}

    def turn(self) -> None:
        """Each once."""
        fill = self._stream.of(0)
        size = sum(values.nbytes for values in self._update)
        self._found["keystream"].append(
            size / spent(lambda: [fill(self._small) for _ in range(size // self._small.size)]) / MB
        )
        self._found["copy"].append(size / spent(self._copied) / MB)

    def _copied(self) -> None:
        for values in self._update:
            np.copyto(self._into, values)

    def median(self, what: str) -> float:
        """MB/s."""
        return statistics.median(self._found[what])


class Subject:
    """One cohort and ring under measurement."""

    def __init__(self, members: int, ring: int, update: list[Any]) -> None:
        self.members, self.ring, self.update = members, ring, update
        self.codec: Codec = CODECS.parse({"type": "fixed", "ring": ring}).build()
        keys = tuple(secrets.token_bytes(KEY_BYTES) for _ in range(members))
        self.masker = Masker(keys[: members // 2 + 1], keys[members // 2 + 1 :])
        self.opening = Masker((), tuple(secrets.token_bytes(KEY_BYTES) for _ in range(members)))
        self.found: dict[str, list[float]] = {"client": [], "signed": [], "server": []}
        self.wire = 0
        self.turn()  # compiles what has to be compiled
        self.found = {key: [] for key in self.found}

    def turn(self) -> None:
        """Client and aggregator, once over all chunks."""
        size, sent = 4 * CHUNK * len(self.update), []

        def client() -> None:
            for chunk, values in enumerate(self.update):
                sent.append(self._masked(chunk, values))

        client_s = spent(client)
        hash_s = spent(lambda: [hashlib.sha256(data).digest() for data in sent])
        self.wire = sum(data.nbytes for data in sent)
        self.found["client"].append(size / client_s / MB)
        self.found["signed"].append(size / (client_s + hash_s) / MB)

        def server() -> None:
            for chunk, data in enumerate(sent):
                total = data.copy()
                for _ in range(self.members - 1):
                    hashlib.sha256(data).digest()
                    self.codec.add(total, data, self._frame(chunk))
                self.opening.apply(total, chunk, self._ring(chunk))

        self.found["server"].append(size * self.members / spent(server) / MB)

    def row(self) -> dict[str, Any]:
        """Medians over turns."""
        return {
            "regions": self.members,
            "ring": self.ring,
            **{f"{key}_mb_per_s": statistics.median(values) for key, values in self.found.items()},
            "wire_ratio": self.wire / (4 * CHUNK * len(self.update)),
        }

    def _masked(self, chunk: int, values: Any) -> Bytes:
        data = self.codec.encode(values, self._frame(chunk))
        self.masker.apply(data, chunk, self._ring(chunk))
        return data

    def _frame(self, chunk: int) -> Frame:
        return Frame(shared=chunk, private=chunk, members=self.members)

    def _ring(self, chunk: int) -> Any:
        return ring_of(self.codec, CHUNK, self._frame(chunk))


def spent(work: Callable[[], Any]) -> float:
    """CPU seconds."""
    began = time.process_time()
    work()
    return time.process_time() - began


def flower_client(millions: float) -> dict[str, Any] | None:
    """Flower's SecAgg+ with 8 clients, in its own environment."""
    python = flower_python()
    if python is None:
        return None
    found: dict[str, Any] = json.loads(
        last_line("flower_secagg", python, [f"--params-millions={millions}", "--clients=8"])
    )
    return found


def ckks_client(numbers: np.random.Generator, batches: int) -> dict[str, Any] | None:
    """TenSEAL's CKKS, N = 8192: 4,096 values a ciphertext, encrypted and serialised."""
    try:
        import tenseal  # noqa: PLC0415 - an optional extra
    except ImportError:
        return None
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 40, 60])
    context.global_scale = 2**40
    values = numbers.normal(0, 1e-3, 4096 * 8 * batches).astype(np.float32)
    sent: list[bytes] = []

    def client() -> None:
        cuts = (values[start : start + 4096] for start in range(0, values.size, 4096))
        sent.extend(tenseal.ckks_vector(context, cut.tolist()).serialize() for cut in cuts)

    seconds = spent(client)
    return {
        "client_mb_per_s": values.nbytes / seconds / MB,
        "wire_ratio": sum(len(text) for text in sent) / values.nbytes,
    }


def whole_sync(count: int, numbers: np.random.Generator) -> tuple[bool, float]:
    """The protocol with `count` regions, keys and journals in files; whether the sum was exact, and the seconds."""
    codec, frame, length = FixedConfig(ring=16).build(), Frame(members=count), 4096
    ring = ring_of(codec, length, frame)
    assert ring is not None
    names, colluders = [f"region-{i:02d}" for i in range(count)], (count - 1) // 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys"
        made = Keyring(path).make(["driver", *names])
        roster = Roster.of(
            Entry(name=key.name, role="driver" if key.name == "driver" else "region", key=key.key)
            for key in made
        )
        driver = Keyring(path).load("driver")
        members = {
            name: Member(
                Keyring(path).load(name), roster, Journal(path / f"{name}.journal", name), lambda _: None
            )
            for name in names
        }
        plan = SyncPlan(
            job="secagg",
            round=1,
            attempt=1,
            roster=roster.hash.hex(),
            cohort=tuple(names),
            threshold=threshold(count, colluders),
            minimum=max(3, colluders + 2),
            model="",
            manifest="",
            update="",
            chunks=(0, 1),
        ).to_wire()
        signed = SignedPlan(plan=plan, signature=driver.sign(PLAN, plan))
        updates = {
            name: codec.encode(numbers.normal(0, 1e-3, length).astype(np.float32), frame) for name in names
        }
        expected = np.zeros_like(updates[names[0]])
        for data in updates.values():
            codec.add(expected, data, frame)
        began = time.perf_counter()
        total = sync_of(Server(signed, roster), signed, members, updates, codec, frame)
        return bool(np.array_equal(total, expected)), time.perf_counter() - began


def sync_of(
    server: Server,
    signed: SignedPlan,
    members: dict[str, Member],
    updates: dict[str, Bytes],
    codec: Codec,
    frame: Frame,
) -> Bytes:
    """All stages of one sync; the opened sum."""
    ring = ring_of(codec, 4096, frame)
    assert ring is not None
    syncs: dict[str, Sync] = {name: member.open(signed) for name, member in members.items()}
    adverts = server.adverts({name: sync.advert() for name, sync in syncs.items()})
    shares = server.shares({name: sync.share(adverts) for name, sync in syncs.items()})
    uploads, total = {}, np.zeros_like(next(iter(updates.values())))
    for name, sync in syncs.items():
        masker, data = sync.receive(server.for_one(name, shares)), updates[name].copy()
        masker.apply(data, 0, ring)
        uploads[name] = sync.upload([hashlib.sha256(data).digest()], masker, 1)
        codec.add(total, data, frame)
    survivors = server.uploads(uploads, 1)
    quorum = server.agreed({name: sync.agree(survivors) for name, sync in syncs.items()})
    opening = server.opening({name: sync.unmask(survivors, quorum) for name, sync in syncs.items()})
    opening.apply(total, 0, ring)
    hashes = [hashlib.sha256(total).digest()]
    result = server.result(hashes, opening)
    confirmed = server.confirmed(result, {name: sync.confirm(result, hashes) for name, sync in syncs.items()})
    for sync in syncs.values():
        sync.accept(result, confirmed)
    return total
