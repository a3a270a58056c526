"""Every attack on a sync ends in a named error; nobody's update is opened, and nothing is lost but what was attacked."""

from __future__ import annotations

import hashlib
import pickle
from typing import Any

import numpy as np
import pytest

from tests.secure.cohort import JOB, Cohort, Key
from xcloud.errors import MessageError, SecurityError
from xcloud.secure import primitives, shamir
from xcloud.secure.masks import Masker
from xcloud.secure.messages import (
    Advert,
    Quorum,
    Result,
    SealedShares,
    SignedPlan,
    Survivors,
    SyncPlan,
    Unmasking,
    Upload,
)
from xcloud.secure.server import Server


def at(stage: str, attack: Any) -> Any:
    """Stand between regions and server, in one stage."""

    def tamper(now: str, sent: dict[str, Any], cohort: Cohort) -> None:
        if now == stage:
            attack(sent, cohort)

    return tamper


def ready(count: int = 4, colluders: int = 1, **more: Any) -> Cohort:
    """A cohort that has come as far as its uploads."""
    cohort = Cohort(count, colluders, **more)
    cohort.run()
    return cohort


def fresh(cohort: Cohort, **plan: Any) -> tuple[Server, dict[str, Any]]:
    """A new plan, up to the adverts."""
    signed = cohort.signed(cohort.plan(**({"round": 2} | plan)))
    syncs = {name: cohort.members[name].open(signed) for name in cohort.names}
    return Server(signed, cohort.roster), syncs


# -- plans ----------------------------------------------------------------------------------


def test_a_plan_signed_by_a_foreign_key_is_refused() -> None:
    cohort = Cohort(4)
    with pytest.raises(SecurityError, match="driver: the signature on xcloud/plan/v1"):
        cohort.run(signed=cohort.signed(by=Key("driver")))


def test_a_plan_altered_after_it_was_signed_is_refused() -> None:
    cohort = Cohort(4)
    signed = cohort.signed()
    other = signed.model_copy(update={"plan": signed.plan.replace(b'"round":1', b'"round":2')})
    assert other.plan != signed.plan
    with pytest.raises(SecurityError, match="driver: the signature"):
        cohort.members["r00"].open(other)


@pytest.mark.parametrize("again", [{}, {"round": 1, "attempt": 1, "minimum": 4}])
def test_a_replayed_plan_is_refused(again: dict[str, Any]) -> None:
    cohort = ready()
    with pytest.raises(SecurityError, match=f"round 1, attempt 1 of '{JOB}' was taken up before"):
        cohort.members["r00"].open(cohort.signed(cohort.plan(**again)))


def test_a_replayed_plan_is_refused_after_a_restart() -> None:
    cohort = ready()
    with pytest.raises(SecurityError, match="taken up before"):
        cohort.member("r00").open(cohort.signed())


def test_a_threshold_that_allows_two_openings_is_refused() -> None:
    cohort = Cohort(4)
    with pytest.raises(SecurityError, match="threshold 2 of 4, expected more than half"):
        cohort.members["r00"].open(cohort.signed(cohort.plan(threshold=2)))


def test_a_plan_without_this_region_is_refused() -> None:
    cohort = Cohort(4)
    with pytest.raises(SecurityError, match="leaves 'r03' out"):
        cohort.members["r03"].open(cohort.signed(cohort.plan(cohort=("r00", "r01", "r02"))))


def test_a_cohort_that_names_a_region_twice_is_no_plan() -> None:
    cohort = Cohort(4)
    raw = cohort.plan().to_wire().replace(b'"r01"', b'"r00"')
    signed = SignedPlan(plan=raw, signature=cohort.driver.sign("xcloud/plan/v1", raw))
    with pytest.raises(MessageError, match=r"SyncPlan from 'driver'.*names a region twice"):
        cohort.members["r00"].open(signed)


# -- keys and shares --------------------------------------------------------------------------


def test_a_swapped_mask_key_is_refused_by_every_region() -> None:
    def swap(sent: dict[str, Any], cohort: Cohort) -> None:
        own = primitives.public_of(primitives.exchange_key(bytes(32)))
        sent["r01"] = sent["r01"].model_copy(update={"mask": own})

    # An honest server leaves the region out; one that passes the key on is caught by the regions.
    cohort = Cohort(5, 1, tamper=at("advert", swap))
    totals, result = cohort.run()
    assert "r01" not in result.names
    assert all(np.array_equal(a, b) for a, b in zip(totals, cohort.exact(result.names), strict=True))
    cohort = Cohort(4)
    _, syncs = fresh(cohort)
    adverts = {name: sync.advert() for name, sync in syncs.items()}
    swap(adverts, cohort)
    with pytest.raises(SecurityError, match="r01: the signature on xcloud/advert/v1"):
        syncs["r00"].share(list(adverts.values()))


def test_a_sybil_outside_the_roster_is_refused() -> None:
    cohort = Cohort(4)
    _, syncs = fresh(cohort)
    adverts = [sync.advert() for sync in syncs.values()]
    sybil = adverts[0].model_copy(update={"name": "sybil"})
    with pytest.raises(SecurityError, match="'sybil', which is not in the cohort"):
        syncs["r00"].share([*adverts, sybil])
    cohort.names.append("sybil")  # the driver plans for it all the same
    signed = cohort.signed(cohort.plan(round=3))
    cohort.names.pop()
    sync = cohort.members["r00"].open(signed)
    stranger = Key("sybil")
    advert = sync.advert().model_copy(update={"name": "sybil"})
    forged = advert.model_copy(
        update={"signature": stranger.sign("xcloud/advert/v1", sync.hash, *advert.fields())}
    )
    others = [cohort.members[n].open(signed).advert() for n in cohort.names[1:]]
    with pytest.raises(SecurityError, match="'sybil' is not in the roster"):
        sync.share([sync.advert(), *others, forged])


def test_one_key_in_two_adverts_is_refused() -> None:
    cohort = Cohort(4)
    _, syncs = fresh(cohort)
    adverts = {name: sync.advert() for name, sync in syncs.items()}
    copied = adverts["r01"].model_copy(update={"channel": adverts["r02"].channel})
    signature = cohort.keys["r01"].sign("xcloud/advert/v1", syncs["r01"].hash, *copied.fields())
    adverts["r01"] = copied.model_copy(update={"signature": signature})
    with pytest.raises(SecurityError, match="the same key"):
        syncs["r00"].share(list(adverts.values()))


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31)])
def test_a_low_order_key_is_refused(point: bytes) -> None:
    cohort = Cohort(4)
    _, syncs = fresh(cohort)
    adverts = {name: sync.advert() for name, sync in syncs.items()}
    weak = adverts["r01"].model_copy(update={"channel": point})
    signature = cohort.keys["r01"].sign("xcloud/advert/v1", syncs["r01"].hash, *weak.fields())
    adverts["r01"] = weak.model_copy(update={"signature": signature})
    with pytest.raises(SecurityError, match=r"r01: its X25519 key .* low order"):
        syncs["r00"].share(list(adverts.values()))


def test_adverts_of_another_sync_are_refused() -> None:
    cohort = Cohort(4)
    _, old = fresh(cohort)
    stale = [sync.advert() for sync in old.values()]
    _, syncs = fresh(cohort, round=3)
    with pytest.raises(SecurityError, match="the signature on xcloud/advert/v1"):
        syncs["r00"].share([syncs["r00"].advert(), *stale[1:]])


def test_shares_altered_on_the_way_do_not_open() -> None:
    def flip(sent: dict[str, Any], cohort: Cohort) -> None:
        message = sent["r00"][0]
        (text,) = message.sealed.values()
        sent["r00"][0] = message.model_copy(update={"sealed": {"r00": bytes([text[0] ^ 1]) + text[1:]}})

    def first_of_others(sent: dict[str, Any], cohort: Cohort) -> None:
        sent["r00"] = [m for m in sent["r00"] if m.name != "r00"]
        flip(sent, cohort)

    with pytest.raises(SecurityError, match="r01: a sealed message does not open"):
        Cohort(4, tamper=at("inbox", first_of_others)).run()


def test_shares_sealed_for_another_region_do_not_open() -> None:
    def misdeliver(sent: dict[str, Any], cohort: Cohort) -> None:
        mine = {m.name: i for i, m in enumerate(sent["r00"])}
        theirs = {m.name: m for m in sent["r02"]}
        sent["r00"][mine["r01"]] = SealedShares(name="r01", sealed={"r00": theirs["r01"].sealed["r02"]})

    with pytest.raises(SecurityError, match="r01: a sealed message does not open"):
        Cohort(4, tamper=at("inbox", misdeliver)).run()


# -- uploads ------------------------------------------------------------------------------------


def test_a_replayed_upload_is_left_out() -> None:
    kept: list[Upload] = []

    def replay(sent: dict[str, Any], cohort: Cohort) -> None:
        if kept:
            sent["r01"] = kept[0]
        kept.append(sent["r01"])

    cohort = Cohort(5, 1, tamper=at("upload", replay))
    cohort.run()
    totals, result = cohort.run(signed=cohort.signed(cohort.plan(round=2)))
    assert result.names == ("r00", "r02", "r03", "r04")
    assert all(np.array_equal(a, b) for a, b in zip(totals, cohort.exact(result.names), strict=True))


@pytest.mark.parametrize("what", ["flipped", "truncated", "reordered", "duplicated"])
def test_chunks_altered_on_the_way_are_refused(what: str) -> None:
    def alter(sent: dict[str, Any], cohort: Cohort) -> None:
        chunks = cohort.masked["r02"]
        if what == "flipped":
            chunks[0][17] ^= 4
        elif what == "truncated":
            chunks[0] = chunks[0][:-1]
        elif what == "reordered":
            chunks[0], chunks[1] = chunks[1], chunks[0]
        else:
            chunks[1] = chunks[0]

    with pytest.raises(SecurityError, match=r"chunk [01] of 'r02' is not what it signed"):
        Cohort(4, tamper=at("upload", alter)).run()


def test_an_upload_of_another_length_is_left_out() -> None:
    def cut(sent: dict[str, Any], cohort: Cohort) -> None:
        sent["r02"] = sent["r02"].model_copy(update={"hashes": sent["r02"].hashes[:-1]})

    cohort = Cohort(5, 1, tamper=at("upload", cut))
    _, result = cohort.run()
    assert "r02" not in result.names


def test_an_upload_in_another_name_is_left_out() -> None:
    def steal(sent: dict[str, Any], cohort: Cohort) -> None:
        sent["r02"] = sent["r03"]

    _, result = Cohort(5, 1, tamper=at("upload", steal)).run()
    assert "r02" not in result.names


def test_a_second_update_is_not_masked_with_the_keys_of_the_first() -> None:
    cohort = ready()
    cohort.updates["r00"][0] = cohort.updates["r00"][0] + np.float32(1e-3)
    with pytest.raises(SecurityError, match="would mask a second update"):
        cohort.mask("r00")


def test_a_weight_beyond_the_plan_is_refused() -> None:
    cohort = ready()
    with pytest.raises(SecurityError, match="weight 1001, expected 0 to 1000"):
        cohort.mask("r00", weight=1001)


# -- survivors ------------------------------------------------------------------------------------


def test_a_split_view_of_the_survivors_opens_nothing() -> None:
    """Half the regions are told that r00 has dropped, to get shares of both its seeds."""

    def split(asked: dict[str, Any], cohort: Cohort) -> None:
        whole = asked["r00"]
        less = Survivors(names=whole.names[1:], roots=whole.roots[1:])
        for name in cohort.names[cohort.count // 2 :]:
            asked[name] = less

    cohort = Cohort(8, 2, tamper=at("survivors", split))
    with pytest.raises(SecurityError, match=r"4 good signatures on xcloud/agree/v1, expected at least 6"):
        cohort.run()
    assert not any(memory.unmasked for memory in cohort.memories.values())


def test_a_second_set_of_survivors_is_not_signed_even_after_a_restart() -> None:
    cohort = ready(5)
    sync = cohort.syncs["r00"]
    agreed = sync._agreed
    assert agreed is not None
    less = Survivors(names=agreed.names[:-1], roots=agreed.roots[:-1])
    with pytest.raises(SecurityError, match="signed other survivors"):
        sync.agree(less)


def test_survivors_that_a_region_did_not_sign_are_not_unmasked() -> None:
    cohort = ready(5)
    agreed = cohort.syncs["r00"]._agreed
    assert agreed is not None
    less = Survivors(names=agreed.names[:-1], roots=agreed.roots[:-1])
    with pytest.raises(SecurityError, match="'r00' did not sign these survivors"):
        cohort.syncs["r00"].unmask(less, Quorum(signatures={}))


def test_too_few_signatures_unmask_nothing() -> None:
    cohort = Cohort(8, 2)
    quorums: list[Quorum] = []
    cohort.tamper = at(
        "agree", lambda sent, _: quorums.append(Quorum(signatures=dict(list(sent.items())[:5])))
    )
    cohort.run()
    agreed = cohort.syncs["r00"]._agreed
    assert agreed is not None
    with pytest.raises(SecurityError, match="5 regions signed xcloud/agree/v1, expected at least 6"):
        cohort.syncs["r00"].unmask(agreed, quorums[0])


def test_a_forged_signature_on_the_survivors_is_refused() -> None:
    cohort = Cohort(4, 1)
    quorums: list[Quorum] = []
    cohort.tamper = at("agree", lambda sent, _: quorums.append(Quorum(signatures=dict(sent))))
    cohort.run()
    agreed = cohort.syncs["r00"]._agreed
    assert agreed is not None
    forged = Quorum(signatures=quorums[0].signatures | {"r03": quorums[0].signatures["r02"]})
    with pytest.raises(SecurityError, match="r03: the signature on xcloud/agree/v1"):
        cohort.syncs["r00"].unmask(agreed, forged)


def test_shares_are_given_once_even_after_a_restart() -> None:
    cohort = Cohort(4, 1)
    quorums: list[Quorum] = []
    cohort.tamper = at("agree", lambda sent, _: quorums.append(Quorum(signatures=dict(sent))))
    cohort.run()
    agreed = cohort.syncs["r00"]._agreed
    assert agreed is not None
    with pytest.raises(SecurityError, match="has given its shares for round 1"):
        cohort.syncs["r00"].unmask(agreed, quorums[0])


def test_a_round_is_not_opened_for_two_sets_of_survivors() -> None:
    """The difference of the two sums would be one region's update."""
    cohort = ready(5)
    with pytest.raises(SecurityError, match="round 1 of 'three-clouds' to other survivors"):
        cohort.run({"upload": ["r02"]}, signed=cohort.signed(cohort.plan(attempt=2)))
    totals, _ = cohort.run(signed=cohort.signed(cohort.plan(start=2)))  # played again from a checkpoint
    assert all(np.array_equal(a, b) for a, b in zip(totals, cohort.exact(cohort.names), strict=True))


def test_a_region_listed_dead_and_alive_is_refused() -> None:
    roots = (bytes(32), bytes(32))
    with pytest.raises(ValueError, match="each once"):
        Survivors(names=("r00", "r00"), roots=roots)

    def both(sent: dict[str, Any], cohort: Cohort) -> None:
        one = sent["r01"]
        sent["r01"] = one.model_copy(update={"dropped": {"r00": one.survivors["r00"]}})

    cohort = Cohort(5, 1, tamper=at("unmask", both))
    totals, _ = cohort.run()  # the others are enough
    assert all(np.array_equal(a, b) for a, b in zip(totals, cohort.exact(cohort.names), strict=True))


def test_survivors_below_the_minimum_are_not_signed() -> None:
    cohort = ready(5)
    sync = cohort.syncs["r01"]
    agreed = sync._agreed
    assert agreed is not None
    with pytest.raises(SecurityError, match="2 survivors, expected at least 4"):
        sync.agree(Survivors(names=agreed.names[:2], roots=agreed.roots[:2]))


def test_survivors_who_never_delivered_shares_are_not_signed() -> None:
    cohort = Cohort(5, 1)
    cohort.run({"share": ["r04"]})
    sync = cohort.syncs["r01"]
    agreed = sync._agreed
    assert agreed is not None
    more = Survivors(names=(*agreed.names, "r04"), roots=(*agreed.roots, bytes(32)))
    with pytest.raises(SecurityError, match=r"survivors \['r04'\] never delivered shares"):
        sync.agree(more)


# -- shares and the sum ---------------------------------------------------------------------------


def spoil(sent: dict[str, Any], cohort: Cohort) -> None:
    """One region's share of r00's seed is wrong by one bit."""
    one = sent["r01"]
    share = one.survivors["r00"]
    sent["r01"] = one.model_copy(
        update={"survivors": one.survivors | {"r00": share[:-1] + bytes([share[-1] ^ 1])}}
    )


def test_a_wrong_share_is_found_out_while_there_is_one_to_spare() -> None:
    cohort = Cohort(5, 1, tamper=at("unmask", spoil))
    totals, _ = cohort.run()
    assert all(np.array_equal(a, b) for a, b in zip(totals, cohort.exact(cohort.names), strict=True))


def test_a_wrong_share_that_cannot_be_done_without_ends_the_sync() -> None:
    cohort = Cohort(5, 1, tamper=at("unmask", spoil))
    with pytest.raises(SecurityError, match="'r00': the shares of its secret give another"):
        cohort.run({"unmask": ["r04"]})


def test_an_aggregate_altered_by_one_step_is_not_confirmed() -> None:
    def alter(received: dict[str, Any], cohort: Cohort) -> None:
        for _, chunks in received.values():
            chunks[0][-1] ^= 1

    with pytest.raises(SecurityError, match="the sum is not what the aggregator says"):
        Cohort(4, tamper=at("result", alter)).run()


def test_two_regions_are_not_given_different_aggregates() -> None:
    """Model inconsistency (arXiv 2111.07380): each gets a sum that fits its own header."""

    def alter(received: dict[str, Any], cohort: Cohort) -> None:
        result, chunks = received["r01"]
        chunks[0][-1] ^= 1
        hashes = tuple(hashlib.sha256(chunk).digest() for chunk in chunks)
        received["r01"] = result.model_copy(update={"hashes": hashes}), chunks

    with pytest.raises(
        SecurityError, match="the signature on xcloud/confirm/v1 is not by its key, or not over this"
    ):
        Cohort(5, 1, tamper=at("result", alter)).run()


def test_a_weight_that_cannot_be_is_not_confirmed() -> None:
    def alter(received: dict[str, Any], cohort: Cohort) -> None:
        for name, (result, chunks) in received.items():
            received[name] = result.model_copy(update={"weight": 1 << 50}), chunks

    with pytest.raises(SecurityError, match="the sum's weight is 1125899906842624"):
        Cohort(4, tamper=at("result", alter)).run()


# -- the same question twice ------------------------------------------------------------------------


def test_shares_are_sealed_once() -> None:
    """A second answer would seal other shares under the same key and nonce."""
    cohort = Cohort(4)
    _, syncs = fresh(cohort)
    adverts = [sync.advert() for sync in syncs.values()]
    syncs["r00"].share(adverts)
    for again in (adverts, adverts[:3]):
        with pytest.raises(SecurityError, match="'r00' was asked for 'share' a second time"):
            syncs["r00"].share(again)


def test_shares_are_received_once() -> None:
    """Else others could join after the keys of the masks were made."""
    cohort = Cohort(4)
    server, syncs = fresh(cohort)
    adverts = [sync.advert() for sync in syncs.values()]
    server.adverts({advert.name: advert for advert in adverts})
    shares = server.shares({name: sync.share(adverts) for name, sync in syncs.items()})
    inbox = server.for_one("r00", shares)
    syncs["r00"].receive(inbox[:3])
    with pytest.raises(SecurityError, match="'r00' was asked for 'receive' a second time"):
        syncs["r00"].receive(inbox[3:])


def test_a_second_sum_is_not_confirmed() -> None:
    """With enough signatures on two sums, each could be applied somewhere (arXiv 2111.07380)."""
    cohort = Cohort(4)
    totals, result = cohort.run()
    hashes = [hashlib.sha256(total).digest() for total in totals]
    signature = cohort.syncs["r00"].confirm(result, hashes)
    assert signature == cohort.syncs["r00"].confirm(result, hashes)
    totals[0][-1] ^= 1
    other = [hashlib.sha256(total).digest() for total in totals]
    with pytest.raises(SecurityError, match="'r00' has signed another sum of this sync before"):
        cohort.syncs["r00"].confirm(result.model_copy(update={"hashes": tuple(other)}), other)


def test_a_sum_is_applied_once() -> None:
    cohort = Cohort(4)
    _, result = cohort.run()
    again = Quorum(
        signatures={
            name: cohort.keys[name].sign("xcloud/confirm/v1", *sync._context(), result.packed())
            for name, sync in cohort.syncs.items()
        }
    )
    with pytest.raises(SecurityError, match="asked for 'accept' a second time"):
        cohort.syncs["r00"].accept(result, again)


def test_a_key_of_low_order_costs_the_region_that_has_sent_it_and_nobody_else() -> None:
    def weaken(sent: dict[str, Any], cohort: Cohort) -> None:
        weak = sent["r01"].model_copy(update={"channel": bytes(32)})
        plan_hash = cohort.syncs["r01"].hash
        signature = cohort.keys["r01"].sign("xcloud/advert/v1", plan_hash, *weak.fields())
        sent["r01"] = weak.model_copy(update={"signature": signature})

    cohort = Cohort(5, 1, tamper=at("advert", weaken))
    totals, result = cohort.run()
    assert result.names == ("r00", "r02", "r03", "r04")
    assert all(np.array_equal(a, b) for a, b in zip(totals, cohort.exact(result.names), strict=True))


# -- bytes that are no message ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "message", [SyncPlan, SignedPlan, Advert, SealedShares, Upload, Survivors, Quorum, Unmasking, Result]
)
def test_pickle_where_a_message_is_expected_is_refused(message: Any) -> None:
    with pytest.raises(MessageError, match=f"{message.__name__} from 'r01'"):
        message.from_wire(pickle.dumps({"name": "r01"}), "r01")


# -- why the checks are there -------------------------------------------------------------------------


def test_without_the_checks_a_split_view_gives_both_secrets_away() -> None:
    """t = n/2 and no consistency round: half the regions give shares of b, the other half of the mask key."""
    seeds = bytes(range(32)), bytes(range(32, 64))
    own, pair = (shamir.split(seed, 4, 8) for seed in seeds)
    told_alive, told_dead = range(1, 5), range(5, 9)
    opened = (
        shamir.Opener(told_alive, 4).open({p: own[p - 1] for p in told_alive}, "r00"),
        shamir.Opener(told_dead, 4).open({p: pair[p - 1] for p in told_dead}, "r00"),
    )
    assert opened == seeds


def test_without_the_self_mask_one_late_upload_would_be_open() -> None:
    """Why b is there: pair masks alone come off once the region is declared dropped."""
    cohort = ready(4, 1)
    masker = cohort.maskers["r00"]
    pairs = Masker(masker.added[1:], masker.taken)
    data, plain = cohort.masked["r00"][0].copy(), cohort.encoded("r00", 0)
    pairs.inverse().apply(data, 0, cohort.ring(0))
    assert not np.array_equal(data, plain)
    Masker((), (masker.added[0],)).apply(data, 0, cohort.ring(0))
    assert np.array_equal(data, plain)
