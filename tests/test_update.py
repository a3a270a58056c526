"""The update path on its own: shares, error feedback and public scales, as a merge sees them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.strategies import Array, built
from xcloud.codecs import CODECS, Bytes
from xcloud.errors import AggregationError
from xcloud.manifest import ChunkLayout
from xcloud.messages import RoundSum
from xcloud.update import Framing, UpdatePath, adds_up

LAYOUT = (ChunkLayout(5000, ((0, 40, 50),)), ChunkLayout(4096), ChunkLayout(37))
OWNED = range(len(LAYOUT))
ADDING = [name for name in CODECS.names if adds_up(CODECS.parse(name).build())]
FED_BACK = [name for name in CODECS.names if CODECS.parse(name).build().feedback]


def path(region: str, codec: Any, owned: range = OWNED, members: int = 3) -> UpdatePath:
    """A region's only rank, or one of several."""
    framing = Framing("job", 7, members, region)
    return UpdatePath(built(codec), CODECS.parse("identity").build(), framing, LAYOUT, owned)


def deltas(seed: int, scale: float = 1e-3) -> list[Array]:
    """One update, chunk by chunk."""
    numbers = np.random.default_rng(seed)
    return [(scale * numbers.standard_normal(c.length)).astype(np.float32) for c in LAYOUT]


def summed(round: int, shares: list[float], regions: tuple[str, ...] = ("a", "b", "c")) -> RoundSum:
    """Header of a total."""
    return RoundSum(
        round=round,
        attempt=1,
        regions=regions,
        weights=(),
        chunk_bytes=(),
        norm=None,
        fold_s=0.0,
        summed=True,
        total_share=sum(shares),
    )


def total_of(encodings: list[Bytes], one: UpdatePath) -> Bytes:
    """As the aggregator adds them."""
    total = encodings[0].copy()
    for other in encodings[1:]:
        one.codec.add(total, other, one.framing.frame(1, 0, LAYOUT[0]))
    return total


@pytest.mark.parametrize("codec", ADDING)
def test_shares_make_a_weighted_mean(codec: str) -> None:
    """Over rounds of a constant update, error feedback and all, the merged updates add up to the weighted mean."""
    shares, rounds = [1.0, 0.5, 0.25], 120
    paths = [path(name, codec) for name in "abc"]
    sent = [deltas(seed) for seed in range(3)]
    mean = [sum(s * d[c] for s, d in zip(shares, sent, strict=True)) / sum(shares) for c in OWNED]
    got = [np.zeros(c.length) for c in LAYOUT]
    for number in range(1, rounds + 1):
        for chunk in OWNED:
            encoded = [
                p.encode(number, chunk, d[chunk].copy(), s)
                for p, d, s in zip(paths, sent, shares, strict=True)
            ]
            total = total_of(encoded, paths[0])
            merged = [p.decode(chunk, total, summed(number, shares)) for p in paths]
            assert all(m.tobytes() == merged[0].tobytes() for m in merged)
            got[chunk] += merged[0]
        for p in paths:
            p.settle()
    for chunk in OWNED:
        off = np.linalg.norm(got[chunk] / rounds - mean[chunk]) / np.linalg.norm(mean[chunk])
        assert off < 0.1, (codec, chunk, off)


@pytest.mark.parametrize("codec", FED_BACK)
def test_an_update_that_was_not_merged_leaves_no_residual(codec: str) -> None:
    one = path("a", codec)
    for chunk, delta in enumerate(deltas(1)):
        one.encode(1, chunk, delta, 1.0)
    one.forget()
    assert not any(np.any(values) for values in one.residual.values())
    for chunk, delta in enumerate(deltas(1)):
        one.encode(1, chunk, delta, 1.0)
    one.settle()
    assert any(np.any(values) for values in one.residual.values())


@pytest.mark.parametrize("codec", CODECS.names)
def test_a_retry_gives_the_same_bytes(codec: str) -> None:
    one, other = path("a", codec), path("a", codec)
    for chunk, delta in enumerate(deltas(2)):
        first = one.encode(3, chunk, delta.copy(), 1.0).tobytes()
        assert one.encode(3, chunk, delta.copy(), 1.0).tobytes() == first
        assert other.encode(3, chunk, delta.copy(), 1.0).tobytes() == first


@pytest.mark.parametrize("codec", CODECS.names)
def test_ranks_share_the_chunks_as_they_like(codec: str) -> None:
    """Bytes do not depend on which rank owns a chunk."""
    whole, parts = path("a", codec), [path("a", codec, range(2)), path("a", codec, range(2, 3))]
    for chunk, delta in enumerate(deltas(4)):
        owner = next(p for p in parts if chunk in p.owned)
        assert (
            owner.encode(1, chunk, delta.copy(), 0.5).tobytes()
            == whole.encode(1, chunk, delta.copy(), 0.5).tobytes()
        )


@pytest.mark.parametrize("codec", FED_BACK)
def test_what_a_checkpoint_keeps_is_all_that_matters(codec: str) -> None:
    """Residual and scale of one path, given to a fresh one: the same bytes from then on."""
    one = path("a", codec)
    for chunk, delta in enumerate(deltas(5)):
        encoded = one.encode(1, chunk, delta, 1.0)
        if adds_up(one.codec):
            one.decode(chunk, encoded.copy(), summed(1, [1.0]))
    one.settle()
    fresh = path("a", codec)
    fresh.restore({c: v.copy() for c, v in one.residual.items()})
    fresh.scales = {c: v.copy() for c, v in one.scales.items()}
    for chunk, delta in enumerate(deltas(6)):
        assert (
            fresh.encode(2, chunk, delta.copy(), 1.0).tobytes()
            == one.encode(2, chunk, delta.copy(), 1.0).tobytes()
        )


@pytest.mark.parametrize("codec", ADDING)
def test_a_region_without_weight_sends_nothing_and_loses_nothing(codec: str) -> None:
    one = path("idle", codec)
    for chunk, delta in enumerate(deltas(8)):
        encoded = one.encode(1, chunk, delta.copy(), 0.0)
        assert not np.any(one.codec.decode(encoded, delta.size, one.framing.frame(1, chunk, LAYOUT[chunk])))


def test_a_total_that_is_not_finite_is_refused() -> None:
    one = path("a", {"type": "random_k", "feedback": 0.0})
    encoded = one.encode(1, 0, np.full(LAYOUT[0].length, np.inf, np.float32), 1.0)
    with pytest.raises(AggregationError, match="round 1: the merged update is not finite in chunk 0"):
        one.decode(0, encoded, summed(1, [1.0]))


@pytest.mark.parametrize("codec", [c for c in ADDING if c in FED_BACK])
def test_what_is_owed_does_not_depend_on_later_shares(codec: str) -> None:
    """All that was sent and all that is still owed are what was meant, each round at its own share."""
    one, wanted, sent = path("a", codec), np.zeros(5000), np.zeros(5000)
    for number, share in enumerate([0.01, 1.0, 0.0, 0.5, 1.0], 1):
        delta = deltas(number)[0]
        wanted += share * delta
        encoded = one.encode(number, 0, delta, share)
        sent += one.decode(0, encoded, summed(number, [1.0], ("a",)))
        one.settle()
    np.testing.assert_allclose(sent + one.residual[0], wanted, atol=1e-7)


@pytest.mark.parametrize("codec", FED_BACK)
def test_a_chunk_that_was_not_encoded_keeps_its_residual(codec: str) -> None:
    """Whatever rounds before it left in buffers."""
    one = path("a", codec)
    for number, merged in ((1, True), (2, True), (3, False)):
        for chunk, delta in enumerate(deltas(number)):
            one.encode(number, chunk, delta, 1.0)
        if merged:
            one.settle()
        else:
            one.forget()
    before = [one.residual[chunk].tobytes() for chunk in OWNED]
    one.encode(4, 0, deltas(4)[0], 1.0)
    one.settle()
    after = [one.residual[chunk].tobytes() for chunk in OWNED]
    assert [a == b for a, b in zip(after, before, strict=True)] == [False, True, True]
