"""PowerSGD's steps beside numpy, and the codec that takes one of them a sync."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import Array, quick
from xcloud.codecs import Frame, LowRank, LowRankConfig
from xcloud.codecs.lowrank import back, orthonormal, project, rebuild

MATRICES = ((3, 60, 40), (2500, 16, 100), (4200, 2, 300))  # the last is too flat for rank 2
LENGTH = 5000
UNUSED = np.empty(0, np.uint8)
"""A state of factors comes from the merged update alone."""


def matrix(rows: int, columns: int, seed: int = 0, decay: float = 0.5) -> Array:
    """Singular values `decay ** i`."""
    numbers = np.random.default_rng([seed, rows, columns])
    u, _ = np.linalg.qr(numbers.standard_normal((rows, min(rows, columns))))
    v, _ = np.linalg.qr(numbers.standard_normal((columns, min(rows, columns))))
    return (u * decay ** np.arange(min(rows, columns)) @ v.T).astype(np.float32)


def best(m: Array, rank: int) -> float:
    """The least error that any matrix of this rank has."""
    return float(np.sqrt((np.linalg.svd(m.astype(np.float64), compute_uv=False)[rank:] ** 2).sum()))


def chunk(seed: int = 0, decay: float = 0.5) -> Array:
    """A chunk with matrices in it, and other values around them."""
    values = np.random.default_rng(seed).standard_normal(LENGTH).astype(np.float32)
    for start, rows, columns in MATRICES:
        values[start : start + rows * columns] = matrix(rows, columns, seed, decay).reshape(-1)
    return values


def of(values: Array, number: int) -> Array:
    start, rows, columns = MATRICES[number]
    return values[start : start + rows * columns].reshape(rows, columns)


def factored() -> np.ndarray:
    """Which values of `chunk` are sent as factors of rank 2."""
    inside = np.zeros(LENGTH, bool)
    for start, rows, columns in MATRICES[:2]:
        inside[start : start + rows * columns] = True
    return inside


@quick
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), rank=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_steps_are_what_numpy_computes(rows: int, columns: int, rank: int, seed: int) -> None:
    numbers = np.random.default_rng(seed)
    m, p, q = (
        numbers.standard_normal(s).astype(np.float32)
        for s in ((rows, columns), (rows, rank), (columns, rank))
    )
    np.testing.assert_allclose(project(m, q), m @ q, atol=1e-4)
    np.testing.assert_allclose(back(m, p), m.T @ p, atol=1e-4)
    np.testing.assert_allclose(rebuild(p, q), p @ q.T, atol=1e-4)
    assert {a.dtype for a in (project(m, q), back(m, p), rebuild(p, q), orthonormal(p))} == {
        np.dtype(np.float32)
    }


@quick
@given(rows=st.integers(6, 200), seed=st.integers(0, 99), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_orthonormal_columns_span_what_the_columns_span(rows: int, seed: int, scale: float) -> None:
    p = np.random.default_rng(seed).standard_normal((rows, 4)).astype(np.float32)
    found = orthonormal(p * np.float32(scale))
    np.testing.assert_allclose(found.T @ found, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(found @ (found.T @ p), p, atol=1e-3)


def test_columns_that_depend_on_others_become_zero() -> None:
    p = np.random.default_rng(0).standard_normal((50, 5)).astype(np.float32)
    p[:, 1], p[:, 2], p[:, 4] = 3 * p[:, 0], 0, p[:, 0] - p[:, 3]
    found = orthonormal(p)
    np.testing.assert_allclose(found.T @ found, np.diag([1, 0, 0, 1, 0]), atol=1e-6)


def test_two_sums_over_three_workers_are_powersgd_on_the_mean() -> None:
    """Step for step as in the paper's Algorithm 2, in float64; iterated, as good as the truncated SVD."""
    workers = [matrix(60, 40, seed) for seed in range(3)]
    mean = np.mean(workers, axis=0, dtype=np.float64)
    q = np.random.default_rng(1).standard_normal((40, 4)).astype(np.float32)
    plain_q = q.astype(np.float64)
    for _ in range(30):
        p_hat = orthonormal(sum(project(m, q) for m in workers) / np.float32(3))
        q = sum(back(m, p_hat) for m in workers) / np.float32(3)
        plain_p, _ = np.linalg.qr(mean @ plain_q)
        plain_q = mean.T @ plain_p
        np.testing.assert_allclose(rebuild(p_hat, q), plain_p @ plain_q.T, atol=1e-5)
    assert np.linalg.norm(rebuild(p_hat, q) - mean) < 1.0001 * best(mean, 4)


def test_one_sum_a_sync_finds_the_best_factors_too() -> None:
    """The merged update of a constant mean comes to the truncated SVD of it."""
    codec, sent = LowRank(2, 0.0), [chunk(seed) for seed in range(3)]
    mean, scale = np.mean(sent, axis=0), None
    for number in range(20):
        frame = Frame(shared=number, members=3, matrices=MATRICES, scale=scale)
        total = codec.encode(sent[0], frame).copy()
        for values in sent[1:]:
            codec.add(total, codec.encode(values, frame), frame)
        merged = codec.decode(total, LENGTH, frame) / np.float32(3)
        scale = codec.next_scale(merged, total, 3, frame)
    for number in (0, 1):
        off = np.linalg.norm(of(merged, number) - of(mean, number))
        assert off < 1.001 * best(of(mean, number), 2), number
    np.testing.assert_allclose(merged[~factored()], mean[~factored()], atol=1e-6)


def test_what_is_no_matrix_is_exact_and_the_bytes_are_those_of_the_factors() -> None:
    codec, values = LowRank(2, 1.0), chunk()
    first = Frame(shared=1, matrices=MATRICES)
    merged = codec.decode(codec.encode(values, first), LENGTH, first)
    second = Frame(shared=2, matrices=MATRICES, scale=codec.next_scale(merged, UNUSED, 1, first))
    raw = LENGTH - 60 * 40 - 16 * 100
    assert codec.encode(values, first).nbytes == 4 * (raw + 2 * (60 + 16))
    assert codec.encode(values, second).nbytes == 4 * (raw + 2 * (40 + 100))
    for frame in (first, second):
        decoded = codec.decode(codec.encode(values, frame), LENGTH, frame)
        assert decoded[~factored()].tobytes() == values[~factored()].tobytes()
        assert np.linalg.matrix_rank(of(decoded, 0), tol=1e-4) == 2


def test_encodings_of_either_side_add() -> None:
    codec, scale = LowRank(2, 1.0), None
    for number in range(4):
        frame = Frame(shared=number, members=2, matrices=MATRICES, scale=scale)
        one, other = (codec.encode(chunk(seed), frame) for seed in (1, 2))
        total = one.copy()
        codec.add(total, other, frame)
        apart = codec.decode(one, LENGTH, frame) + codec.decode(other, LENGTH, frame)
        together = codec.decode(total, LENGTH, frame)
        np.testing.assert_allclose(together, apart, atol=1e-5)
        scale = codec.next_scale(together, total, 2, frame)
        assert scale is not None
        assert scale.size == 1 + 2 * (60 + 40 + 16 + 100)


def test_error_feedback_sends_all_in_the_end() -> None:
    """Of matrices without any low rank too: the basis turns with what is left."""
    codec = LowRankConfig(rank=2).build()
    update = np.random.default_rng(0).standard_normal(LENGTH).astype(np.float32)
    residual, got, scale, off = np.zeros_like(update), np.zeros(LENGTH), None, []
    for number in range(1, 301):
        frame = Frame(shared=number, matrices=MATRICES, scale=scale)
        wanted = update + np.float32(codec.feedback) * residual
        decoded = codec.decode(codec.encode(wanted, frame), LENGTH, frame)
        residual, scale = wanted - decoded, codec.next_scale(decoded, UNUSED, 1, frame)
        got += decoded
        off.append(np.linalg.norm(got / number - update) / np.linalg.norm(update))
    assert off[-1] < 0.5 * off[99]
    assert off[-1] < 0.1


def test_a_direction_that_vanished_comes_back() -> None:
    """After an update of zeros, and after one of rank 1, the basis is still orthonormal."""
    codec, thin = LowRank(2, 1.0), np.zeros(LENGTH, np.float32)
    thin[: MATRICES[1][0]] = 1.0
    scale = None
    for number, values in enumerate([np.zeros(LENGTH, np.float32), thin, thin, chunk()]):
        frame = Frame(shared=number, matrices=MATRICES, scale=scale)
        decoded = codec.decode(codec.encode(values, frame), LENGTH, frame)
        assert np.isfinite(decoded).all()
        scale = codec.next_scale(decoded, UNUSED, 1, frame)
        assert scale is not None
        rows = (60, 40)[number % 2]  # of the basis: P_hat after the first, Q after the second
        basis = scale[1 : 1 + 2 * rows].reshape(rows, 2)
        np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_updates_stay_finite(size: float) -> None:
    codec, values, scale = LowRank(2, 1.0), chunk() * np.float32(size), None
    for number in range(3):
        frame = Frame(shared=number, matrices=MATRICES, scale=scale)
        decoded = codec.decode(codec.encode(values, frame), LENGTH, frame)
        assert np.isfinite(decoded).all()
        scale = codec.next_scale(decoded, UNUSED, 1, frame)
    assert np.linalg.norm((decoded - values) / size) < 0.7 * np.linalg.norm(values[factored()] / size)


def test_bytes_and_states_of_another_size_are_refused() -> None:
    codec, values = LowRank(2, 1.0), chunk()
    frame = Frame(matrices=MATRICES)
    encoded = codec.encode(values, frame)
    for wrong in (encoded[:-4], encoded[:0], np.append(encoded, np.uint8(0))):
        with pytest.raises(ValueError, match=str(wrong.nbytes)):
            codec.decode(wrong, LENGTH, frame)
    scale = codec.next_scale(values, UNUSED, 1, frame)
    assert scale is not None
    for state in (scale[:-1], np.where(np.arange(scale.size) == 0, 0.5, scale).astype(np.float32)):
        with pytest.raises(ValueError, match="state of these matrices"):
            codec.encode(values, Frame(matrices=MATRICES, scale=state))


def test_buffers_are_only_read_and_may_lie_anywhere() -> None:
    codec, values = LowRank(2, 1.0), chunk()
    values.flags.writeable = False
    frame = Frame(matrices=MATRICES)
    encoded = codec.encode(values, frame)
    odd = np.frombuffer(b"\0" + encoded.tobytes(), np.uint8)[1:]
    decoded = codec.decode(odd, LENGTH, frame)
    decoded.flags.writeable = False
    assert decoded.tobytes() == codec.decode(encoded, LENGTH, frame).tobytes()
    assert codec.next_scale(decoded, UNUSED, 1, frame) is not None


def test_without_matrices_there_is_no_state() -> None:
    codec, values = LowRank(4, 1.0), chunk()
    assert codec.next_scale(values, UNUSED, 1, Frame(matrices=((0, 8, 8),))) is None
    assert codec.encode(values, Frame(matrices=((0, 8, 8),))).tobytes() == values.tobytes()
