import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xcloud.data import Order
from xcloud.errors import ConfigError, DataError

lengths = st.integers(1, 60)
seeds = st.integers(0, 2**63)


@given(length=lengths, seed=seeds, epoch=st.integers(0, 5))
def test_each_epoch_is_a_permutation(length, seed, epoch):
    ids = Order(length, seed).indices(epoch * length, length)
    assert ids.dtype == np.int64
    assert sorted(ids.tolist()) == list(range(length))


@given(
    length=lengths, seed=seeds, position=st.integers(0, 200), counts=st.lists(st.integers(0, 80), max_size=6)
)
def test_reads_in_parts_equal_one_read(length, seed, position, counts):
    whole = Order(length, seed).indices(position, sum(counts))
    order = Order(length, seed)
    parts, at = [], position
    for count in counts:
        parts.append(order.indices(at, count))
        at += count
    assert np.array_equal(np.concatenate([np.empty(0, np.int64), *parts]), whole)


@given(length=lengths, seed=seeds, stop=st.integers(0, 200))
def test_resuming_anywhere_continues_the_same_order(length, seed, stop):
    straight = Order(length, seed)
    straight.indices(0, stop)
    assert np.array_equal(straight.indices(stop, 50), Order(length, seed).indices(stop, 50))


def test_epochs_and_seeds_differ():
    order = Order(1000, seed=7)
    assert not np.array_equal(order.indices(0, 1000), order.indices(1000, 1000))
    assert not np.array_equal(order.indices(0, 1000), Order(1000, seed=8).indices(0, 1000))


def test_going_back_gives_the_same_ids_and_memory_stays_bounded():
    order = Order(10, seed=1)
    first = order.indices(0, 10)
    order.indices(0, 100)
    assert np.array_equal(order.indices(0, 10), first)
    assert len(order._epochs) <= 2


def test_bad_settings_are_refused():
    with pytest.raises(DataError, match="0 sequences"):
        Order(0, seed=1)
    with pytest.raises(ConfigError, match="-1"):
        Order(5, seed=-1)
