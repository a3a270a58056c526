"""Merges under CKKS between driver and regions, with real keys, journals and TenSEAL, and without Ray."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.merging import LAYOUT, LENGTHS, encodings, job_of
from tests.test_masking import World, plan_of, region_of, updates_of
from xcloud.config import ConfigError
from xcloud.errors import PolicyError, RegionError, SecurityError
from xcloud.manifest import ChunkLayout
from xcloud.messages import RoundSum
from xcloud.parts import Bundle, PartWriter
from xcloud.secure import ckks, local
from xcloud.secure.ckks import CIPHERTEXT, MODULUS, WORD, encrypted_bytes
from xcloud.secure.member import commitment
from xcloud.secure.messages import SyncPlan, Upload
from xcloud.secure.settings import SecureConfig
from xcloud.secure.tags import Sealed
from xcloud.training.spec import Offer

pytest.importorskip("tenseal")

ERROR = 5e-7
"""As in tests/secure/test_ckks.py: of one encryption."""


class Encrypting(World):
    """A `World` whose updates are encrypted."""

    def __init__(self, folder: Path, count: int = 4, **changes: Any) -> None:
        super().__init__(folder, count, codec={"type": "identity"}, scheme="ckks", **changes)
        self.capacity = 3 * CIPHERTEXT

    def opened(self, name: str, total: RoundSum, handles: Sequence[Any]) -> Any:
        """The merged update, as one region decodes it, times the number of regions."""
        worker = importlib.import_module("xcloud.training.worker")  # torch takes its time
        rank = worker.RankWorker(SimpleNamespace(region=name, hashed=True), self.store)
        rank.path = self.path(name)
        merged = Bundle(total.parts, total.chunk_bytes, tuple(handles))
        hashes = region_of(self, name)._accept(total)
        read = rank._opened(total, merged, hashes, (), self.guards[name].masker(total.round).cipher)
        return np.concatenate([read(chunk).copy() for chunk in total.chunks])

    def merge(self, plan: Any, offers: Sequence[Any]) -> tuple[RoundSum, list[Any]]:
        return self.merging.merge(plan, LAYOUT, *zip(*offers, strict=True)).result()


@pytest.fixture
def world(tmp_path: Path) -> Encrypting:
    return Encrypting(tmp_path)


def mean(updates: Mapping[str, Any]) -> Any:
    return np.mean(np.array(list(updates.values()), np.float64), axis=0)


def offers_of(world: Encrypting, updates: Mapping[str, Any], plan: Any = None) -> list[Any]:
    plan = plan or world.plan()
    world.merging.agree(plan, world)
    return [world.offer(name, update, plan) for name, update in updates.items() if name not in world.lost]


def in_text(secret: bytes) -> list[bytes]:
    """How a message would write it, less what its end depends on."""
    return [encode(secret)[:42] for encode in (base64.b64encode, base64.urlsafe_b64encode)]


def damage(world: Encrypting, handle: Any, at: int = 100) -> None:
    wrong = world.store.kept[handle].copy()
    wrong[at] ^= 1
    world.store.kept[handle] = wrong


def test_every_region_ends_with_the_same_sum(world: Encrypting) -> None:
    updates = updates_of(world)
    total, handles = world.play(updates)
    found = [world.opened(name, total, handles) for name in world.names]
    assert np.abs(found[0] - mean(updates)).max() < ERROR
    for other in found[1:]:
        assert other.tobytes() == found[0].tobytes()
    assert total.regions == tuple(world.names)
    assert total.total_share == len(world.names)


@pytest.mark.parametrize("actors", [1, 3])
def test_several_actors_add_the_same_sum(tmp_path: Path, actors: int) -> None:
    world = Encrypting(tmp_path, aggregation_actors=actors)
    updates = updates_of(world)
    total, handles = world.play(updates)
    assert np.abs(world.opened("r1", total, handles) - mean(updates)).max() < ERROR


def test_bytes_are_counted_as_they_are(world: Encrypting) -> None:
    header, handles = offers_of(world, updates_of(world))[0]
    assert header.chunk_bytes == tuple(encrypted_bytes(length) for length in LENGTHS)
    stored = sum(world.store.kept[handle].nbytes for handle in handles)
    assert sum(header.chunk_bytes) <= stored <= sum(header.chunk_bytes) + 64 * len(LENGTHS)


@pytest.mark.parametrize("lost", ["r0", "r2"])
def test_a_region_that_dies_before_its_upload_is_left_out(world: Encrypting, lost: str) -> None:
    """The first by name too: nobody hands out the key alone."""
    updates, plan = updates_of(world), world.plan()
    world.merging.agree(plan, world)
    del updates[lost]
    world.lost.add(lost)
    offers = [world.offer(name, update, plan) for name, update in updates.items()]
    total, handles = world.merge(plan, offers)
    assert total.regions == tuple(updates)
    assert np.abs(world.opened("r1", total, handles) - mean(updates)).max() < ERROR


@pytest.mark.parametrize("stage", ["open", "share", "receive", "agree", "unmask", "confirm"])
def test_a_region_that_fails_at_any_stage_costs_its_own_update_at_most(tmp_path: Path, stage: str) -> None:
    world = Encrypting(tmp_path)
    world.faults[stage, "r2"] = "silent"
    updates, plan = updates_of(world), world.plan()
    world.merging.agree(plan, world)
    there = {n: u for n, u in updates.items() if n != "r2" or stage in ("agree", "unmask", "confirm")}
    total, handles = world.merge(plan, [world.offer(name, update, plan) for name, update in there.items()])
    assert total.regions == tuple(there)
    assert np.abs(world.opened("r0", total, handles) - mean(there)).max() < ERROR


def test_too_few_regions_open_nothing(world: Encrypting) -> None:
    for name in ("r1", "r2"):
        world.faults["agree", name] = "silent"
    with pytest.raises(RegionError, match=r"2 good signatures on xcloud/agree/v1, expected at least 3"):
        world.play(updates_of(world))


def test_driver_and_aggregator_hold_nothing_that_decrypts(world: Encrypting) -> None:
    """All that they get, send or keep in a round with a dropout, against every secret that leads to the key."""
    updates, plan = updates_of(world), world.plan()
    offers = offers_of(world, updates, plan)
    late = offers.pop()
    world.heard += [header.to_wire() for header, _ in [*offers, late]]
    total, _ = world.merge(plan, offers)
    world.heard += [total.to_wire()]
    text = b"\n".join(world.heard)
    held = text + b"".join(buffer.tobytes() for buffer in world.store.kept.values())
    ciphers = {guard.masker(1).cipher for guard in world.guards.values()}
    assert len(ciphers) == 1  # all regions have one key
    secrets = ciphers | {guard._syncs[1]._tag_seed for guard in world.guards.values()}
    secrets |= {guard._syncs[1]._channel for guard in world.guards.values()}
    for secret in secrets:
        assert len(secret) == 32
        for written in (secret, secret.hex().encode(), *in_text(secret)):
            assert written not in held
    # The search finds what is there: a commitment to one of these seeds, and the update, were it sent in the clear.
    sync = world.guards["r0"]._syncs[1]
    assert any(written in text for written in in_text(commitment("tag", sync.hash, "r0", sync._tag_seed)))
    for name, update in updates.items():
        assert update[:4].tobytes() not in held, name


def test_an_upload_altered_in_the_store_is_left_out(world: Encrypting) -> None:
    updates = updates_of(world)
    offers = offers_of(world, updates)
    damage(world, offers[1][1][0])
    total, handles = world.merge(world.plan(), offers)
    del updates["r1"]
    assert total.regions == tuple(updates)
    assert np.abs(world.opened("r0", total, handles) - mean(updates)).max() < ERROR


def test_ciphertexts_that_are_none_are_named_and_left_out(world: Encrypting) -> None:
    """A region signs what it likes: bytes of the right length whose residues are too large, and bytes of a wrong length."""
    updates, plan = updates_of(world), world.plan()
    world.merging.agree(plan, world)
    honest = world.path

    class Nonsense:
        """Encrypts nothing."""

        def __init__(self, path: Any, size: int) -> None:
            self.path, self.codec, self.size = path, path.codec, size

        def encode(self, *args: Any) -> Any:
            return self.path.encode(*args)

        def protect(self, round: int, chunk: int, encoded: Any, masker: Any) -> Any:
            sent, _ = self.path.protect(round, chunk, encoded, masker)
            wrong = np.full(sent.size - self.size, 255, np.uint8)
            return wrong, Sealed(hashlib.sha256(wrong).digest())

    offers = []
    for name, update in updates.items():
        size = {"r1": 0, "r2": WORD}.get(name)
        world.path = honest if size is None else lambda name, size=size: Nonsense(honest(name), size)  # type: ignore[method-assign]
        offers.append(world.offer(name, update, plan))
    world.path = honest  # type: ignore[method-assign]
    with pytest.raises(RegionError, match="2 good uploads, expected at least 3") as raised:
        world.merge(plan, offers)
    assert f"'r1': chunk 0 of its update is malformed: its ciphertexts hold residues of {MODULUS}" in str(
        raised.value
    )
    assert "'r2': chunk 0 of its update (5000 values) has 81915 bytes, expected 81920" in str(raised.value)
    offers = offers_of(world, updates, world.plan(attempt=2))  # and the aggregator is as well as before
    total, handles = world.merge(world.plan(attempt=2), offers)
    assert np.abs(world.opened("r0", total, handles) - mean(updates)).max() < ERROR


def test_a_sum_that_was_altered_is_applied_by_nobody(world: Encrypting) -> None:
    honest = world.adding.unmask

    def altered(*args: Any) -> Any:
        total, handles, hashes = honest(*args)
        damage(world, handles[0])
        return total, handles, hashes

    world.adding.unmask = altered  # type: ignore[method-assign]
    with pytest.raises(RegionError, match="0 good signatures on xcloud/confirm/v1"):
        world.play(updates_of(world))


def test_a_sum_altered_after_it_was_signed_is_applied_by_nobody(world: Encrypting) -> None:
    total, handles = world.play(updates_of(world))
    damage(world, handles[0])
    with pytest.raises(RegionError, match="'r0': chunk 0 of the sum is not what the regions have signed"):
        world.opened("r0", total, handles)


def test_a_region_that_seals_another_part_of_the_key_than_it_committed_to_is_named(world: Encrypting) -> None:
    """Else some regions would encrypt under one key and some under another, and the sum would be noise."""
    plan, honest = world.plan(), world.relay

    def relay(stage: str, number: int, asked: Mapping[str, bytes]) -> dict[str, bytes]:
        if stage == "share":
            world.guards["r1"]._syncs[number]._tag_seed = bytes(32)
        if stage == "receive":
            with pytest.raises(SecurityError, match="'r1' sealed another seed"):
                world.guards["r0"].answer(stage, number, asked["r0"])
        return honest(stage, number, asked)

    world.relay = relay  # type: ignore[method-assign]
    world.merging.agree(plan, world)
    assert world.merging._open[1][0].members == ("r1",)  # every other region refuses
    with pytest.raises(SecurityError, match="no keys were agreed on"):
        world.offer("r0", updates_of(world)["r0"], plan)


def test_a_foreign_key_is_no_party(world: Encrypting) -> None:
    """The aggregator makes an upload in a region's name, with a key of its own."""
    updates = updates_of(world)
    offers = offers_of(world, updates)
    header, handles = offers[1]
    forged = json.loads(header.upload)
    forged["signature"] = json.loads(offers[2][0].upload)["signature"]
    offers[1] = header.model_copy(update={"upload": json.dumps(forged)}), handles
    server = world.merging._open[1][0].server
    total, _ = world.merge(world.plan(), offers)
    assert total.regions == ("r0", "r2", "r3")
    assert "r1: the signature on xcloud/upload/v1 is not by its key" in server.faults["r1"]


def test_a_plan_is_not_replayed(world: Encrypting) -> None:
    world.play(updates_of(world))
    signed = world.merging._signed(world.plan(), world.names).to_wire()
    with pytest.raises(SecurityError, match="a plan is not replayed"):
        world.guards["r0"].answer("open", 1, signed)


def test_one_key_encrypts_one_update(world: Encrypting) -> None:
    world.merging.agree(world.plan(), world)
    world.guards["r0"].spend(1)
    with pytest.raises(SecurityError, match="its keys have masked an update already"):
        world.guards["r0"].spend(1)


def test_a_plan_of_another_scheme_is_refused(world: Encrypting) -> None:
    world.merging._start = 1
    world.merging.config = world.config.model_copy(update={"scheme": "masks"})
    signed = world.merging._signed(world.plan(), world.names).to_wire()
    with pytest.raises(PolicyError, match="its scheme is masks, the job says ckks"):
        world.guards["r0"].answer("open", 1, signed)


def test_a_policy_that_expects_colluders_refuses(tmp_path: Path) -> None:
    world = Encrypting(tmp_path, 8)
    (tmp_path / "keys" / "r3.policy.yaml").write_text("version: 1\njobs: any\nmodels: any\ncolluders: 1\n")
    world.guards["r3"]._member.memory.close()  # type: ignore[attr-defined]
    world.guards["r3"] = local.open_guard(
        world.config, "r3", dict.fromkeys(world.names, 1.0), world.job.ring_bits, lambda plan: None
    )
    world.merging._start = 1
    with pytest.raises(
        PolicyError, match=r"colluders: the plan asks for scheme ckks, with which one colluder"
    ):
        world.guards["r3"].answer("open", 1, world.merging._signed(world.plan(), world.names).to_wire())


def test_a_round_that_is_tried_again_is_encrypted_afresh(world: Encrypting) -> None:
    """Under the new sync's key, which nobody who has the old ciphertexts alone can tell from them."""
    updates = updates_of(world)
    first = offers_of(world, updates)
    old = {name: world.guards[name].masker(1) for name in world.names}
    again = world.plan(attempt=2)
    world.merging.agree(again, world)
    worker, offers = importlib.import_module("xcloud.training.worker"), []
    for name, (header, handles) in zip(updates, first, strict=True):
        rank = worker.RankWorker(SimpleNamespace(region=name, hashed=True), world.store)
        rank.path, rank.chunks = world.path(name), SimpleNamespace(ids=range(len(LAYOUT)))
        rank.manifest = SimpleNamespace(chunk_count=len(LAYOUT))
        rank.writer = PartWriter(world.store.put, [encrypted_bytes(n) // 4 for n in LENGTHS])
        sent = Bundle(header.parts, header.chunk_bytes, tuple(handles))
        offer: Offer = rank.remask(again, sent, old[name], world.guards[name].spend(1))
        upload = world.guards[name].upload(1, offer.sealed)
        changes = {"parts": offer.bundle.parts, "chunk_bytes": offer.bundle.sizes, "upload": upload.decode()}
        offers.append((header.model_copy(update=changes), list(offer.bundle.handles)))
        before, after = (Upload.from_wire(text, name) for text in (header.upload.encode(), upload))
        assert not set(before.hashes) & set(after.hashes)
    total, handles = world.merge(again, offers)
    assert np.abs(world.opened("r0", total, handles) - mean(updates)).max() < 2 * ERROR


def test_a_value_that_the_sum_could_not_carry_is_not_sent(world: Encrypting) -> None:
    plan, updates = world.plan(), updates_of(world)
    world.merging.agree(plan, world)
    for bad in (1e6, float("nan"), float("-inf")):
        path, masker = world.path("r0"), world.guards["r0"].masker(1)
        delta = updates["r0"][:5000].copy()
        delta[17] = bad
        with pytest.raises(RegionError, match=r"'r0'.*secure_aggregation.scheme ckks carries up to"):
            path.protect(1, 0, path.encode(1, 0, delta, 1.0), masker)


# -- jobs -----------------------------------------------------------------------------------------


def job(**changes: Any) -> Any:
    secure = {"scheme": "ckks"} | changes.pop("secure", {})
    return job_of(**{"secure_aggregation": secure} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"secure": {"colluders": 1}}, r"colluders is 1, while scheme ckks"),
        ({"secure": {"verify": True}}, r"verify checks sums .* while scheme ckks"),
        (
            {"codec": {"type": "fixed", "bits": 8}},
            r"scheme is ckks.*codec is 'fixed'; expected codec identity",
        ),
        ({"codec": "bf16"}, r"scheme is ckks.*codec is 'bf16'"),
        ({"downlink": "bf16"}, r"scheme is ckks.*downlink is 'bf16'"),
        ({"aggregator": "median"}, r"scheme is ckks.*aggregator is 'median'; expected aggregator mean"),
        ({"buffer": {"goal": 2}}, r"scheme is ckks.*buffer"),
        ({"hierarchy": "cloud"}, r"hierarchy 'cloud'"),
        ({"secure": {"scheme": "bfv"}}, r"scheme"),
    ],
)
def test_what_does_not_go_together_is_refused_by_its_keys(changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(**changes)


def test_codec_ckks_is_no_codec_of_its_own() -> None:
    """Without keys there is nothing to encrypt under."""
    with pytest.raises(ConfigError, match="codec"):
        job_of(codec="ckks")


def test_a_scheme_makes_other_updates(tmp_path: Path) -> None:
    """So that a region of one scheme refuses the plans of the other."""
    assert job().update_digest != job_of(codec={"type": "identity"}).update_digest
    plan = SyncPlan.model_fields["scheme"]
    assert plan.default == SecureConfig().scheme == "masks"


def test_a_model_that_is_too_large_is_refused_with_its_price() -> None:
    region = region_of(
        SimpleNamespace(job=job(secure={"most_parameters": 10_000}), guards={"r0": None}, layout=()), "r0"
    )  # type: ignore[arg-type]
    large = SimpleNamespace(size=20_000, layout=(ChunkLayout(20_000),))
    with pytest.raises(ConfigError) as raised:
        region._encryption(large)  # type: ignore[arg-type]
    said = str(raised.value)
    assert "'r0': secure_aggregation.scheme ckks is for the updates of adapters" in said
    assert "20,000 parameters would send 0.2 MB for 0.1 MB of fp32" in said
    assert "at most 10,000 parameters (secure_aggregation.most_parameters)" in said
    cost = region._encryption(SimpleNamespace(size=9_000, layout=(ChunkLayout(9_000),)))  # type: ignore[arg-type]
    assert cost is not None
    assert (cost.plain_bytes, cost.sent_bytes) == (36_000, 3 * CIPHERTEXT)
    assert cost.seconds > 0


def test_a_region_without_the_package_says_so_before_it_starts_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ckks.measure.cache_clear()
    monkeypatch.setitem(sys.modules, "tenseal.sealapi", None)
    region = region_of(SimpleNamespace(job=job(envelope=None), guards={"r0": None}, layout=()), "r0")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"pip install 'xcloud\[he\]'"):
        region.start(False)
    assert region.pools == []


def test_plan_names_are_as_in_masked_runs(world: Encrypting) -> None:
    """A region behind a guard trains what was signed, whatever the scheme."""
    world.merging.agree(plan_of(world), world)
    with pytest.raises(RegionError, match=r"but .* is what was signed"):
        region_of(world, "r0").run(plan_of(world, inner_steps=0))


def test_the_sum_that_comes_down_is_encrypted(world: Encrypting) -> None:
    """What the aggregator hands out is no more than it could read itself: nothing."""
    updates = updates_of(world)
    total, handles = world.play(updates)
    for data in encodings(world.store, total, handles).values():
        assert abs(np.frombuffer(data, np.uint8).mean() - 127.5) < 3
