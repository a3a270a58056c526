"""Envelopes of whole merges: real regions' ends, real folders, and nothing but a dictionary between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.merging import LAYOUT, LENGTHS, LocalCrew, Store, job_of, noise
from tests.merging import merge as merge_in_the_clear
from tests.strategies import Array, report
from xcloud.aggregation import Aggregation
from xcloud.config import JobConfig, parse_job
from xcloud.errors import (
    ConfigError,
    ForeignKeyError,
    KeyFileError,
    MessageError,
    RegionError,
    ReplayError,
    SecurityError,
    TamperError,
    TruncatedError,
)
from xcloud.mailing import Mailing
from xcloud.messages import RoundPlan, RoundSum
from xcloud.parts import Bundle, PartReader, PartWriter
from xcloud.region import Pending, Region, _table
from xcloud.secure.identity import Identity, Member, Roster
from xcloud.secure.keyring import Keyring
from xcloud.secure.post import Letter, Post, Posted, PostOrder
from xcloud.secure.primitives import TAG_BYTES
from xcloud.secure.sealed_parts import ChunkSealer, SealedReader
from xcloud.update import Framing, UpdatePath

EVERYTHING = len(LENGTHS)


class World:
    """Regions, folders, and the driver that passes their headers on.

    Attributes:
        offers: what each region has sealed, by name.
        heard: everything that the driver passed on.
    """

    def __init__(self, clouds: Sequence[str] = ("aws", "gcp", "azure"), **changes: Any) -> None:
        self.job, self.store = job_of(clouds, **changes), Store()
        self.regions = {region.name: self._region(region.name) for region in self.job.regions}
        self.crew = LocalCrew(self.job, self.store)
        self.mailing = Mailing(self.job, self.crew)
        self.mailing.parties = self
        self.silent: set[str] = set()
        self.heard: list[bytes] = []
        self.offers: dict[str, tuple[Any, list[Any]]] = {}
        self.change: Callable[[str, bytes], bytes] = lambda name, answer: answer

    def _region(self, name: str) -> Region:
        assert self.job.envelope is not None
        region = Region(self.job, name, name, enforce_labels=False)
        region.post, region.manifest_digest = Post.open(name, self.job.envelope), "layout"
        region._chunk_count = EVERYTHING
        return region

    @property
    def ready(self) -> list[str]:
        return list(self.regions)

    def relay(self, stage: str, number: int, asked: Mapping[str, bytes]) -> dict[str, bytes]:
        answers = {}
        for name, order in asked.items():
            self.heard.append(order)
            if name in self.silent:
                continue
            answers[name] = self.change(name, self.regions[name].secure(stage, number, order))
            self.heard.append(answers[name])
        return answers

    def plan(self, number: int = 1, attempt: int = 1) -> RoundPlan:
        return RoundPlan(
            job="m",
            round=number,
            attempt=attempt,
            model_digest="",
            manifest_digest="layout",
            inner_steps=1,
        )

    def send(self, name: str, update: Array, tokens: int, number: int = 1) -> None:
        """A region encodes, seals and stores an update, and keeps what it has sealed it with."""
        region, plan = self.regions[name], self.plan(number)
        framing = Framing("m", self.job.seed, len(self.regions), name)
        path = UpdatePath(
            self.job.codec.build(), self.job.downlink.build(), framing, LAYOUT, range(EVERYTHING)
        )
        writer, sealing = PartWriter(self.store.put, LENGTHS, 45_000, TAG_BYTES), region._sealing(plan)
        sealer = ChunkSealer(sealing)
        for chunk in range(EVERYTHING):
            delta = writer.slot(LENGTHS[chunk])
            delta[:] = update[5000 * chunk :][: LENGTHS[chunk]]
            writer.add(chunk, sealer.sealed(chunk, path.encode(number, chunk, delta, 1.0)))
        bundle = writer.finish()
        header = report(name, tokens, chunk_bytes=bundle.sizes)
        header = header.model_copy(update={"parts": bundle.parts, "round": number})
        offer = type("Offer", (), {"rows": sealer.rows})
        region.pending = Pending(
            header, list(bundle.handles), sealing=sealing, table=_table(sealing, [offer])
        )
        self.offers[name] = header, list(bundle.handles)

    def send_all(self, number: int = 1) -> None:
        for index, (name, update) in enumerate(zip(self.regions, noise(len(self.regions)), strict=True)):
            self.send(name, update, 100 + 7 * index, number)

    def merge(self, number: int = 1, attempt: int = 1) -> tuple[RoundSum, list[Any]]:
        plan = self.plan(number, attempt)
        reports = [header for header, _ in self.offers.values()]
        rounds = {header.region: header.round for header in reports}
        aggregation = Aggregation(self.job, self.crew)
        chunks = range(EVERYTHING)
        arranged = self.mailing.arrange(plan, chunks, rounds, range(len(aggregation.shares(chunks))))
        updates = [handles for _, handles in self.offers.values()]
        return aggregation.merge(plan, LAYOUT, reports, updates, arranged=arranged)

    def open(self, name: str, total: RoundSum, handles: Sequence[Any]) -> dict[int, bytes]:
        """The merged chunks, as a region's ranks read them."""
        reader = PartReader(self.store.get, Bundle(total.parts, total.chunk_bytes, tuple(handles)))
        return {
            chunk: SealedReader(reader, opening).read(chunk).tobytes()
            for opening in self.regions[name]._openings(total)
            for chunk in opening.route.chunks
        }


def plain_chunks(world: World, **changes: Any) -> dict[int, bytes]:
    """What the same merge gives without envelopes."""
    clouds = [region.cloud for region in world.job.regions]
    store = Store()
    total, handles = merge_in_the_clear(job_of(clouds, envelope=None, **changes), noise(len(clouds)), store)
    reader = PartReader(store.get, Bundle(total.parts, total.chunk_bytes, tuple(handles)))
    return {chunk: reader.read(chunk).tobytes() for chunk in range(EVERYTHING)}


WAYS: list[dict[str, Any]] = [
    {},
    {"aggregation_actors": 3},
    {"codec": {"type": "fixed", "bits": 4}},
    {"codec": {"type": "sparse"}, "downlink": {"type": "e3m0"}},
    {"aggregator": {"type": "median"}},
    {"aggregator": {"type": "multi_krum", "faulty": 1}, "clouds": ("a", "b", "c", "d", "e")},
    {"hierarchy": "cloud", "clouds": ("aws", "aws", "gcp", "gcp")},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_sealed_merge_has_the_bits_of_one_in_the_clear(way: dict[str, Any]) -> None:
    way = dict(way)
    world = World(way.pop("clouds", ("aws", "gcp", "azure")), **way)
    world.send_all()
    total, handles = world.merge()
    expected = plain_chunks(world, **way)
    for name in world.regions:
        assert world.open(name, total, handles) == expected


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_nothing_that_is_stored_or_relayed_shows_an_update_or_the_sum(way: dict[str, Any]) -> None:
    """Neither does what is in between, such as the mean of one cloud's regions; in the clear the same look finds them."""
    way = dict(way)
    clouds = way.pop("clouds", ("aws", "gcp", "azure"))
    world = World(clouds, **way)
    world.send_all()
    world.merge()
    assert not _pieces(world, way) & _windows(world.store, world.heard)
    clear = Store()
    merge_in_the_clear(job_of(clouds, envelope=None, **way), noise(len(clouds)), clear)
    assert _pieces(world, way) <= _windows(clear, [])


def _pieces(world: World, way: dict[str, Any]) -> set[bytes]:
    """The first bytes of some plain chunks: of every region's update, and of the sum."""
    merged = plain_chunks(world, **way)
    found = {merged[chunk][:64] for chunk in (0, 3, 6)}
    for index, name in enumerate(world.regions):
        framing = Framing("m", world.job.seed, len(world.regions), name)
        codecs = world.job.codec.build(), world.job.downlink.build()
        path = UpdatePath(*codecs, framing, LAYOUT, range(EVERYTHING))
        delta = noise(len(world.regions))[index][: LENGTHS[0]].copy()
        found.add(path.encode(1, 0, delta, 1.0).tobytes()[:64])
    return found


def _windows(store: Store, heard: Sequence[bytes]) -> set[bytes]:
    """All 64-byte pieces at chunk boundaries of what was stored, and of what was relayed."""
    whole = [buffer.tobytes() for buffer in store.kept.values()] + list(heard)
    return {data[at : at + 64] for data in whole for at in range(0, len(data), 64)}


def test_an_actor_that_was_restarted_opens_what_was_sealed_before() -> None:
    world = World()
    world.send_all()
    first, handles = world.merge()
    expected = world.open("r0", first, handles)
    world.crew.folders.clear()  # another identity, other keys
    stored = dict(world.store.kept)
    again, handles = world.merge(attempt=2)
    assert world.open("r0", again, handles) == expected
    assert all(world.store.kept[handle] is data for handle, data in stored.items())  # no region sealed anew


def test_updates_of_several_rounds_merge() -> None:
    world = World(buffer={"goal": 2})
    world.send_all(number=3)
    world.send("r1", noise(3)[1], 107, number=5)
    total, handles = world.merge(number=5)
    assert world.open("r2", total, handles).keys() == set(range(EVERYTHING))


def test_a_region_that_sent_nothing_opens_the_sum() -> None:
    world = World()
    world.send_all()
    del world.offers["r2"]
    world.regions["r2"].pending = None
    total, handles = world.merge()
    assert world.open("r2", total, handles) == world.open("r0", total, handles)


# -- what goes wrong ---------------------------------------------------------------------------


def altered(data: Any, at: int) -> Any:
    copy = data.copy()
    copy[at] ^= 1
    return copy


def test_an_altered_chunk_is_told_by_its_region() -> None:
    world = World()
    world.send_all()
    handle = world.offers["r1"][1][0]
    world.store.kept[handle] = altered(world.store.kept[handle], 77)
    with pytest.raises(RegionError, match="not what its sender has signed") as told:
        world.merge()
    assert told.value.region == "r1"


def test_a_chunk_of_another_round_is_told() -> None:
    world = World()
    world.send("r1", noise(3)[1], 107)
    old = world.offers["r1"][1]
    world.send_all(number=2)
    world.offers["r1"] = world.offers["r1"][0], old
    with pytest.raises(RegionError, match="not what its sender has signed") as told:
        world.merge(number=2)
    assert told.value.region == "r1"


@pytest.mark.parametrize("name", ["r0", "r2"])
def test_an_update_without_a_header_is_told(name: str) -> None:
    world = World()
    world.send_all()
    world.silent = {name}
    with pytest.raises(RegionError, match="without an envelope") as told:
        world.merge()
    assert told.value.region == name


def test_a_header_of_another_region_is_told() -> None:
    world = World()
    world.send_all()
    answers: dict[str, Posted] = {}

    def change(name: str, answer: bytes) -> bytes:
        answers[name] = Posted.from_wire(answer, name)
        if name != "r1":
            return answer
        return answers[name].model_copy(update={"letter": answers["r0"].letter}).to_wire()

    world.change = change
    with pytest.raises(RegionError, match="an envelope by r0 came in its place") as told:
        world.merge()
    assert told.value.region == "r1"


def test_a_header_of_an_earlier_merge_is_told() -> None:
    world = World()
    world.send_all()
    kept: dict[str, bytes] = {}

    def record(name: str, answer: bytes) -> bytes:
        return kept.setdefault(name, answer)

    world.change = record
    world.merge()
    with pytest.raises(RegionError, match="sealed for attempt 1; expected 2"):
        world.merge(attempt=2)


def test_an_answer_in_the_name_of_another_is_no_answer() -> None:
    world = World()
    world.send_all()
    stranger = Post(Identity.generate("r0"))
    world.change = lambda name, answer: (
        stranger.answer(PostOrder(job="m", rounds=(1,), attempt=1)).to_wire() if name == "r1" else answer
    )
    with pytest.raises(RegionError, match="without an envelope") as told:
        world.merge()
    assert told.value.region == "r1"


@pytest.mark.parametrize("nonsense", [b"", b"{}", b"\x80\x04K\x01.", b'{"version": 2}'])
def test_nonsense_is_no_answer(nonsense: bytes) -> None:
    world = World()
    world.send_all()
    world.change = lambda name, answer: nonsense if name == "r2" else answer
    with pytest.raises(RegionError, match="without an envelope"):
        world.merge()


def test_a_region_takes_no_sum_but_that_of_an_aggregator_for_this_merge() -> None:
    world = World(aggregation_actors=2)
    world.send_all()
    total, _ = world.merge()
    region = world.regions["r0"]
    with pytest.raises(TruncatedError):
        region._openings(total.model_copy(update={"letters": total.letters[:1]}))
    with pytest.raises(TruncatedError):
        region._openings(total.model_copy(update={"letters": ()}))
    with pytest.raises(TruncatedError):
        region._openings(total.model_copy(update={"letters": (*total.letters, total.letters[0])}))
    with pytest.raises(MessageError):
        region._openings(total.model_copy(update={"letters": ("{}", *total.letters[1:])}))
    with pytest.raises(ReplayError):
        region._openings(total.model_copy(update={"attempt": 2}))
    with pytest.raises(SecurityError):
        region._openings(total.model_copy(update={"round": 2}))
    region.job = region.job.model_copy(update={"name": "other"})
    with pytest.raises(ReplayError):
        region._openings(total)


def test_another_regions_envelope_is_not_taken_for_the_sum() -> None:
    """A region is in everybody's roster; it is no aggregator."""
    world = World()
    world.send_all()
    total, _ = world.merge()
    forger, receiver = world.regions["r1"], world.regions["r0"]
    assert forger.post is not None
    assert forger.pending is not None
    assert forger.pending.sealing is not None
    assert receiver.post is not None
    keys = receiver.post.answer(PostOrder(job="m", rounds=(1,), attempt=1)).keys
    everybody = (
        Member.of(forger.post.identity, "region"),
        Member.of(receiver.post.identity, "region"),
    )
    letter = forger.post.wrap(forger.pending.sealing, forger.pending.table, 1, keys, "region", everybody)
    with pytest.raises(SecurityError):
        receiver._openings(total.model_copy(update={"letters": (letter.to_wire().decode(),)}))


def test_a_round_that_is_over_cannot_be_opened_any_more() -> None:
    world = World()
    world.send_all()
    total, _ = world.merge()
    region = world.regions["r0"]
    assert region.post is not None
    assert region._openings(total)
    region.post.forget(total.round)
    with pytest.raises(ReplayError, match="no key is held"):
        region._openings(total)


def test_every_new_encoding_is_sealed_with_a_secret_of_its_own() -> None:
    world = World()
    region = world.regions["r0"]
    secrets = {region._sealing(world.plan(attempt=attempt)).secret for attempt in (1, 1, 2)}  # type: ignore[union-attr]
    assert len(secrets) == 3


def test_a_chunk_longer_than_any_encoding_is_refused_before_room_is_made_for_it() -> None:
    world = World()
    world.send_all()
    total, _ = world.merge()
    region = world.regions["r0"]
    region.job = region.job.model_copy(update={"chunk_size": 16})
    with pytest.raises(TamperError, match="claims"):
        region._openings(total)


def test_a_cut_or_emptied_merge_is_refused() -> None:
    world = World(aggregation_actors=2)
    world.send_all()
    total, _ = world.merge()
    region = world.regions["r0"]
    cut = {"letters": total.letters[:1], "parts": ((0, 3),), "chunk_bytes": total.chunk_bytes[:3]}
    for changes in (cut, {"parts": (), "chunk_bytes": (), "letters": ()}):
        with pytest.raises(TruncatedError, match="as planned"):
            region._openings(total.model_copy(update=changes))


def test_the_sum_of_an_earlier_attempt_is_refused() -> None:
    world = World()
    world.send_all()
    first, _ = world.merge()
    second, handles = world.merge(attempt=2)
    assert world.open("r0", second, handles)
    with pytest.raises(ReplayError, match="attempt 1, expected 2"):
        world.regions["r0"]._openings(first)


def test_a_region_that_offers_the_aggregators_key_as_its_own_harms_nobody() -> None:
    world = World()
    world.send_all()
    keys: list[Any] = []

    def change(name: str, answer: bytes) -> bytes:
        posted = Posted.from_wire(answer, name)
        if name != "r2":
            return answer
        keys.extend(PostOrder.from_wire(world.heard[-1], "driver").receivers)
        return posted.model_copy(update={"keys": (*keys, *posted.keys)}).to_wire()

    world.change = change
    total, handles = world.merge()
    assert keys
    assert world.open("r0", total, handles) == plain_chunks(world)


def test_a_copied_card_is_its_copiers_fault() -> None:
    """In the default mode a copied key would make the roster of all parties unusable."""
    world = World()
    world.send_all()
    cards: dict[str, Any] = {}

    def change(name: str, answer: bytes) -> bytes:
        posted = Posted.from_wire(answer, name)
        cards[name] = posted.card
        if name != "r1":
            return answer
        stolen = posted.card.model_copy(update={"key": cards["r0"].key})
        return posted.model_copy(update={"card": stolen}).to_wire()

    world.change = change
    with pytest.raises(RegionError, match="without an envelope") as told:
        world.merge()
    assert told.value.region == "r1"


@pytest.mark.parametrize("number", [0, 2])
def test_a_report_of_no_such_round_is_its_regions_fault(number: int) -> None:
    world = World()
    world.send_all()
    header, handles = world.offers["r1"]
    world.offers["r1"] = header.model_copy(update={"round": number}), handles
    with pytest.raises(RegionError, match=f"reports round {number}, expected 1 to 1") as told:
        world.merge()
    assert told.value.region == "r1"


def test_folders_forget_the_keys_of_rounds_that_are_over() -> None:
    world = World()
    for number in (1, 2, 3):
        world.send_all(number)
        world.merge(number)
    post = world.crew.folder(0)._post
    assert post is not None
    assert [round for _, round in post._keys] == [3]


def test_a_sum_that_a_region_has_missed_opens_with_the_company_of_its_merge() -> None:
    world = World(buffer={"goal": 2})
    world.send_all(1)
    first, handles = world.merge(1)
    expected = world.open("r0", first, handles)
    world.crew.folders.clear()  # the actor was restarted: another identity
    world.send_all(2)
    world.merge(2)
    assert world.open("r1", first, handles) == expected


def test_an_update_is_sealed_for_the_root_and_its_own_clouds_actor_alone() -> None:
    world = World(("aws", "aws", "gcp", "gcp"), hierarchy="cloud")
    world.send_all()
    world.merge()
    answers = [Posted.from_wire(data, "region") for data in world.heard[1::2]]
    wraps = {a.card.name: set(a.letter.envelope.wraps) for a in answers if a.letter is not None}
    assert wraps["r0"] == {"aggregator", "aggregator-of-aws"}
    assert wraps["r3"] == {"aggregator", "aggregator-of-gcp"}


def test_a_cloud_whose_actor_could_not_be_named_is_refused() -> None:
    with pytest.raises(ConfigError, match="the cloud 'my cloud' has an aggregator that is named after it"):
        job_of(["my cloud", "my cloud", "gcp"], hierarchy="cloud")
    job_of(["my cloud", "gcp"])


def test_a_key_that_was_just_made_is_not_dropped_for_older_ones() -> None:
    post = Post(Identity.generate("r0"))
    post.answer(PostOrder(job="m", rounds=tuple(range(2, 80)), attempt=1))
    (key,) = post.answer(PostOrder(job="m", rounds=(1,), attempt=1)).keys
    assert key.round == 1


# -- pinned keys -------------------------------------------------------------------------------


def pinned(folder: Path, names: Sequence[str]) -> Path:
    keys = Keyring(folder).make(names)
    role = lambda name: "aggregator" if name.startswith("aggregator") else "region"  # noqa: E731
    Roster.of(Member(name=k.name, role=role(k.name), key=k.key) for k in keys).save(folder / "roster.json")  # type: ignore[arg-type]
    return folder


def test_pinned_keys(tmp_path: Path) -> None:
    folder = pinned(tmp_path / "keys", ["aggregator", "r0", "r1", "r2"])
    world = World(envelope={"keys": str(folder)})
    world.send_all()
    total, handles = world.merge()
    assert world.open("r1", total, handles) == plain_chunks(world)
    orders = [PostOrder.from_wire(data, "driver") for data in world.heard[::2]]
    assert not any(order.introduced for order in orders)


def test_with_pinned_keys_no_introduction_counts(tmp_path: Path) -> None:
    """A driver that puts an aggregator of its own in the place of the pinned one gets nothing sealed for it."""
    folder = pinned(tmp_path / "keys", ["aggregator", "r0", "r1", "r2"])
    world = World(envelope={"keys": str(folder)})
    world.send_all()
    world.crew.folder(0)._post = Post(Identity.generate("aggregator"))
    with pytest.raises(SecurityError, match="aggregator"):
        world.merge()


def test_a_key_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = pinned(tmp_path / "keys", ["aggregator", "r0", "r1", "r2"])
    world = World(envelope={"keys": str(folder)}, aggregation_actors=2)
    world.send_all()
    with pytest.raises(KeyFileError, match="no key of 'aggregator-1' here"):
        world.merge()
    with pytest.raises(KeyFileError, match="no key of 'r3' here"):
        World(("a", "b", "c", "d"), envelope={"keys": str(folder)})


def test_a_region_outside_the_roster_is_not_merged(tmp_path: Path) -> None:
    folder = pinned(tmp_path / "keys", ["aggregator", "r0", "r1", "r2"])
    world = World(envelope={"keys": str(folder)})
    world.send_all()
    sybil = world.regions["r1"]
    sybil.post = Post(Identity.generate("r1"), Roster.load(folder / "roster.json"))
    with pytest.raises(RegionError, match="the roster has") as told:
        world.merge()
    assert told.value.region == "r1"


# -- the job file ------------------------------------------------------------------------------


def job_text(name: str = "r0", **changes: Any) -> str:
    raw = job_of().model_dump(mode="json")
    raw["regions"][0]["name"] = name
    return yaml.safe_dump(raw | changes)


@pytest.mark.parametrize("name", ["driver", "aggregator", "aggregator-1"])
def test_no_region_is_called_like_the_driver_or_an_aggregator(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name!r} is the name of the driver or of an aggregation actor"):
        parse_job(job_text(name))


def test_envelopes_are_on_unless_a_job_says_otherwise() -> None:
    assert job_of().envelope is not None
    off: JobConfig = parse_job(job_text(envelope=None))
    assert off.envelope is None
    with pytest.raises(ConfigError, match="envelope"):
        parse_job(job_text(envelope={"key": "x"}))


def test_letters_are_parsed_or_refused() -> None:
    with pytest.raises(MessageError, match="Letter from 'r0'"):
        Letter.from_wire(b"[]", "r0")
    world = World()
    world.send_all()
    region = world.regions["r0"]
    assert region.post is not None
    assert region.pending is not None
    assert region.pending.sealing is not None
    own = (Member.of(region.post.identity, "region"),)
    sealed = region.pending.sealing, region.pending.table
    with pytest.raises(ForeignKeyError, match="nobody offers a key for round 1"):
        region.post.wrap(*sealed, 1, (), "aggregator", own)


@pytest.mark.parametrize("key", ["00" * 32, "01" + "00" * 31])
def test_a_region_with_a_bad_key_gets_no_sum_and_keeps_none_from_the_others(key: str) -> None:
    """Of low order, which makes the secret known to all; and one that the region has not signed."""
    world = World()
    world.send_all()

    def change(name: str, answer: bytes) -> bytes:
        posted = Posted.from_wire(answer, name)
        if name != "r1":
            return answer
        own = posted.keys[0]
        region = world.regions["r1"].post
        assert region is not None
        signature = own.signature
        if key.startswith("00"):
            fields = ("r1", "m", 1, bytes.fromhex(key))
            signature = region.identity.sign("xcloud/envelope/receiver/v1", *fields).hex()
        bad = own.model_copy(update={"key": key, "signature": signature})
        return posted.model_copy(update={"keys": (bad,)}).to_wire()

    world.change = change
    total, handles = world.merge()
    assert world.open("r0", total, handles) == plain_chunks(world)
    with pytest.raises(ForeignKeyError, match="not for r1"):
        world.open("r1", total, handles)


def test_the_sum_is_not_sealed_over_and_over_with_one_key() -> None:
    world = World()
    world.send_all()
    first, _ = world.merge()
    second, _ = world.merge()
    letters = [Letter.from_wire(total.letters[0].encode(), "a").envelope for total in (first, second)]
    assert letters[0].commitment != letters[1].commitment
    assert np.array_equal(first.chunk_bytes, second.chunk_bytes)
