"""Hypothesis strategies for the project's own values: layouts, vectors, reports and headers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from xcloud.codecs import CODECS, Codec, Grid
from xcloud.manifest import Manifest
from xcloud.messages import PoolReport, RegionReport

__all__ = [
    "built",
    "chunk_sizes",
    "damaged",
    "manifests",
    "packed_fields",
    "pieces",
    "quick",
    "reports",
    "shapes",
    "updates",
    "vectors",
]

Array = npt.NDArray[np.float32]

quick = settings(deadline=None, max_examples=40)
"""For every property test: no time limit per example, since CI machines stall."""

chunk_sizes = st.integers(1, 40)

_names = st.text("abcz.09_", min_size=1, max_size=8)
_dims = st.lists(st.integers(1, 7), max_size=3).map(tuple)


def built(settings: Any) -> Codec:
    """A codec, with a grid where it needs one (`privacy.skellam.plan_grid` makes that of a job)."""
    codec = CODECS.parse(settings).build()
    return codec.calibrated(step=1e-5, limit=10_000, noise=None) if isinstance(codec, Grid) else codec


def shapes(min_size: int = 1) -> st.SearchStrategy[list[tuple[str, tuple[int, ...]]]]:
    """Named shapes in any order: scalars, vectors, matrices and more; names are unique."""
    return st.dictionaries(_names, _dims, min_size=min_size, max_size=6).map(lambda d: list(d.items()))


def manifests() -> st.SearchStrategy[Manifest]:
    """Layouts of one to six parameters, most of them cut across chunks, in one to three fragments."""

    def laid_out(named: list[tuple[str, tuple[int, ...]]], chunk_size: int, fragments: int) -> Manifest:
        try:
            return Manifest.of(named, chunk_size, fragments)
        except ValueError:  # too few of them
            return Manifest.of(named, chunk_size)

    return st.builds(laid_out, shapes(), chunk_sizes, st.integers(1, 3))


def vectors(sizes: st.SearchStrategy[int] | None = None, magnitude: float = 1e3) -> st.SearchStrategy[Array]:
    """Finite fp32 vectors; tiny and odd lengths among them."""
    values = st.floats(-magnitude, magnitude, width=32)
    lengths = st.integers(0, 33) if sizes is None else sizes
    return lengths.flatmap(lambda n: hnp.arrays(np.float32, n, elements=values))


@st.composite
def updates(draw: Any, max_regions: int = 5) -> list[Array]:
    """One chunk of each of several regions: fp32 vectors of one length."""
    regions, length = draw(st.integers(1, max_regions)), draw(st.integers(1, 33))
    return [draw(vectors(st.just(length))) for _ in range(regions)]


@st.composite
def pieces(draw: Any, size: int) -> list[slice]:
    """A vector of `size` elements cut into contiguous pieces."""
    cuts = sorted(draw(st.sets(st.integers(1, max(1, size - 1)), max_size=4))) if size > 1 else []
    edges = [0, *cuts, size]
    return [slice(a, b) for a, b in pairwise(edges)]


def packed_fields() -> st.SearchStrategy[list[Any]]:
    """What `secure.primitives.packed` takes: integers, text, bytes, and lists of them."""
    leaf = st.integers(0, 2**64 - 1) | st.text(max_size=4) | st.binary(max_size=4)
    return st.lists(st.recursive(leaf, lambda inner: st.lists(inner, max_size=3), max_leaves=6), max_size=4)


@st.composite
def damaged(draw: Any, data: bytes) -> bytes:
    """A well-formed file with a few bytes changed, put in, left out, or cut off."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(out)))
        out[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(out[: draw(st.integers(0, len(out)))] if draw(st.booleans()) else out)


def report(
    region: str, tokens: int, train_loss: float = 2.0, chunk_bytes: Sequence[int] = (4,)
) -> RegionReport:
    """A region's report about `tokens` tokens."""
    return RegionReport(
        region=region,
        round=1,
        attempt=1,
        tokens=tokens,
        train_loss=train_loss,
        update_norm=1.0,
        cursor=tokens,
        chunk_bytes=tuple(chunk_bytes),
        compute_s=1.0,
        encode_s=0.0,
        pools=(PoolReport(pool=0, tokens=tokens, loss_sum=train_loss, steps=1, compute_s=1.0),),
    )


@st.composite
def reports(draw: Any, count: int | None = None) -> list[RegionReport]:
    """Reports of one to six regions, some of which may have trained on nothing."""
    number = draw(st.integers(1, 6)) if count is None else count
    tokens = draw(st.lists(st.integers(0, 10**9), min_size=number, max_size=number))
    return [report(f"region-{i}", t) for i, t in enumerate(tokens)]
