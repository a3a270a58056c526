"""Whatever bytes come where a message of the protocol is expected: a message, or the named error that says from whom."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.secure.cohort import Cohort
from xcloud.errors import MessageError, SecurityError
from xcloud.secure.guard import Guard
from xcloud.secure.messages import (
    Advert,
    Adverts,
    Delivered,
    Opening,
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

MESSAGES = [
    SyncPlan, SignedPlan, Advert, Adverts, SealedShares, Delivered, Upload, Survivors, Quorum, Opening, Unmasking,
    Result, Proof,
]  # fmt: skip

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def parsed(message: Any, data: bytes) -> Any:
    """What comes out, or None where it is refused by name."""
    try:
        return message.from_wire(data, "r01")
    except MessageError as error:
        assert str(error).startswith(f"{message.__name__} from 'r01': ")  # noqa: PT017 - either outcome is right
        return None


@pytest.mark.parametrize("message", MESSAGES)
@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_arbitrary_bytes(message: Any, data: bytes) -> None:
    parsed(message, data)


@pytest.fixture(scope="module")
def sent() -> dict[type, bytes]:
    """A real message of each kind."""
    cohort = Cohort(4)
    _, result = cohort.run()
    found: dict[type, bytes] = {type(m): m.to_wire() for _, m in cohort.sent if not isinstance(m, bytes)}
    found[SyncPlan], found[SignedPlan] = cohort.plan().to_wire(), cohort.signed().to_wire()
    found[Result] = result.to_wire()
    survivors = cohort.syncs["r00"]._agreed
    assert survivors is not None
    quorum = Quorum(signatures={"r00": bytes(64)})
    found[Survivors], found[Quorum] = survivors.to_wire(), quorum.to_wire()
    found[Opening] = Opening(survivors=survivors, quorum=quorum).to_wire()
    found[Proof] = Proof(result=result, quorum=quorum).to_wire()
    advert, shares = (
        next(m for _, m in cohort.sent if isinstance(m, kind)) for kind in (Advert, SealedShares)
    )
    found[Adverts], found[Delivered] = (
        Adverts(adverts=(advert,)).to_wire(),
        Delivered(shares=(shares,)).to_wire(),
    )
    assert set(found) == set(MESSAGES)
    return found


@pytest.mark.parametrize("message", MESSAGES)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_real_message_with_a_field_of_another_kind(
    sent: dict[type, bytes], message: Any, data: Any
) -> None:
    fields = json.loads(sent[message])
    key = data.draw(st.sampled_from(sorted(fields)))
    fields[key] = data.draw(JSON)
    parsed(message, json.dumps(fields).encode())


@pytest.mark.parametrize("message", MESSAGES)
def test_a_real_message_cut_short_or_made_longer(sent: dict[type, bytes], message: Any) -> None:
    whole = sent[message]
    assert parsed(message, whole) is not None
    for cut in range(0, len(whole), max(1, len(whole) // 40)):
        assert parsed(message, whole[:cut]) is None
    assert parsed(message, whole + b"}") is None
    fields = json.loads(whole) | {"more": 1}
    assert parsed(message, json.dumps(fields).encode()) is None


def test_lengths_are_bounded_before_they_are_used() -> None:
    cohort = Cohort(4)
    _, result = cohort.run()
    upload = next(m for _, m in cohort.sent if isinstance(m, Upload))
    for fields in (
        json.loads(upload.to_wire()) | {"lanes": "AAAA" * 1000},
        json.loads(upload.to_wire()) | {"signature": "AAAA"},
        json.loads(result.to_wire()) | {"weight": 1 << 64},
        json.loads(result.to_wire()) | {"hashes": ["AAAA"]},
        json.loads(cohort.plan().to_wire()) | {"round": 1 << 63},
        json.loads(cohort.plan().to_wire()) | {"cohort": ["r" * 129]},
    ):
        kind = Upload if "lanes" in fields else Result if "weight" in fields else SyncPlan
        assert parsed(kind, json.dumps(fields).encode()) is None


STAGES = st.sampled_from(["open", "share", "receive", "agree", "unmask"])


@settings(max_examples=100, deadline=None)
@given(stages=st.lists(st.tuples(STAGES, st.binary(max_size=60)), max_size=4))
def test_a_region_that_is_asked_nonsense_in_any_order_refuses(stages: list[tuple[str, bytes]]) -> None:
    cohort = COHORT
    guard = Guard(cohort.members["r00"], {"r00": 1.0})
    for stage, data in stages:
        with pytest.raises((MessageError, SecurityError)):
            guard.answer(stage, 1, data)


COHORT = Cohort(4)
