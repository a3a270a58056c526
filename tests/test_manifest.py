"""The flat layout: chunks, segments and shares are partitions, and its digest tells layouts apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import chunk_sizes, manifests, quick, shapes
from xcloud.manifest import ChunkLayout, Manifest


@quick
@given(manifests())
def test_parameters_lie_end_to_end_in_name_order(manifest: Manifest) -> None:
    names = [spec.name for spec in manifest.parameters]
    assert names == sorted(names) or len(manifest.fragments) > 1
    at = 0
    for spec in manifest.parameters:
        assert spec.offset == at
        assert spec.size == math.prod(spec.shape)
        at += spec.size
    assert manifest.size == at


@quick
@given(manifests())
def test_chunks_partition_the_flat_vector(manifest: Manifest) -> None:
    lengths = [manifest.chunk_length(chunk) for chunk in range(manifest.chunk_count)]
    assert sum(lengths) == manifest.size
    ends = {chunks[-1] for chunks in manifest.fragments if chunks}
    for chunk, length in enumerate(lengths):
        assert 0 < length <= manifest.chunk_size
        assert length == manifest.chunk_size or chunk in ends
    assert [chunk.length for chunk in manifest.layout] == lengths


@quick
@given(manifests())
def test_segments_cover_every_element_once(manifest: Manifest) -> None:
    covered = np.zeros(manifest.size, np.int64)
    for index, spec in enumerate(manifest.parameters):
        chunks = [segment.chunk for segment in manifest.segments[index]]
        assert chunks == sorted(set(chunks))
        for segment in manifest.segments[index]:
            assert segment.parameter == index
            assert segment.length > 0
            assert segment.chunk_start + segment.length <= manifest.chunk_length(segment.chunk)
            in_chunk = manifest.chunk_starts[segment.chunk] + segment.chunk_start
            assert in_chunk == spec.offset + segment.parameter_start
            covered[in_chunk : in_chunk + segment.length] += 1
    assert (covered == 1).all()


@quick
@given(manifests(), st.integers(1, 12))
def test_ranks_share_the_chunks_out(manifest: Manifest, world: int) -> None:
    for fragment, chunks in enumerate(manifest.fragments):
        shares = [manifest.owned(rank, world)[fragment] for rank in range(world)]
        assert [chunk for share in shares for chunk in share] == list(chunks)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@quick
@given(st.data(), shapes(), chunk_sizes)
def test_the_order_given_does_not_matter(
    data: st.DataObject, named: list[tuple[str, tuple[int, ...]]], chunk_size: int
) -> None:
    shuffled = data.draw(st.permutations(named))
    as_lists = [(name, list(shape)) for name, shape in shuffled]
    one, other = Manifest.of(named, chunk_size), Manifest.of(as_lists, chunk_size)
    assert one == other
    assert one.digest == other.digest


LAYOUT = [("a", (2, 3)), ("b", (4,)), ("c", ())]


@pytest.mark.parametrize(
    ("named", "chunk_size"),
    [
        (LAYOUT, 6),
        ([("a", (3, 2)), ("b", (4,)), ("c", ())], 5),
        ([("a", (6,)), ("b", (4,)), ("c", ())], 5),
        ([("a", (2, 3)), ("b", (5,))], 5),
        ([("a", (2, 3)), ("bb", (4,)), ("c", ())], 5),
        (LAYOUT[:2], 5),
        ([*LAYOUT, ("d", (0,))], 5),
    ],
    ids=["chunk size", "transposed", "flattened", "joined", "renamed", "one less", "an empty one more"],
)
def test_the_digest_tells_layouts_apart(named: list[tuple[str, Any]], chunk_size: int) -> None:
    assert Manifest.of(named, chunk_size).digest != Manifest.of(LAYOUT, 5).digest


def test_the_digest_does_not_change_between_versions() -> None:
    """It stands in commits and in every region's first message."""
    assert Manifest.of(LAYOUT, 5).digest == "004fa1ba0b0870c83d41fe4beb666691c5bce924981eeb0f645be9039e9aed3d"


def test_a_model_without_parameters() -> None:
    manifest = Manifest.of([], 4)
    assert (manifest.size, manifest.chunk_count, manifest.segments) == (0, 0, ())
    assert manifest.owned(0, 3) == (range(0),)
    assert manifest.layout == ()


@quick
@given(manifests())
def test_matrices_of_a_chunk_are_whole_rows_of_its_parameters(manifest: Manifest) -> None:
    owner = [p for p in manifest.parameters for _ in range(p.size)]
    held = 0
    for chunk, layout in enumerate(manifest.layout):
        end = 0
        for start, rows, columns in layout.matrices:
            assert end <= start < start + rows * columns <= layout.length
            end = start + rows * columns
            spec = owner[manifest.chunk_starts[chunk] + start]
            assert len(spec.shape) >= 2
            assert columns == spec.size // spec.shape[0]
            assert (manifest.chunk_starts[chunk] + start - spec.offset) % columns == 0
            assert owner[manifest.chunk_starts[chunk] + end - 1] == spec
            held += rows
    cuts = manifest.chunk_count - len(manifest.fragments)
    whole = sum(p.shape[0] for p in manifest.parameters if len(p.shape) >= 2 and p.size)
    assert whole - cuts <= held <= whole


MODEL = [("embed", (9, 4)), ("head", (7,)), *((f"layers.{i}.{w}", (4, 4)) for i in range(12) for w in "qk")]


def test_fragments_are_strided_and_each_begins_a_chunk() -> None:
    manifest = Manifest.of(MODEL, 10, 4)
    for fragment, chunks in enumerate(manifest.fragments):
        names = [
            spec.name
            for spec, segments in zip(manifest.parameters, manifest.segments, strict=True)
            if {segment.chunk for segment in segments} <= set(chunks)
        ]
        layers = {int(name.split(".")[1]) for name in names if "." in name}
        assert layers == {fragment, fragment + 4, fragment + 8}
        assert names == sorted(names)
    at = dict(zip((p.name for p in manifest.parameters), manifest.segments, strict=True))
    assert at["embed"][0].chunk in manifest.fragments[0]  # all are equal, so the first
    assert at["head"][0].chunk in manifest.fragments[1]  # the first of those that hold less
    assert [c for chunks in manifest.fragments for c in chunks] == list(range(manifest.chunk_count))
    lengths = [manifest.chunk_length(c) for c in range(manifest.chunk_count)]
    assert sum(lengths) == manifest.size
    assert [lengths[chunks[-1]] for chunks in manifest.fragments] == [2, 3, 6, 6]


def test_one_fragment_is_the_layout_without_fragments() -> None:
    assert Manifest.of(MODEL, 10, 1) == Manifest.of(MODEL, 10)
    assert Manifest.of(MODEL, 10, 2).digest != Manifest.of(MODEL, 10).digest


def test_more_fragments_than_there_are_layers_are_refused() -> None:
    assert len(Manifest.of(MODEL[:3], 10, 3).fragments) == 3
    with pytest.raises(ValueError, match="falls into 3 fragments, not 4"):
        Manifest.of(MODEL[:3], 10, 4)


def test_rows_that_a_chunk_cuts_belong_to_no_matrix() -> None:
    manifest = Manifest.of([("a", (3, 4)), ("b", (5,)), ("c", (2, 2, 3))], 10)
    assert manifest.layout == (
        ChunkLayout(10, ((0, 2, 4),)),
        ChunkLayout(10),
        ChunkLayout(9, ((3, 1, 6),)),
    )


def test_what_is_outside_is_refused() -> None:
    manifest = Manifest.of(LAYOUT, 5)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        Manifest.of(LAYOUT, 0)
    for chunk in (-1, manifest.chunk_count):
        with pytest.raises(IndexError, match=rf"chunk {chunk} is outside 0\.\.2"):
            manifest.chunk_length(chunk)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"rank {rank} is outside a world of 2"):
            manifest.owned(rank, 2)
