"""Masked merges between driver and regions, with real keys, journals and folders, and without Ray."""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.merging import LAYOUT, LocalCrew, Store, encodings, job_of, noise
from tests.strategies import report
from xcloud.aggregation import Aggregation
from xcloud.config import JobConfig
from xcloud.errors import MessageError, PolicyError, RegionError, SecurityError
from xcloud.manifest import ChunkLayout
from xcloud.masking import MaskedAggregation
from xcloud.messages import RestoreOrder, RoundPlan, RoundSum
from xcloud.parts import Bundle, PartWriter
from xcloud.region import Region
from xcloud.secure.local import make_keys, open_driver, open_guard
from xcloud.secure.messages import SyncPlan
from xcloud.secure.policy import PrivacyFacts
from xcloud.secure.settings import SecureConfig
from xcloud.update import Framing, UpdatePath, room


class Adding:
    """Folders in this process."""

    def __init__(self, job: JobConfig, store: Store) -> None:
        self.job, self.store, self.restarts = job, store, 0
        self.restart()

    def restart(self) -> None:
        self.restarts += 1
        self.aggregation = Aggregation(self.job, LocalCrew(self.job, self.store))

    def add(self, *args: Any) -> Any:
        return self.aggregation.merge(*args)

    def unmask(self, *args: Any) -> Any:
        return self.aggregation.unmask(*args)


class World:
    """Regions with guards, and the wires between them and the driver.

    Attributes:
        faults: `(stage, region)` that fail: `silent` says nothing, `refuse` raises, `garbage` answers nonsense.
        heard: everything that the driver got or sent, as bytes.
    """

    def __init__(
        self, folder: Path, count: int = 4, layout: Sequence[ChunkLayout] = LAYOUT, **changes: Any
    ) -> None:
        clouds = [f"c{i}" for i in range(count)]
        options = {key: changes.pop(key) for key in ("verify", "groups", "scheme") if key in changes}
        secure = SecureConfig(keys=str(folder / "keys"), colluders=0, **options)
        codec = changes.pop("codec", {"type": "fixed", "bits": 8})
        raw = {"codec": codec, "secure_aggregation": secure.model_dump(), **changes}
        self.job = job_of(clouds, **raw)
        self.names = [region.name for region in self.job.regions]
        make_keys(folder / "keys", self.names)
        self.config, self.layout, self.store = secure, tuple(layout), Store()
        self.guards = {
            name: open_guard(
                secure, name, dict.fromkeys(self.names, 1.0), self.job.ring_bits, lambda plan: None
            )
            for name in self.names
        }
        self.adding, self.capacity = Adding(self.job, self.store), 45_000  # bytes of a part: a few chunks
        identity, roster = open_driver(secure)
        self.merging = MaskedAggregation(self.job, self.adding, identity, roster, roster.hash.hex())
        self.faults: dict[tuple[str, str], str] = {}
        self.heard: list[bytes] = []
        self.lost: set[str] = set()
        self.sent: dict[str, tuple[Any, list[Any], Any]] = {}

    @property
    def idle(self) -> list[str]:
        return [name for name in self.names if name not in self.lost]

    def relay(self, stage: str, number: int, asked: Mapping[str, bytes]) -> dict[str, bytes]:
        return self._each(stage, asked, lambda name: self.guards[name].answer(stage, number, asked[name]))

    def confirm(
        self, total: Any, handles: Sequence[Any], result: bytes, names: Sequence[str]
    ) -> dict[str, bytes]:
        found = encodings(self.store, total, handles)
        self.heard.append(result)

        def ask(name: str) -> bytes:
            path, tag = self.path(name), self.guards[name].masker(total.round).tag
            received = [
                path.check(total.round, chunk, np.frombuffer(data, np.uint8), tag)
                for chunk, data in found.items()
            ]
            return self.guards[name].confirm(total.round, result, received)

        return self._each("confirm", names, ask)

    def _each(self, stage: str, names: Any, ask: Callable[[str], bytes]) -> dict[str, bytes]:
        answers = {}
        for name in names:
            fault = self.faults.get((stage, name))
            if isinstance(names, Mapping):
                self.heard.append(names[name])
            if fault == "silent" or name in self.lost:
                continue
            try:
                answers[name] = b'{"version": 1}' if fault == "garbage" else ask(name)
            except (SecurityError, MessageError):
                continue
            self.heard.append(answers[name])
        return answers

    def plan(self, number: int = 1, attempt: int = 1) -> RoundPlan:
        return RoundPlan(
            job=self.job.name,
            round=number,
            attempt=attempt,
            model_digest="",
            manifest_digest="",
            inner_steps=1,
        )

    def path(self, name: str) -> UpdatePath:
        framing = Framing(self.job.name, self.job.seed, len(self.names), name)
        codecs = self.job.coding.build(), self.job.downlink.build()
        return UpdatePath(*codecs, framing, self.layout, range(len(self.layout)))

    def plain(self, name: str, update: Any, number: int = 1) -> list[Any]:
        """A region's encodings before they are masked."""
        path, at, chunks = self.path(name), 0, []
        for chunk, shape in enumerate(self.layout):
            delta = update[at : at + shape.length].copy()
            chunks.append(path.encode(number, chunk, delta, 1.0).copy())
            at += shape.length
        return chunks

    def offer(self, name: str, update: Any, plan: RoundPlan) -> tuple[Any, list[Any]]:
        """What a region sends, in parts of a few chunks."""
        guard, path = self.guards[name], self.path(name)
        masker = guard.spend(plan.round)
        lengths = [shape.length for shape in self.layout]
        rooms = [room(path.codec, length) for length in lengths]
        writer, sealed, at = PartWriter(self.store.put, rooms, self.capacity), [], 0
        for chunk, length in enumerate(lengths):
            delta = writer.slot(length)
            delta[:] = update[at : at + length]
            encoded = path.encode(plan.round, chunk, delta, 1.0)
            encoded, signed = path.protect(plan.round, chunk, encoded, masker)
            sealed.append(signed)
            writer.add(chunk, encoded)
            at += length
        bundle = writer.finish()
        header = report(name, 100, chunk_bytes=bundle.sizes)
        changes = {
            "parts": bundle.parts,
            "round": plan.round,
            "upload": guard.upload(plan.round, sealed).decode(),
        }
        return header.model_copy(update=changes), list(bundle.handles)

    def play(self, updates: Mapping[str, Any], plan: RoundPlan | None = None) -> tuple[Any, list[Any]]:
        """A whole round of these regions."""
        plan = plan or self.plan()
        self.merging.agree(plan, self)
        offers = [self.offer(name, update, plan) for name, update in updates.items()]
        reports, handles = zip(*offers, strict=True)
        self.heard += [header.to_wire() for header in reports]
        return self.merging.merge(plan, self.layout, reports, handles).result()

    def exact(self, updates: Mapping[str, Any], number: int = 1) -> dict[int, bytes]:
        """The total of the encodings in the clear."""
        path, totals = self.path("r0"), {}
        for name, update in updates.items():
            for chunk, data in enumerate(self.plain(name, update, number)):
                if chunk in totals:
                    path.codec.add(totals[chunk], data, path._frame(number, chunk))
                else:
                    totals[chunk] = data
        return {chunk: data.tobytes() for chunk, data in totals.items()}


def updates_of(world: World) -> dict[str, Any]:
    return dict(zip(world.names, noise(len(world.names)), strict=True))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_the_sum_is_opened_and_proved(world: World) -> None:
    updates = updates_of(world)
    total, handles = world.play(updates)
    assert encodings(world.store, total, handles) == world.exact(updates)
    assert total.regions == tuple(world.names)
    assert total.total_share == len(world.names)
    for guard in world.guards.values():
        guard.accept(1, total.proof.encode())


@pytest.mark.parametrize("actors", [1, 3])
@pytest.mark.parametrize(
    "codec", [{"type": "fixed", "bits": 2}, {"type": "random_k", "bits": 4, "fraction": 0.3}]
)
def test_any_codec_on_a_ring_and_any_number_of_actors(tmp_path: Path, actors: int, codec: Any) -> None:
    world = World(tmp_path, codec=codec, aggregation_actors=actors)
    updates = updates_of(world)
    total, handles = world.play(updates)
    assert encodings(world.store, total, handles) == world.exact(updates)


@pytest.mark.parametrize("fault", ["silent", "garbage"])
@pytest.mark.parametrize("stage", ["open", "share", "receive", "agree", "unmask", "confirm"])
def test_a_region_that_fails_at_any_stage_costs_its_own_update_at_most(
    tmp_path: Path, stage: str, fault: str
) -> None:
    world = World(tmp_path)
    world.faults[stage, "r2"] = fault
    updates = updates_of(world)
    plan = world.plan()
    world.merging.agree(plan, world)
    there = {n: u for n, u in updates.items() if n != "r2" or stage in ("agree", "unmask", "confirm")}
    offers = [world.offer(name, update, plan) for name, update in there.items()]
    total, handles = world.merging.merge(plan, LAYOUT, *zip(*offers, strict=True)).result()
    assert encodings(world.store, total, handles) == world.exact(there)
    assert total.regions == tuple(there)


@pytest.mark.parametrize("codec", [{"type": "fixed", "bits": 2}, {"type": "fixed", "ring": 16}])
def test_tags_show_that_the_sum_is_the_sum(tmp_path: Path, codec: Any) -> None:
    world = World(tmp_path, codec=codec, verify=True)
    updates = updates_of(world)
    total, handles = world.play(updates)
    assert encodings(world.store, total, handles) == world.exact(updates)
    honest = world.adding.unmask

    def altered(layout: Any, total: Any, handles: Any, opening: Any) -> Any:
        """An aggregator that tells all regions the same wrong sum, with hashes that fit it."""
        total, handles, _hashes = honest(layout, total, handles, opening)
        for handle in handles:
            wrong = world.store.kept[handle].copy()
            wrong[-70] ^= 1
            world.store.kept[handle] = wrong
        found = encodings(world.store, total, handles)
        return total, handles, [hashlib.sha256(data).digest() for data in found.values()]

    world.adding.unmask = altered  # type: ignore[method-assign]
    with pytest.raises(RegionError, match="0 good signatures on xcloud/confirm/v1"):
        world.play(updates, world.plan(2))


def test_a_region_that_dies_before_its_upload_is_left_out(world: World) -> None:
    updates = updates_of(world)
    plan = world.plan()
    world.merging.agree(plan, world)
    del updates["r1"]
    world.lost.add("r1")
    offers = [world.offer(name, update, plan) for name, update in updates.items()]
    total, handles = world.merging.merge(plan, LAYOUT, *zip(*offers, strict=True)).result()
    assert encodings(world.store, total, handles) == world.exact(updates)


def test_an_upload_altered_in_the_store_is_left_out_before_anything_is_opened(world: World) -> None:
    updates, plan = updates_of(world), world.plan()
    world.merging.agree(plan, world)
    offers = [world.offer(name, update, plan) for name, update in updates.items()]
    handle = offers[1][1][0]
    altered = world.store.kept[handle].copy()
    altered[100] ^= 1
    world.store.kept[handle] = altered
    total, handles = world.merging.merge(plan, LAYOUT, *zip(*offers, strict=True)).result()
    del updates["r1"]
    assert total.regions == tuple(updates)
    assert encodings(world.store, total, handles) == world.exact(updates)


def test_too_few_regions_open_nothing(world: World) -> None:
    for name in ("r1", "r2"):
        world.faults["agree", name] = "silent"
    with pytest.raises(
        RegionError, match=r"the cohort.*2 good signatures on xcloud/agree/v1, expected at least 3"
    ):
        world.play(updates_of(world))
    assert not any(guard._member.memory._given for guard in world.guards.values())  # type: ignore[attr-defined]
    world.faults.clear()
    updates = updates_of(world)
    total, handles = world.play(updates, world.plan(attempt=2))  # the round is tried again with new keys
    assert encodings(world.store, total, handles) == world.exact(updates)


def test_keys_of_too_few_regions_stop_the_round(world: World) -> None:
    for name in ("r1", "r2"):
        world.faults["open", name] = "silent"
    with pytest.raises(SecurityError, match="round 1: 2 good adverts, expected at least 3"):
        world.merging.agree(world.plan(), world)


def test_nothing_is_sent_without_keys(world: World) -> None:
    with pytest.raises(SecurityError, match="round 1: no keys were agreed on, so the update is not sent"):
        world.offer("r0", noise(1)[0], world.plan())


def test_a_driver_that_starts_again_uses_a_later_start(world: World) -> None:
    updates = updates_of(world)
    world.play(updates)
    identity, roster = open_driver(world.config)
    world.merging = MaskedAggregation(world.job, world.adding, identity, roster, roster.hash.hex())
    total, handles = world.play(updates)
    assert encodings(world.store, total, handles) == world.exact(updates)


def test_a_region_of_its_own_policy_stays_out(tmp_path: Path) -> None:
    world = World(tmp_path)
    (tmp_path / "keys" / "r3.policy.yaml").write_text(
        "version: 1\njobs: any\nmodels: any\nminimum_cohort: 5\n"
    )
    world.guards["r3"]._member.memory.close()  # type: ignore[attr-defined]
    world.guards["r3"] = open_guard(
        world.config, "r3", dict.fromkeys(world.names, 1.0), world.job.ring_bits, lambda plan: None
    )
    updates = {name: update for name, update in updates_of(world).items() if name != "r3"}
    total, handles = world.play(updates)
    assert encodings(world.store, total, handles) == world.exact(updates)
    signed = world.merging._signed(world.plan(number=9), world.names).to_wire()
    with pytest.raises(PolicyError, match="minimum_cohort"):
        world.guards["r3"].answer("open", 9, signed)


def test_a_masked_region_stays_out_when_its_privacy_budget_is_spent(tmp_path: Path) -> None:
    world = World(tmp_path)
    rules = "version: 1\njobs: any\nmodels: any\nminimum_cohort: 3\n"
    (tmp_path / "keys" / "r3.policy.yaml").write_text(
        rules + "privacy:\n  unit: example\n  epsilon: 2.5\n  delta: 1.0e-5\n"
    )
    world.guards["r3"]._member.memory.close()  # type: ignore[attr-defined]
    guard = open_guard(
        world.config,
        "r3",
        dict.fromkeys(world.names, 1.0),
        world.job.ring_bits,
        lambda plan: None,
        lambda number: PrivacyFacts("example", 1.0 * number, 1e-5),
    )
    world.merging._start = 1
    for number in (1, 2):
        guard.answer("open", number, world.merging._signed(world.plan(number=number), world.names).to_wire())
    with pytest.raises(PolicyError, match=r"privacy\.epsilon"):
        guard.answer("open", 3, world.merging._signed(world.plan(number=3), world.names).to_wire())


def test_a_region_remembers_over_a_restart(world: World) -> None:
    updates = updates_of(world)
    world.play(updates)
    guard = world.guards["r0"]
    guard._member.memory.close()  # type: ignore[attr-defined]
    world.guards["r0"] = open_guard(
        world.config, "r0", dict.fromkeys(world.names, 1.0), world.job.ring_bits, lambda plan: None
    )
    with pytest.raises(SecurityError, match="a plan is not replayed"):
        world.guards["r0"].answer("open", 1, world.merging._signed(world.plan(), world.names).to_wire())


def test_a_sum_that_was_not_confirmed_is_not_applied(world: World) -> None:
    total, _ = world.play(updates_of(world))
    proof = total.proof.replace('"weight":', '"weight":1')
    with pytest.raises(SecurityError, match="the signature on xcloud/confirm/v1"):
        world.guards["r0"].accept(1, proof.encode())


def test_a_region_that_lies_about_its_weight_ends_the_sync(world: World) -> None:
    """A total of almost nothing would make the mean, which is divided by it, as large as one likes."""
    world.guards["r2"]._weights["r2"] = 1
    with pytest.raises(RegionError, match=r"good signatures on xcloud/confirm/v1, expected at least 3"):
        world.play(updates_of(world))


def test_two_syncs_may_be_open_at_once(world: World) -> None:
    """With overlap a round trains while the one before is merged."""
    updates = updates_of(world)
    first, second = world.plan(1), world.plan(2)
    world.merging.agree(first, world)
    one = [world.offer(name, update, first) for name, update in updates.items()]
    world.merging.agree(second, world)
    total, handles = world.merging.merge(first, LAYOUT, *zip(*one, strict=True)).result()
    two = [world.offer(name, update, second) for name, update in updates.items()]
    assert encodings(world.store, total, handles) == world.exact(updates, 1)
    total, handles = world.merging.merge(second, LAYOUT, *zip(*two, strict=True)).result()
    assert encodings(world.store, total, handles) == world.exact(updates, 2)


def test_driver_and_aggregator_hold_nothing_that_tells_of_one_region(tmp_path: Path) -> None:
    """All that they get, send or keep in a round with a dropout, against what each region really sent."""
    layout = [ChunkLayout(1 << 16) for _ in range(4)]
    world = World(tmp_path, 5, layout, chunk_size=1 << 16, failure={"quorum": 4})
    world.capacity, size = 1 << 22, sum(shape.length for shape in layout)
    updates = {
        name: np.random.default_rng(i).normal(0, 1e-3, size).astype(np.float32)
        for i, name in enumerate(world.names)
    }
    world.faults["agree", "r4"] = "silent"
    plan = world.plan()
    world.merging.agree(plan, world)
    offers = {name: world.offer(name, update, plan) for name, update in updates.items()}
    late = offers.pop("r3")  # its keys were agreed on, its upload came too late, and the aggregator holds it
    world.heard += [header.to_wire() for header, _ in [*offers.values(), late]]
    total, handles = world.merging.merge(plan, world.layout, *zip(*offers.values(), strict=True)).result()
    counted = {name: updates[name] for name in offers}
    assert encodings(world.store, total, handles) == world.exact(counted)

    opened = {id(world.store.kept[handle]) for handle in handles}
    held = [buffer for buffer in world.store.kept.values() if id(buffer) not in opened]
    assert len(held) > len(updates)  # every upload, and the total that is still masked
    path = world.path("r0")
    step = -(-offers["r0"][0].chunk_bytes[0] // 64) * 64

    def read(buffer: Any) -> Any:
        """Whoever knows everything but the keys decodes what lies there."""
        cuts = [buffer[i * step :][: offers["r0"][0].chunk_bytes[0]] for i in range(len(layout))]
        return np.concatenate(
            [path.codec.decode(cut, 1 << 16, path._frame(1, i)) for i, cut in enumerate(cuts)]
        )

    for name, update in updates.items():
        for buffer in held:
            assert abs(np.corrcoef(read(buffer), update)[0, 1]) < 0.01, name
        plain = np.concatenate([np.pad(data, (0, step - data.size)) for data in world.plain(name, update)])
        assert np.corrcoef(read(plain), update)[0, 1] > 0.99  # and would find it, were it there
    for name in world.names:
        guard, text = world.guards[name], b"".join(world.heard)
        secrets = [guard._syncs[1]._self_seed, guard._syncs[1]._mask_seed, guard._syncs[1]._channel]
        secrets += [*guard._maskers[1].added, *guard._maskers[1].taken]
        for secret in secrets:
            assert secret not in text
            assert secret.hex().encode() not in text


# -- regions whose driver or aggregator lies ------------------------------------------------------


def region_of(world: World, name: str) -> Region:
    """A region without ranks behind a guard."""
    region = Region(world.job, name, "tag", False)
    region.guard, region._chunk_count = world.guards[name], len(world.layout)
    return region


def endorsed(world: World, model: str, names: Sequence[str], number: int = 1) -> dict[str, str]:
    return {name: world.guards[name].endorse(number, model).hex() for name in names}


def test_a_model_is_gone_on_from_if_enough_regions_have_endorsed_it(world: World) -> None:
    total, _ = world.play(updates_of(world))
    for name in world.names:
        region_of(world, name)._accept(total)
    model, guard, everybody = "d" * 64, world.guards["r0"], world.names
    guard.check_model("m", 1, model, endorsed(world, model, everybody))
    for bad in ("00" * 64, "nonsense"):  # one bad region keeps nobody from going on
        guard.check_model("m", 1, model, endorsed(world, model, everybody[1:4]) | {"r0": bad})
    lies: list[tuple[Any, ...]] = [
        ("m", 1, model, {}),
        ("m", 1, model, endorsed(world, model, everybody[:2])),
        ("m", 1, "e" * 64, endorsed(world, model, everybody)),
        ("m", 2, model, endorsed(world, model, everybody)),
        ("other", 1, model, endorsed(world, model, everybody)),
        ("m", 1, model, endorsed(world, model, everybody[:2]) | {"driver": "00" * 64}),
        ("m", 1, model, endorsed(world, model, everybody[:2]) | {"r3": "00" * 64}),
        ("m", 1, model, endorsed(world, model, everybody[:2]) | {"r3": "nonsense"}),
    ]
    for lie in lies:
        with pytest.raises(
            SecurityError, match=r"model of round [12]: [02] regions have endorsed it, expected at least 3"
        ):
            guard.check_model(*lie)


def test_no_region_endorses_a_model_of_a_sum_that_it_has_not_accepted(world: World) -> None:
    world.play(updates_of(world))
    with pytest.raises(SecurityError, match="round 1: no sum was accepted"):
        world.guards["r0"].endorse(1, "d" * 64)


def test_a_driver_cannot_restore_a_model_of_its_own(world: World) -> None:
    order = RestoreOrder(round=1, inner_round=None, cursor=0, model_digest="d" * 64, files=())
    region = region_of(world, "r0")
    with pytest.raises(RegionError, match="0 regions have endorsed it, expected at least 3"):
        region.restore(order, "memory://nowhere")


def plan_of(world: World, **changes: Any) -> RoundPlan:
    return world.plan().model_copy(update={"inner_steps": world.job.inner.steps} | changes)


def test_only_the_sum_that_was_signed_is_applied(world: World) -> None:
    total, _ = world.play(updates_of(world))
    lies: list[dict[str, Any]] = [
        {"total_share": total.total_share / 1000},  # the same integers, a thousand times as long
        {"regions": total.regions[:3]},
        {"summed": False},
        {"chunk_bytes": total.chunk_bytes[1:]},
    ]
    for name, lie in zip(world.names, lies, strict=True):
        with pytest.raises(SecurityError, match="the sum's header is not of what the regions have signed"):
            region_of(world, name)._accept(total.model_copy(update=lie))


def test_a_signed_sum_is_applied_with_its_hashes(world: World) -> None:
    total, handles = world.play(updates_of(world))
    found = encodings(world.store, total, handles)
    hashes = region_of(world, "r0")._accept(total)
    assert hashes == tuple(hashlib.sha256(found[chunk]).digest() for chunk in sorted(found))


def test_a_sum_of_no_region_changes_nothing(world: World) -> None:
    total, _ = world.play(updates_of(world))
    region = region_of(world, "r0")
    nothing = RoundSum.of_nothing(world.plan(), None)
    with pytest.raises(SecurityError, match="a sum of no region, where one was to be applied"):
        region._accept(nothing)  # a driver that drops the round by an empty sum
    overlap = region.job.streaming.model_copy(update={"overlap": 1})
    region.job = region.job.model_copy(update={"streaming": overlap})
    assert region._accept(nothing) == ()
    with pytest.raises(SecurityError, match="a sum of no region, where one was to be applied"):
        region._accept(total.model_copy(update={"regions": ()}))


def test_masks_hide_one_update_and_no_second(world: World) -> None:
    """A region is told to discard its update and to make another, which is nothing: what is sent differs by the first."""
    plan = plan_of(world)
    world.merging.agree(plan, world)
    region = region_of(world, "r0")
    region._spend(plan)
    region.discard()
    with pytest.raises(RegionError, match="'r0': round 1: its keys have masked an update already"):
        region.run(plan)


@pytest.mark.parametrize("lie", [{"inner_steps": 0}, {"chunks": (0, 1)}, {"attempt": 2}])
def test_a_region_trains_what_was_signed(world: World, lie: dict[str, Any]) -> None:
    world.merging.agree(plan_of(world), world)
    region = region_of(world, "r0")
    with pytest.raises(RegionError, match=r"but .* is what was signed"):
        region.run(plan_of(world, **lie))
    region._spend(plan_of(world))


def test_a_region_without_keys_fails_alone(world: World) -> None:
    with pytest.raises(RegionError, match="'r0': round 1"):
        region_of(world, "r0").run(plan_of(world))


def test_nobody_but_the_regions_of_the_job_is_in_a_cohort(tmp_path: Path) -> None:
    """The driver's own key, an aggregator's, or a region of another job would be one more colluder."""
    world = World(tmp_path)
    world.merging._start = 1
    with pytest.raises(SecurityError, match="'driver' is driver in the roster; expected region"):
        world.guards["r0"].answer(
            "open", 1, world.merging._signed(world.plan(), ["r0", "r1", "driver"]).to_wire()
        )
    signed = world.merging._signed(world.plan(), ["r0", "r1", "r2"])
    region = region_of(world, "r0")
    stranger = SyncPlan.from_wire(signed.plan, "driver").model_copy(
        update={
            "model": region.model_digest,
            "update": world.job.update_digest,
            "cohort": ("r0", "r1", "elsewhere"),
        }
    )
    with pytest.raises(SecurityError, match=r"its cohort names \['elsewhere'\], no regions of this job"):
        region._check(stranger)


def test_a_driver_cannot_leave_out_the_tags(tmp_path: Path) -> None:
    world = World(tmp_path, verify=True)
    world.merging._start = 1
    world.merging.config = world.config.model_copy(update={"verify": False})
    with pytest.raises(PolicyError, match="leaves out the tags"):
        world.guards["r0"].answer("open", 1, world.merging._signed(world.plan(), world.names).to_wire())


# -- one bad region -------------------------------------------------------------------------------


@pytest.mark.parametrize("lie", [{"upload": "nonsense"}, {"round": 9}, {"share": math.nan}, {"share": -1e9}])
def test_a_nonsensical_report_costs_its_region_at_most(world: World, lie: dict[str, Any]) -> None:
    updates, plan = updates_of(world), world.plan()
    world.merging.agree(plan, world)
    offers = [world.offer(name, update, plan) for name, update in updates.items()]
    header, handles = offers[1]
    offers[1] = header.model_copy(update=lie), handles
    total, handles = world.merging.merge(plan, LAYOUT, *zip(*offers, strict=True)).result()
    if "share" not in lie:
        del updates["r1"]
    assert total.regions == tuple(updates)
    assert encodings(world.store, total, handles) == world.exact(updates)


@pytest.mark.parametrize("told", [b"", b"nonsense", b"-1", b"9" * 400, str((1 << 63) - 2).encode()])
def test_a_region_cannot_use_up_the_starts_of_a_job(world: World, told: bytes) -> None:
    honest = world.relay

    def relay(stage: str, number: int, asked: Mapping[str, bytes]) -> dict[str, bytes]:
        answers = honest(stage, number, asked)
        return answers | {"r1": told} if stage == "start" else answers

    world.relay = relay  # type: ignore[method-assign]
    updates = updates_of(world)
    total, handles = world.play(updates)
    assert encodings(world.store, total, handles) == world.exact(updates)


# -- trying again without new keys, as with overlap -------------------------------------------------


@pytest.mark.parametrize("stage", ["add", "unmask"])
def test_a_merge_that_failed_is_tried_again_with_the_same_keys(world: World, stage: str) -> None:
    """With overlap the regions have gone on: what they have sent is all that there is."""
    updates, plan = updates_of(world), world.plan()
    world.merging.agree(plan, world)
    offers = [world.offer(name, update, plan) for name, update in updates.items()]
    honest = getattr(world.adding, stage)

    def die(*_: Any) -> Any:
        raise RegionError("the aggregator", "its process is gone")

    setattr(world.adding, stage, die)
    with pytest.raises(RegionError, match="its process is gone"):
        world.merging.merge(plan, LAYOUT, *zip(*offers, strict=True)).result()
    setattr(world.adding, stage, honest)
    again = plan.model_copy(update={"attempt": 2})
    total, handles = world.merging.merge(again, LAYOUT, *zip(*offers, strict=True)).result()
    assert encodings(world.store, total, handles) == world.exact(updates)
    assert not world.merging._open


def test_rounds_that_are_never_merged_are_forgotten(world: World) -> None:
    for number in range(1, 12):
        world.merging.agree(world.plan(number), world)
    assert len(world.merging._open) <= 4


def test_a_rank_takes_no_chunk_that_was_not_signed(world: World) -> None:
    total, handles = world.play(updates_of(world))
    worker = importlib.import_module("xcloud.training.worker")  # torch takes its time
    rank = worker.RankWorker(SimpleNamespace(region="r0", hashed=True), world.store)
    rank.path = world.path("r0")
    merged, hashes = (
        Bundle(total.parts, total.chunk_bytes, tuple(handles)),
        region_of(world, "r0")._accept(total),
    )
    for chunk in total.chunks:
        assert rank._opened(total, merged, hashes)(chunk).size == LAYOUT[chunk].length
    altered = world.store.kept[handles[0]].copy()
    altered[100] ^= 1
    world.store.kept[handles[0]] = altered
    with pytest.raises(RegionError, match="'r0': chunk 0 of the sum is not what the regions have signed"):
        rank._opened(total, merged, hashes)(0)


def test_a_models_digest_covers_all_that_regions_have_in_common(world: World) -> None:
    """With other scales from a checkpoint, all regions but one would send zeros, and the sum be that one's update."""
    worker = importlib.import_module("xcloud.training.worker")  # torch takes its time
    rank = worker.RankWorker(SimpleNamespace(region="r0", hashed=True), world.store)
    rank.path, rank.chunks = world.path("r0"), SimpleNamespace(of=lambda values, chunk: values)
    rank.outer_state = {"momentum": np.zeros(4, np.float32)}
    seen = [rank._with_state(0, "d")]
    rank.path.scales[0] = np.ones(2, np.float32)
    seen.append(rank._with_state(0, "d"))
    rank.path.scales[0] = np.full(2, 1e6, np.float32)
    seen.append(rank._with_state(0, "d"))
    rank.outer_state["momentum"][3] = 1
    seen.append(rank._with_state(0, "d"))
    rank._common = np.zeros(4, np.float32)
    seen.append(rank._with_state(0, "d"))
    seen.append(rank._with_state(0, "e"))
    assert len(set(seen)) == len(seen)
    rank.spec.hashed = False
    assert rank._with_state(0, "d") == "d"
