"""Tags: linear over what is added, and off for a sum that is not the sum."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.secure.cohort import Cohort
from xcloud.codecs import FixedConfig, Ring
from xcloud.errors import TamperError
from xcloud.secure.primitives import Keystream
from xcloud.secure.tags import tags_of

KEY = bytes(range(32))


def plainly(values: list[int], weights: Any) -> tuple[int, int]:
    """Both tags in Python's integers."""
    one = sum(value * int(weights[2 * i]) for i, value in enumerate(values))
    two = sum(value * int(weights[2 * i + 1]) for i, value in enumerate(values))
    return one % 2**64, two % 2**64


@settings(deadline=None, max_examples=60)
@given(width=st.integers(2, 16), data=st.data())
def test_tags_are_weighted_sums_of_the_integers(width: int, data: Any) -> None:
    count = data.draw(st.integers(1, 40))
    limit = (1 << (width - 1)) - 1
    values = data.draw(st.lists(st.integers(-limit, limit), min_size=count, max_size=count))
    levels = data.draw(st.lists(st.integers(0, 2**32 - 1), max_size=3))
    bits = sum((value % (1 << width)) << (i * width) for i, value in enumerate(values))
    raw = b"".join(level.to_bytes(4, "little") for level in levels) + bits.to_bytes(
        -(-count * width // 8), "little"
    )
    ring = Ring(len(raw), 4 * len(levels), width)
    weights = np.empty(8 * (len(levels) + count + 8), np.uint8)
    fill = Keystream(KEY).of(5)
    fill(weights[: 8 * len(levels)])
    fill(weights[8 * len(levels) :])
    assert tags_of(np.frombuffer(raw, np.uint8), 5, ring, KEY) == plainly(
        levels + values, weights.view("<u4")
    )


@pytest.mark.parametrize("codec", [FixedConfig(bits=2), FixedConfig(bits=8), FixedConfig(ring=16)], ids=str)
def test_the_tags_of_a_sum_are_the_sum_of_tags(codec: Any) -> None:
    cohort = Cohort(5, 1, codec=codec.build(), tagged=True, lengths=(70_000, 3))
    _, result = cohort.run({"upload": ["r02"]})
    assert result.tags != (0, 0)


@pytest.mark.parametrize("where", [0, -1])
def test_a_sum_altered_by_one_step_for_all_alike_is_not_confirmed(where: int) -> None:
    """Every region is told the same, and header and hashes fit: only tags can say that it is not the sum."""

    def alter(stage: str, received: dict[str, Any], cohort: Cohort) -> None:
        if stage != "result":
            return
        for name, (result, chunks) in received.items():
            chunks[0][where] ^= 1
            hashes = tuple(hashlib.sha256(chunk).digest() for chunk in chunks)
            received[name] = result.model_copy(update={"hashes": hashes}), chunks

    with pytest.raises(TamperError, match="its tags do not fit it"):
        Cohort(4, tamper=alter, tagged=True).run()


def test_every_sync_has_weights_of_its_own() -> None:
    cohort = Cohort(4, tagged=True)
    _, one = cohort.run()
    _, two = cohort.run(signed=cohort.signed(cohort.plan(round=2)))
    assert one.hashes == two.hashes
    assert one.tags != two.tags
