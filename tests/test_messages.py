"""Headers on the wire: there and back, and nothing but their own schema gets through."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.strategies import quick, report
from xcloud.errors import MessageError, XCloudError
from xcloud.messages import (
    Applied,
    CheckpointFile,
    Encryption,
    Folded,
    FoldOrder,
    Message,
    PoolReport,
    PrivacyTerms,
    Progress,
    RankInfo,
    RegionReady,
    RegionReport,
    RestoreOrder,
    RoundPlan,
    RoundSum,
    Saved,
    SaveOrder,
    Source,
    Unmasked,
    UnmaskOrder,
    json_safe,
)

RANK = RankInfo(
    rank=0, node="n1", device="cpu", parameter_bytes=80, optimizer_state_bytes=160, owned_chunks=2
)
FILE = CheckpointFile(path="model/chunks-000000-000001.safetensors", size=2**40, digest="ab12")
SOURCE = Source(name="a", weight=1 / 3, round=4, relayed=False, chunk_bytes=(8, 4), parts=((2, 2),))
COST = Encryption(
    plain_bytes=80_000, sent_bytes=204_800, encrypt_mb_per_s=12.5, decrypt_mb_per_s=28.0, seconds=0.01
)
TERMS = PrivacyTerms(unit="example", sampling_probability=1 / 3, noise_multiplier=1.1)
EXAMPLES: list[Message] = [
    RANK,
    RegionReady(
        region="ü-1",
        privacy=TERMS,
        encryption=COST,
        manifest_digest="aa",
        model_digest="bb",
        parameters=10**12,
        chunks=3,
        data="stdlib",
        train_sequences=7,
        pools=((RANK, RANK), (RANK,)),
        eval_loss=5.5,
        eval_tokens=100,
        layout=((4096, ((0, 4, 8), (64, 2, 3))), (17, ())),
    ),
    RoundPlan(job="j", round=1, attempt=1, model_digest="", manifest_digest="", inner_steps=0),
    Progress(region="a", round=1, step=2, steps=3, tokens=4, loss=None, tokens_per_s=0.0),
    PoolReport(pool=0, tokens=0, loss_sum=0.0, steps=0, compute_s=0.0),
    report("a", 300, chunk_bytes=(4096, 4096, 17)),
    RoundSum(
        round=3,
        attempt=2,
        regions=("a", "b"),
        weights=(1 / 3, 2 / 3),
        chunk_bytes=(8, 4),
        norm=1e-30,
        fold_s=0.1,
    ),
    Applied(region="a", round=3, model_digest="dd", eval_loss=2.5, eval_tokens=9, apply_s=0.1, eval_s=0.2),
    SOURCE,
    FoldOrder(round=3, chunks=(2, 4), sources=(SOURCE, SOURCE)),
    Folded(chunk_bytes=(8, 4), parts=((2, 2),), norms_squared=(0.5, 1e-30)),
    UnmaskOrder(round=3, chunk_bytes=(8, 4), parts=((2, 2),), added=("ab",), taken=("cd", "ef")),
    Unmasked(chunk_bytes=(8, 4), parts=((2, 2),), hashes=("ab", "cd")),
    FILE,
    SaveOrder(round=0, donor=True),
    Saved(region="a", round=2, files=(FILE, FILE)),
    RestoreOrder(round=4, inner_round=None, cursor=17, model_digest="ee", files=(FILE,)),
    TERMS,
    COST,
]
every_message = pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)


def kinds(base: type[Message] = Message) -> Iterator[type[Message]]:
    for kind in base.__subclasses__():
        yield kind
        yield from kinds(kind)


def test_every_message_has_an_example() -> None:
    assert {type(m) for m in EXAMPLES} == {k for k in kinds() if k.__module__ == "xcloud.messages"}


@every_message
def test_there_and_back(message: Message) -> None:
    wire = message.to_wire()
    assert json.loads(wire)["version"] == 1
    again = type(message).from_wire(wire, "us")
    assert again == message
    assert again.to_wire() == wire


NAN = [
    EXAMPLES[1].model_copy(update={"eval_loss": math.nan}),
    EXAMPLES[3].model_copy(update={"loss": math.nan}),
    EXAMPLES[4].model_copy(update={"loss_sum": math.inf}),
    EXAMPLES[5].model_copy(update={"train_loss": math.nan, "update_norm": -math.inf}),
    EXAMPLES[7].model_copy(update={"eval_loss": math.nan, "eval_tokens": 0}),
]


@pytest.mark.parametrize("message", NAN, ids=lambda m: type(m).__name__)
def test_losses_that_do_not_exist_travel(message: Message) -> None:
    """No evaluation in this round, or no training step: NaN, not zero and not null."""
    again = type(message).from_wire(message.to_wire(), "us")
    for name, value in message.model_dump().items():
        found = getattr(again, name)
        if isinstance(value, float) and math.isnan(value):
            assert isinstance(found, float)
            assert math.isnan(found)
        elif isinstance(value, float):
            assert found == value


@quick
@given(st.floats(), st.integers(0, 2**63), st.text(max_size=5), st.none() | st.floats())
def test_any_value_travels(number: float, count: int, name: str, loss: float | None) -> None:
    sent = Progress(region=name, round=1, step=0, steps=1, tokens=count, loss=loss, tokens_per_s=number)
    got = Progress.from_wire(sent.to_wire(), "us")
    assert repr(got) == repr(sent)  # as text, because NaN is not equal to itself


def wire(message: Message, **changes: Any) -> bytes:
    """The header of `message` with some fields set, or (None) left out."""
    fields = {**json.loads(message.to_wire()), **changes}
    return json.dumps({k: v for k, v in fields.items() if k not in changes or v is not None}).encode()


def refusal(kind: type[Message], data: bytes) -> str:
    """What is said about `data` from region eu-1."""
    with pytest.raises(MessageError) as caught:
        kind.from_wire(data, "eu-1")
    assert str(caught.value).startswith(f"{kind.__name__} from 'eu-1': ")
    return str(caught.value).partition("'eu-1': ")[2]


@every_message
def test_an_unknown_field_is_refused(message: Message) -> None:
    assert refusal(type(message), wire(message, extra=1)).startswith("extra: Extra inputs are not permitted")


@every_message
@pytest.mark.parametrize("version", [0, 2, "1", 1.5])
def test_another_version_is_refused(message: Message, version: Any) -> None:
    assert refusal(type(message), wire(message, version=version)).startswith("version: Input should be 1")


@every_message
def test_a_missing_field_is_named(message: Message) -> None:
    required = [name for name, field in type(message).model_fields.items() if field.is_required()]
    for name in required:
        assert refusal(type(message), wire(message, **{name: None})).startswith(f"{name}: Field required")


@every_message
def test_a_truncated_header_is_refused(message: Message) -> None:
    whole = message.to_wire()
    for end in range(0, len(whole), 7):
        assert refusal(type(message), whole[:end]).startswith("header: Invalid JSON")


@every_message
def test_pickle_is_refused(message: Message) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert refusal(type(message), pickle.dumps(json_safe(message), protocol)).startswith("header: ")


@pytest.mark.parametrize("data", [b"null", b"[]", b"1", b'"x"', b"{}", b"[" * 100_000, b"\xff\xfe{}"])
def test_json_that_is_no_header_is_refused(data: bytes) -> None:
    refusal(RoundPlan, data)


def test_a_wrong_value_is_named_by_its_path() -> None:
    ready = EXAMPLES[1]
    pools = json.loads(ready.to_wire())["pools"]
    pools[1][0]["device"] = 3
    assert refusal(RegionReady, wire(ready, pools=pools)).startswith(
        "pools.1.0.device: Input should be a valid string"
    )
    assert refusal(RoundPlan, wire(EXAMPLES[2], round=0)).startswith("round: ")
    assert refusal(RegionReport, wire(EXAMPLES[5], cursor=1e999)).startswith("cursor: ")


def test_a_message_error_is_one_of_ours() -> None:
    assert issubclass(MessageError, XCloudError)


@quick
@given(st.sampled_from(EXAMPLES), st.binary(max_size=200))
def test_random_bytes_raise_nothing_else(message: Message, data: bytes) -> None:
    with pytest.raises(MessageError, match="from 'eu-1': "):
        type(message).from_wire(data, "eu-1")


@quick
@given(st.sampled_from(EXAMPLES), st.data())
def test_damaged_headers_raise_nothing_else(message: Message, data: st.DataObject) -> None:
    """A few bytes replaced: what still parses is a message of the right kind, all else a MessageError."""
    damaged = bytearray(message.to_wire())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        got = type(message).from_wire(bytes(damaged), "eu-1")
    except MessageError:
        return
    assert type(got) is type(message)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@quick
@given(st.sampled_from(EXAMPLES), st.data())
def test_fields_of_any_type_raise_nothing_else(message: Message, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(type(message).model_fields)))
    fields = {**json.loads(message.to_wire()), name: data.draw(json_values)}
    said = ""
    try:
        type(message).from_wire(json.dumps(fields).encode(), "eu-1")
    except MessageError as error:
        said = str(error)
    assert not said or said.startswith(f"{type(message).__name__} from 'eu-1': {name}")


def test_messages_are_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        FILE.size = 3


def test_json_safe_leaves_the_version_out() -> None:
    fields = json_safe(EXAMPLES[6])
    assert fields["regions"] == ["a", "b"]
    assert "version" not in fields
    json.dumps(fields)


def test_bytes_up_and_down_are_exact() -> None:
    assert report("a", 1, chunk_bytes=(4096, 4096, 17)).bytes_up == 8209
    total = EXAMPLES[6]
    assert isinstance(total, RoundSum)
    assert total.bytes_down == 12
