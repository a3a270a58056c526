"""Low-rank factors of matrices (PowerSGD, arXiv 1905.13727), cut down to one sum a sync.

PowerSGD approximates the regions' mean matrix M by P_hat Q^T in two sums: P = M Q with a public Q, then
Q = M^T P_hat with P_hat = orthonormal(P). `project`, `orthonormal`, `back` and `rebuild` are its steps.

The codec `lowrank` has one sum a sync, and takes the two steps in turn, as ACP-SGD does (arXiv 2306.08881):
in one sync P = M Q crosses the wire and M decodes to P Q^T, in the next one Q = M^T P_hat does and M decodes to
P_hat Q^T. The basis of a sync is public: the factor that was merged in the last, made orthonormal. To send P
every time would not do: P Q^T has no rows outside the span of Q, so nothing merged could ever turn that span.

What is not a matrix, or would hardly shrink, is sent as it is.

All sums run in an order that no machine changes, since regions must agree on the basis and on what it decodes to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from xcloud.codecs._kernels import constant, jit
from xcloud.codecs.base import CODECS, Array, Bytes, Codec, CodecConfig, Frame, expect_bytes

__all__ = ["LowRank", "LowRankConfig", "back", "orthonormal", "project", "rebuild"]

VANISHED = 1e-5
"""A column that keeps less than this share of its length is rounding error, not a direction."""


@jit
def _project(matrix: Any, q: Any, p: Any) -> None:
    rank = q.shape[1]
    row = np.empty(rank, np.float32)
    for i in range(matrix.shape[0]):
        row[:] = np.float32(0.0)
        for j in range(matrix.shape[1]):
            value = matrix[i, j]
            for k in range(rank):
                row[k] += value * q[j, k]
        p[i] = row


@jit
def _back(matrix: Any, p: Any, turned: Any) -> None:
    """Into the transpose of Q, zero before: the inner loop runs along a row of the matrix."""
    for i in range(matrix.shape[0]):
        for k in range(p.shape[1]):
            factor = p[i, k]
            for j in range(matrix.shape[1]):
                turned[k, j] += factor * matrix[i, j]


@jit
def _rebuild(p: Any, turned: Any, out: Any) -> None:
    for i in range(p.shape[0]):
        for k in range(p.shape[1]):
            factor = p[i, k]
            if k == 0:
                for j in range(turned.shape[1]):
                    out[i, j] = factor * turned[k, j]
            else:
                for j in range(turned.shape[1]):
                    out[i, j] += factor * turned[k, j]


@jit
def _orthonormal(a: Any, least: float) -> None:
    """The rows of `a` in place, one after the other; each is cleared of those before it twice."""
    for k in range(a.shape[0]):
        before = 0.0
        for j in range(a.shape[1]):
            before += np.float64(a[k, j]) * np.float64(a[k, j])
        for _ in range(2):
            for other in range(k):
                dot = 0.0
                for j in range(a.shape[1]):
                    dot += np.float64(a[k, j]) * np.float64(a[other, j])
                share = np.float32(dot)
                for j in range(a.shape[1]):
                    a[k, j] -= share * a[other, j]
        after = 0.0
        for j in range(a.shape[1]):
            after += np.float64(a[k, j]) * np.float64(a[k, j])
        kept = after > 0.0 and after > least * least * before
        factor = 1.0 / np.sqrt(after) if kept else 0.0
        for j in range(a.shape[1]):
            a[k, j] = np.float32(np.float64(a[k, j]) * factor)


def project(matrix: Array, q: Array) -> Array:
    """P = M Q: (rows, rank) from (rows, columns) and (columns, rank)."""
    p = np.empty((matrix.shape[0], q.shape[1]), np.float32)
    _project(_rows(matrix), _rows(q), p)
    return p


def back(matrix: Array, p_hat: Array) -> Array:
    """Q = M^T P_hat: (columns, rank) from (rows, columns) and (rows, rank)."""
    turned = np.zeros((p_hat.shape[1], matrix.shape[1]), np.float32)
    _back(_rows(matrix), _rows(p_hat), turned)
    return np.ascontiguousarray(turned.T)


def rebuild(p_hat: Array, q: Array) -> Array:
    """P_hat Q^T: (rows, columns) from (rows, rank) and (columns, rank)."""
    out = np.zeros((p_hat.shape[0], q.shape[0]), np.float32)
    _rebuild(_rows(p_hat), _rows(q.T), out)
    return out


def orthonormal(p: Array) -> Array:
    """Modified Gram-Schmidt over the columns, from left to right. A column that depends on those before it is zero."""
    turned = p.T.copy()
    _orthonormal(turned, VANISHED)
    return np.ascontiguousarray(turned.T)


def _rows(a: Array) -> npt.NDArray[Any]:
    """As kernels take it: row after row, aligned, read-only."""
    return constant(np.require(a, np.float32, ["C", "A"]))


@dataclass(frozen=True)
class Piece:
    """A matrix that is sent as a factor."""

    start: int
    rows: int
    columns: int

    def of(self, values: Array) -> Array:
        """The view of it in a chunk."""
        return values[self.start : self.start + self.rows * self.columns].reshape(self.rows, self.columns)


class LowRank:
    """One factor of each matrix a sync; see `LowRankConfig`.

    Its public state: first 0 where the basis is Q and the next sync sends P, or 1 where it is P_hat; then, for each
    matrix, room for rows + columns of `rank` numbers, of which the basis takes the first.
    """

    linear = True

    def __init__(self, rank: int, feedback: float) -> None:
        self.rank, self.feedback = rank, feedback

    def encode(self, values: Array, frame: Frame) -> Bytes:
        left, bases = self._bases(frame)
        parts = [values[cut] for cut in self._raw(values.size, frame)]
        for piece, basis in zip(self._pieces(frame), bases, strict=True):
            matrix = piece.of(values)
            parts.append((back if left else project)(matrix, basis).reshape(-1))
        return np.concatenate(parts).view(np.uint8) if parts else np.empty(0, np.uint8)

    def decode(self, data: Bytes, length: int, frame: Frame) -> Array:
        left, bases = self._bases(frame)
        raw, pieces = self._raw(length, frame), self._pieces(frame)
        sent = [self.rank * (p.columns if left else p.rows) for p in pieces]
        numbers = sum(cut.stop - cut.start for cut in raw) + sum(sent)
        expect_bytes(data, 4 * numbers, length, f"factors of rank {self.rank}")
        got = data.view(np.float32)
        out, at = np.empty(length, np.float32), 0
        for cut in raw:
            size = cut.stop - cut.start
            out[cut], at = got[at : at + size], at + size
        for piece, basis, size in zip(pieces, bases, sent, strict=True):
            factor = got[at : at + size].reshape(-1, self.rank)
            p, q = (basis, factor) if left else (factor, basis)
            _rebuild(_rows(p), _rows(q.T), piece.of(out))
            at += size
        return out

    def add(self, total: Bytes, other: Bytes, frame: Frame) -> None:
        del frame
        summed = total.view(np.float32)
        np.add(summed, other.view(np.float32), out=summed)

    def next_scale(self, merged: Array, total: Bytes, contributors: int, frame: Frame) -> Array | None:
        del total, contributors
        pieces = self._pieces(frame)
        if not pieces:
            return None
        left, bases = self._bases(frame)
        state = np.zeros(self._room(pieces), np.float32)
        state[0] = 0.0 if left else 1.0
        fresh, at = _Numbers(frame.shared), 1
        for piece, basis in zip(pieces, bases, strict=True):
            matrix = piece.of(merged)
            # What was sent: the basis is orthonormal, so P Q^T Q is P again.
            factor = (back if left else project)(matrix, basis)
            found = _filled(orthonormal(factor), fresh)
            state[at : at + found.size] = found.reshape(-1)
            at += self.rank * (piece.rows + piece.columns)
        return state

    def _pieces(self, frame: Frame) -> list[Piece]:
        """Matrices that a factor makes at least twice as small."""
        return [
            Piece(start, rows, columns)
            for start, rows, columns in sorted(frame.matrices)
            if rows * columns > 2 * self.rank * (rows + columns)
        ]

    def _raw(self, length: int, frame: Frame) -> list[slice]:
        """All that lies between the pieces."""
        cuts, at = [], 0
        for piece in self._pieces(frame):
            cuts.append(slice(at, piece.start))
            at = piece.start + piece.rows * piece.columns
        cuts.append(slice(at, length))
        return [cut for cut in cuts if cut.start < cut.stop]

    def _room(self, pieces: list[Piece]) -> int:
        return 1 + self.rank * sum(p.rows + p.columns for p in pieces)

    def _bases(self, frame: Frame) -> tuple[bool, list[Array]]:
        """Whether they are P_hat, on the left, and the basis of each piece; before any update Q from the shared seed."""
        pieces, state = self._pieces(frame), frame.scale
        if state is None or not pieces:
            fresh = _Numbers(frame.shared)
            return False, [
                _filled(np.zeros((piece.columns, self.rank), np.float32), fresh) for piece in pieces
            ]
        if state.size != self._room(pieces) or state[0] not in (0.0, 1.0):
            raise ValueError(
                f"the state of these matrices has {self._room(pieces)} numbers, got {state.size}"
            )
        left, bases, at = bool(state[0]), [], 1
        for piece in pieces:
            size = self.rank * (piece.rows if left else piece.columns)
            bases.append(state[at : at + size].reshape(-1, self.rank))
            at += self.rank * (piece.rows + piece.columns)
        return left, bases


class _Numbers:
    """Numbers in [-1, 1) from a seed, the same on every machine and with every numpy."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Philox(key=seed)

    def __call__(self, count: int) -> Array:
        upper = self._bits.random_raw(count) >> np.uint64(40)
        numbers: Array = upper.astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
        return numbers


def _filled(basis: Array, fresh: _Numbers) -> Array:
    """A direction that vanished would never come back: take a random one instead."""
    for _ in range(8):
        gone = ~basis.any(axis=0)
        if not gone.any():
            break
        basis[:, gone] = fresh(basis.shape[0] * int(gone.sum())).reshape(basis.shape[0], -1)
        order = np.argsort(gone, kind="stable")  # those that were found stay as they are
        basis = orthonormal(basis[:, order])[:, np.argsort(order, kind="stable")]
    return np.ascontiguousarray(basis)


@CODECS.register
class LowRankConfig(CodecConfig):
    """`lowrank`: a factor of rank `rank` for each matrix; adds.

    Attributes:
        rank: columns of a factor. Matrices that it would not halve are sent as they are.
        feedback: share of what was not sent that the next update makes up for.
    """

    type: Literal["lowrank"] = "lowrank"
    rank: Annotated[int, Field(ge=1, le=256)] = 4
    feedback: Annotated[float, Field(ge=0, le=1)] = 1.0

    def build(self) -> Codec:
        return LowRank(self.rank, self.feedback)
