"""Envelopes: what was sealed is opened, and every attack on the way ends in its error with nothing opened."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import damaged, quick
from xcloud.errors import (
    ForeignKeyError,
    MessageError,
    ReplayError,
    SecurityError,
    TamperError,
    TruncatedError,
)
from xcloud.secure import envelope as module
from xcloud.secure.envelope import (
    ROW_BYTES,
    Envelope,
    Opener,
    ReceiverKey,
    Route,
    Sealer,
    close_envelope,
    new_secret,
    open_envelope,
    table_of,
)
from xcloud.secure.identity import Identity, Member, Role, Roster
from xcloud.secure.primitives import TAG_BYTES, exchange_key

Bytes = npt.NDArray[np.uint8]

NAMES: dict[str, Role] = {"us": "region", "eu": "region", "asia": "region", "sum": "aggregator"}
IDENTITIES = {
    name: Identity(name, Ed25519PrivateKey.from_private_bytes(name.encode().ljust(32, b".")))
    for name in (*NAMES, "sybil")
}
ROSTER = Roster.of(
    Member(name=name, role=role, key=IDENTITIES[name].public.hex()) for name, role in NAMES.items()
)
KEYS = {name: exchange_key(name.encode()) for name in IDENTITIES}
SECRET = bytes(range(32))
LARGEST = 1 << 12
UP = Route(b"p" * 32, "job", 7, 1, "up", "us", range(3, 6))


@dataclass
class Sent:
    """All that is on the wire."""

    envelope: Envelope
    table: bytes
    chunks: dict[int, Bytes]


def receiver_key(name: str, route: Route = UP) -> ReceiverKey:
    return ReceiverKey.of(IDENTITIES[name], route.job, route.round, KEYS[name])


def send(
    route: Route = UP,
    texts: list[bytes] | None = None,
    to: tuple[str, ...] = ("sum",),
    by: str | None = None,
    secret: bytes = SECRET,
) -> Sent:
    texts = [b"chunk %d" % chunk * chunk for chunk in route.chunks] if texts is None else texts
    sealer, chunks = Sealer(route, secret), {}
    for chunk, text in zip(route.chunks, texts, strict=True):
        chunks[chunk] = np.empty(len(text) + TAG_BYTES, np.uint8)
        sealer.seal(chunk, np.frombuffer(text, np.uint8), chunks[chunk])
    table = table_of(route, sealer.rows)
    signer = IDENTITIES[by or route.sender]
    signer = Identity(route.sender, signer._key)
    receivers = [receiver_key(name, route) for name in to]
    return Sent(close_envelope(route, secret, table, signer, receivers, ROSTER), table, chunks)


def opener(sent: Sent, route: Route = UP, receiver: str = "sum", largest: int = LARGEST) -> Opener:
    envelope = Envelope.from_wire(sent.envelope.to_wire(), route.sender)
    return open_envelope(envelope, sent.table, route, receiver, KEYS[receiver], ROSTER, largest)


def receive(sent: Sent, route: Route = UP, receiver: str = "sum") -> list[bytes]:
    opened, texts = opener(sent, route, receiver), []
    for chunk in route.chunks:
        if chunk in sent.chunks:
            out = np.empty(opened.size(chunk), np.uint8)
            opened.open(chunk, sent.chunks[chunk], out)
            texts.append(out.tobytes())
    opened.finish()
    return texts


@given(
    texts=st.lists(st.binary(max_size=70) | st.just(b"") | st.just(b"x"), max_size=6),
    first=st.integers(0, 2**40),
)
@quick
def test_what_is_sealed_is_opened(texts: list[bytes], first: int) -> None:
    route = replace(UP, chunks=range(first, first + len(texts)))
    sent = send(route, texts)
    assert receive(sent, route) == texts
    assert [data.size for data in sent.chunks.values()] == [len(text) + TAG_BYTES for text in texts]


def test_a_large_odd_chunk() -> None:
    text = np.random.default_rng(0).bytes((1 << 20) + 3)
    route = replace(UP, chunks=range(1))
    sent = send(route, [text])
    opened, out = opener(sent, route, largest=len(text)), np.empty(len(text), np.uint8)
    opened.open(0, sent.chunks[0], out)
    assert out.tobytes() == text
    assert text[:64] not in sent.chunks[0].tobytes()


def test_ranks_seal_apart_and_ranks_open_apart() -> None:
    sealers = [Sealer(UP, SECRET) for _ in range(2)]
    rows: dict[int, bytes] = {}
    chunks = {}
    for chunk, rank in zip(UP.chunks, (0, 1, 1), strict=True):
        chunks[chunk] = np.empty(5 + TAG_BYTES, np.uint8)
        sealers[rank].seal(chunk, np.full(5, chunk, np.uint8), chunks[chunk])
    for sealer in reversed(sealers):
        rows |= sealer.rows
    table = table_of(UP, rows)
    envelope = close_envelope(UP, SECRET, table, IDENTITIES["us"], [receiver_key("sum")], ROSTER)
    for part in (range(3, 4), range(4, 6)):
        opened = opener(Sent(envelope, table, chunks))
        for chunk in part:
            out = np.empty(5, np.uint8)
            opened.open(chunk, chunks[chunk], out)
            assert set(out) == {chunk}
        opened.finish(part)
        with pytest.raises(TruncatedError, match=r"us: chunk \d has not come"):
            opened.finish()


def test_a_retry_is_the_same_bytes_and_a_new_secret_is_not() -> None:
    one, again, other = send(), send(), send(secret=new_secret())
    assert one.envelope.to_wire() == again.envelope.to_wire()
    assert one.table == again.table
    for chunk in UP.chunks:
        assert np.array_equal(one.chunks[chunk], again.chunks[chunk])
        assert not np.array_equal(one.chunks[chunk], other.chunks[chunk])
    assert one.envelope.ephemeral != other.envelope.ephemeral


OTHER_ROUTES = [
    replace(UP, plan=b"q" * 32),
    replace(UP, job="other"),
    replace(UP, round=8),
    replace(UP, direction="down"),
    replace(UP, sender="eu"),
    replace(UP, chunks=range(3, 7)),
    replace(UP, chunks=range(2, 6)),
]


@pytest.mark.parametrize("route", OTHER_ROUTES)
def test_one_secret_gives_each_purpose_keys_of_its_own(route: Route) -> None:
    one, other = np.empty(64 + TAG_BYTES, np.uint8), np.empty(64 + TAG_BYTES, np.uint8)
    Sealer(UP, SECRET).seal(4, np.zeros(64, np.uint8), one)
    Sealer(route, SECRET).seal(4, np.zeros(64, np.uint8), other)
    assert not np.array_equal(one[:64], other[:64])  # two keystreams


def test_another_attempt_sends_the_same_chunks_under_a_header_of_its_own() -> None:
    """What was sealed once is not sealed again for a retry; its header is, for whoever receives it then."""
    first, second = send(UP), send(replace(UP, attempt=2))
    assert all(np.array_equal(first.chunks[chunk], second.chunks[chunk]) for chunk in UP.chunks)
    assert first.envelope.wraps != second.envelope.wraps
    with pytest.raises(ReplayError, match="attempt 1; expected 2"):
        opener(first, replace(UP, attempt=2))


def test_a_chunk_is_never_sealed_with_two_contents() -> None:
    """Two texts under one nonce would show their difference, and the key that authenticates."""
    sealer, out = Sealer(UP, SECRET), np.empty(8 + TAG_BYTES, np.uint8)
    sealer.seal(4, np.zeros(8, np.uint8), out)
    before = out.copy()
    sealer.seal(4, np.zeros(8, np.uint8), out)
    assert np.array_equal(out, before)
    with pytest.raises(ReplayError, match="us: chunk 4 was sealed with other content"):
        sealer.seal(4, np.ones(8, np.uint8), out)
    assert not out.any()


def test_a_chunk_that_was_not_sealed_is_missed() -> None:
    with pytest.raises(TruncatedError, match="us: chunk 3 was not sealed; expected 3 chunks"):
        table_of(UP, {4: bytes(ROW_BYTES), 5: bytes(ROW_BYTES)})


# --- the way down


DOWN = replace(UP, direction="down", sender="sum")


def test_the_way_down_is_sealed_once_for_all() -> None:
    sent = send(DOWN, to=("us", "eu", "asia"))
    texts = [receive(sent, DOWN, name) for name in ("us", "eu", "asia")]
    assert texts == [[b"chunk 3" * 3, b"chunk 4" * 4, b"chunk 5" * 5]] * 3
    alone = send(DOWN, to=("us",))
    assert all(np.array_equal(alone.chunks[chunk], sent.chunks[chunk]) for chunk in DOWN.chunks)


def test_who_is_not_among_the_receivers_cannot_open() -> None:
    sent = send(DOWN, to=("us", "eu"))
    with pytest.raises(ForeignKeyError, match="sum: sealed for eu, us, not for asia"):
        opener(sent, DOWN, "asia")
    with pytest.raises(ForeignKeyError, match="sum: sealed for another key than us's"):
        open_envelope(sent.envelope, sent.table, DOWN, "us", KEYS["asia"], ROSTER, LARGEST)


def test_a_receiver_cannot_send_in_the_senders_name() -> None:
    """`us` has the content key: it seals other chunks with it, under the header that the aggregator has signed."""
    honest = send(DOWN, to=("us", "eu"))
    forged = send(DOWN, texts=[b"x" * 7 * chunk for chunk in DOWN.chunks], to=("us", "eu"), by="us")
    with pytest.raises(ForeignKeyError, match=r"sum: signed by key .*; the roster has .*rotated"):
        opener(forged, DOWN, "eu")
    with pytest.raises(TamperError, match="sum: its table is not what it has signed"):
        opener(Sent(honest.envelope, forged.table, forged.chunks), DOWN, "eu")
    with pytest.raises(TamperError, match="sum: chunk 3 is not what its sender has signed"):
        receive(Sent(honest.envelope, honest.table, forged.chunks), DOWN, "eu")


def test_a_sender_cannot_give_two_receivers_two_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commitment stands before the tag, which a sender can make fit two keys."""
    sent = send(DOWN, to=("us", "eu"))
    other = send(DOWN, to=("eu",), secret=bytes(32))
    envelope = sent.envelope.model_copy(
        update={"ephemeral": other.envelope.ephemeral, "wraps": other.envelope.wraps}
    )
    signature = IDENTITIES["sum"].sign(module.HEADER, *envelope.signed)
    envelope = envelope.model_copy(update={"signature": signature.hex()})
    with pytest.raises(TamperError, match="sum: the content key is not the one that the header commits to"):
        opener(Sent(envelope, sent.table, sent.chunks), DOWN, "eu")


# --- attacks on the wire


def _swapped(sent: Sent) -> None:
    sent.chunks[3], sent.chunks[4] = sent.chunks[4], sent.chunks[3]


def _duplicated(sent: Sent) -> None:
    sent.chunks[5] = sent.chunks[4]


def _cut(sent: Sent) -> None:
    sent.chunks[4] = sent.chunks[4][:-1]


def _emptied(sent: Sent) -> None:
    sent.chunks[4] = sent.chunks[4][:0]


def _longer(sent: Sent) -> None:
    sent.chunks[4] = np.append(sent.chunks[4], np.uint8(0))


def _dropped(sent: Sent) -> None:
    del sent.chunks[5]


def _of_another_round(sent: Sent) -> None:
    sent.chunks[4] = send(replace(UP, round=6)).chunks[4]


def _of_another_region(sent: Sent) -> None:
    sent.chunks[4] = send(replace(UP, sender="eu")).chunks[4]


def _table_cut(sent: Sent) -> None:
    sent.table = sent.table[:-ROW_BYTES]


def _table_longer(sent: Sent) -> None:
    sent.table += bytes(ROW_BYTES)


def _table_swapped(sent: Sent) -> None:
    rows = [sent.table[at : at + ROW_BYTES] for at in range(0, len(sent.table), ROW_BYTES)]
    sent.table = b"".join(reversed(rows))


@pytest.mark.parametrize(
    ("attack", "error", "problem"),
    [
        (_swapped, TamperError, "came as chunk 3, but is chunk 4"),
        (_duplicated, TamperError, "came as chunk 5, but is chunk 4"),
        (_cut, TruncatedError, "chunk 4 has 43 bytes; expected 44"),
        (_emptied, TruncatedError, "chunk 4 has 0 bytes; expected 44"),
        (_longer, TamperError, "chunk 4 is not what its sender has signed"),
        (_dropped, TruncatedError, "chunk 5 has not come"),
        (_of_another_round, TamperError, "chunk 4 is not what its sender has signed"),
        (_of_another_region, TamperError, "chunk 4 is not what its sender has signed"),
        (_table_cut, TruncatedError, "its table has 80 bytes; expected 120"),
        (_table_longer, TamperError, "its table is not what it has signed"),
        (_table_swapped, TamperError, "its table is not what it has signed"),
    ],
)
def test_an_attack_on_chunks_or_table(attack: Callable[[Sent], None], error: type, problem: str) -> None:
    sent = send()
    attack(sent)
    with pytest.raises(error, match=f"^us: {problem}"):
        receive(sent)


@pytest.mark.parametrize("route", OTHER_ROUTES)
def test_a_whole_envelope_for_something_else_is_refused(route: Route) -> None:
    """Replayed from another round, attempt, job, plan or direction; of another region; of other chunks."""
    expected: type[SecurityError] = ReplayError
    if route.sender != UP.sender:
        expected = ForeignKeyError
    elif route.chunks != UP.chunks:
        expected = TruncatedError
    with pytest.raises(expected, match=r"^us: "):
        opener(send(route))


def test_a_chunk_that_comes_again_is_told() -> None:
    sent = send()
    opened, out = opener(sent), np.empty(28, np.uint8)
    opened.open(4, sent.chunks[4], out)
    with pytest.raises(ReplayError, match="us: chunk 4 has come a second time"):
        opened.open(4, sent.chunks[4], out)
    with pytest.raises(TamperError, match="us: no chunk 9 in its envelope"):
        opened.size(9)


def test_a_bad_copy_may_be_sent_for_again() -> None:
    sent = send()
    opened, out = opener(sent), np.zeros(28, np.uint8)
    bad = sent.chunks[4].copy()
    bad[0] ^= 1
    with pytest.raises(TamperError):
        opened.open(4, bad, out)
    assert not out.any()
    opened.open(4, sent.chunks[4], out)
    assert out.tobytes() == b"chunk 4" * 4


@given(data=st.data())
@quick
def test_no_bit_of_a_chunk_or_of_the_table_may_change(data: Any) -> None:
    sent = send()
    where = data.draw(st.sampled_from([*UP.chunks, None]))
    text = bytearray(sent.table if where is None else sent.chunks[where].tobytes())
    bit = data.draw(st.integers(0, 8 * len(text) - 1))
    text[bit // 8] ^= 1 << bit % 8
    if where is None:
        sent.table = bytes(text)
    else:
        sent.chunks[where] = np.frombuffer(bytes(text), np.uint8)
    with pytest.raises(TamperError, match=r"^us: "):
        receive(sent)


def _other(value: Any) -> Any:
    if isinstance(value, dict):
        return {"asia": next(iter(value.values()))}
    if isinstance(value, int):
        return value + 1
    if value in ("up", "down"):
        return "down" if value == "up" else "up"
    last = "1" if value[-1] == "0" else "0"
    return value[:-1] + last


@pytest.mark.parametrize("field", sorted(set(Envelope.model_fields) - {"version"}))
def test_no_field_of_the_header_may_change(field: str) -> None:
    """Nor may a header whose change fits what the receiver expects: the signature covers every field."""
    sent = send()
    altered = sent.envelope.model_copy(update={field: _other(getattr(sent.envelope, field))})
    expected: type[SecurityError] = ForeignKeyError if field in ("sender", "signer") else TamperError
    with pytest.raises(expected, match=r"^us: "):
        opener(Sent(altered, sent.table, sent.chunks))
    if field not in ("sender", "signer"):
        with pytest.raises(TamperError, match=r"^us: the signature on xcloud/envelope/header/v1"):
            opener(Sent(altered, sent.table, sent.chunks), altered.route)


def test_a_sybil_and_a_rotated_key_are_told() -> None:
    with pytest.raises(ForeignKeyError, match="'sybil' is not in the roster"):
        opener(send(replace(UP, sender="sybil")), replace(UP, sender="sybil"))
    with pytest.raises(ForeignKeyError, match=r"us: signed by key .*the roster has .*If it was rotated"):
        opener(send(by="sybil"))


def test_a_senders_false_claims_end_before_anything_is_allocated() -> None:
    """A member of the roster signs a table with huge lengths, or seals what does not open."""
    sent = send()
    table = (1 << 62).to_bytes(8, "big") + sent.table[8:]
    lying = Sent(
        close_envelope(UP, SECRET, table, IDENTITIES["us"], [receiver_key("sum")], ROSTER), table, {}
    )
    with pytest.raises(TamperError, match=f"us: chunk 3 claims {1 << 62} bytes; expected {LARGEST} at most"):
        opener(lying)
    junk = np.ones(44, np.uint8)
    row = (28).to_bytes(8, "big") + hashlib.sha256(junk).digest()
    table = sent.table[:ROW_BYTES] + row + sent.table[2 * ROW_BYTES :]
    envelope = close_envelope(UP, SECRET, table, IDENTITIES["us"], [receiver_key("sum")], ROSTER)
    out = np.ones(28, np.uint8)
    with pytest.raises(TamperError, match="us: chunk 4 does not open"):
        opener(Sent(envelope, table, {})).open(4, junk, out)
    assert not out.any()


def test_a_low_order_point_of_either_side_is_refused() -> None:
    zero = ReceiverKey.of(IDENTITIES["sum"], UP.job, UP.round, KEYS["sum"])
    signature = IDENTITIES["sum"].sign(module.RECEIVER, "sum", UP.job, UP.round, bytes(32))
    zero = zero.model_copy(update={"key": "00" * 32, "signature": signature.hex()})
    sent = send()
    with pytest.raises(SecurityError, match=r"^sum: .*low order"):
        close_envelope(UP, SECRET, sent.table, IDENTITIES["us"], [zero], ROSTER)
    envelope = sent.envelope.model_copy(update={"ephemeral": "00" * 32})
    signature = IDENTITIES["us"].sign(module.HEADER, *envelope.signed)
    envelope = envelope.model_copy(update={"signature": signature.hex()})
    with pytest.raises(SecurityError, match=r"^us: .*low order"):
        opener(Sent(envelope, sent.table, {}))


# --- receivers' keys


def test_a_receivers_key_is_for_one_round_and_signed() -> None:
    key = receiver_key("sum")
    assert ReceiverKey.from_wire(key.to_wire(), "sum").check(ROSTER, "job", 7).hex() == key.key
    with pytest.raises(ReplayError, match="sum: its key is for round 7 of 'job'; expected round 8 of 'job'"):
        key.check(ROSTER, "job", 8)
    with pytest.raises(ReplayError, match="expected round 7 of 'other'"):
        key.check(ROSTER, "other", 7)
    with pytest.raises(ForeignKeyError, match="'sybil' is not in the roster"):
        receiver_key("sybil").check(ROSTER, "job", 7)
    for field in ("name", "job", "round", "key", "signature"):
        value = "eu" if field == "name" else _other(getattr(key, field))
        with pytest.raises(TamperError, match=r"^(sum|eu): the signature on xcloud/envelope/receiver/v1"):
            key.model_copy(update={field: value}).check(ROSTER, "job", 7)


def test_nothing_is_sealed_for_a_key_that_was_swapped() -> None:
    swapped = receiver_key("sum").model_copy(update={"key": receiver_key("eu").key})
    with pytest.raises(TamperError, match=r"^sum: "):
        close_envelope(UP, SECRET, send().table, IDENTITIES["us"], [swapped], ROSTER)


# --- arbitrary bytes

WIRE = send().envelope.to_wire()


@given(wire=st.binary(max_size=200) | damaged(WIRE), table=st.binary(max_size=200) | damaged(send().table))
@quick
def test_arbitrary_bytes_end_in_a_named_error(wire: bytes, table: bytes) -> None:
    with contextlib.suppress(MessageError):
        ReceiverKey.from_wire(wire, "us").check(ROSTER, "job", 7)
    try:
        envelope = Envelope.from_wire(wire, "us")
    except MessageError:
        envelope = send().envelope
    if envelope != send().envelope or table != send().table:
        with pytest.raises(SecurityError, match="us"):
            open_envelope(envelope, table, UP, "sum", KEYS["sum"], ROSTER, LARGEST)


@pytest.mark.parametrize("field", ["round", "attempt", "first", "count"])
def test_numbers_that_fit_nowhere_are_no_header(field: str) -> None:
    for value in (-1, 1 << 63, 10**30):
        wire = send().envelope.model_copy(update={field: value}).to_wire()
        with pytest.raises(MessageError, match=f"Envelope from 'us': {field}: "):
            Envelope.from_wire(wire, "us")
    largest = send().envelope.model_copy(update={field: (1 << 63) - 1})
    with pytest.raises(TamperError, match=r"^us: "):
        opener(Sent(largest, send().table, {}))
