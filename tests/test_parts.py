"""Parts: what is packed is found again, whatever the sizes and cuts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xcloud.parts import Bundle, PartReader, PartWriter


class Store:
    """Blobs in a list."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def put(self, buffer: Any) -> int:
        self.kept.append(buffer.copy())
        return len(self.kept) - 1

    def get(self, handles: Any) -> list[Any]:
        return [self.kept[handle] for handle in handles]


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=30),
    capacity=st.integers(64, 4096),
    ranks=st.integers(1, 4),
    shrink=st.sampled_from([1, 2, 4]),
)
def test_chunks_of_several_ranks_are_found_again(
    lengths: list[int], capacity: int, ranks: int, shrink: int
) -> None:
    """Encoded in place (4 bytes a value) or shorter, by one rank or several, in any order of ranks."""
    store, bundles, sent = Store(), [], []
    for rank in range(ranks):
        owned = range(len(lengths) * rank // ranks, len(lengths) * (rank + 1) // ranks)
        writer = PartWriter(store.put, [lengths[c] for c in owned], capacity)
        for chunk in owned:
            values = writer.slot(lengths[chunk])
            values[:] = np.arange(lengths[chunk]) + chunk
            data = values.view(np.uint8)
            encoded = data if shrink == 1 else data[: data.size // shrink].copy()
            sent.append(encoded.copy())
            writer.add(chunk, encoded)
        bundles.append(writer.finish())
    bundle = Bundle.join(reversed(bundles))
    assert [first for first, _ in bundle.parts] == sorted(first for first, _ in bundle.parts)
    assert bundle.sizes == tuple(data.nbytes for data in sent)
    reader = PartReader(store.get, bundle)
    for chunk, data in enumerate(sent):
        assert np.array_equal(reader.read(chunk), data)


def test_a_part_is_no_longer_than_its_capacity() -> None:
    store = Store()
    writer = PartWriter(store.put, [100] * 10, 1024)
    for chunk in range(10):
        writer.add(chunk, writer.slot(100).view(np.uint8))
    assert max(buffer.nbytes for buffer in store.kept) <= 1024
    assert sum(count for _, count in writer.finish().parts) == 10


def test_contradictions_are_refused() -> None:
    store = Store()
    handle = store.put(np.zeros(64, np.uint8))
    with pytest.raises(ValueError, match="1 parts, 2 buffers, 1 sizes"):
        PartReader(store.get, Bundle(((0, 1),), (64,), (handle, handle)))
    with pytest.raises(ValueError, match="chunk 3 is in none of its parts"):
        PartReader(store.get, Bundle(((0, 1),), (64,), (handle,))).read(3)
    with pytest.raises(ValueError, match="chunk 0 has 64 of 100 bytes"):
        PartReader(store.get, Bundle(((0, 1),), (100,), (handle,))).read(0)
