"""The update path of one rank: from its share of a pseudo-gradient to bytes, and from merged bytes back.

Up:   delta x share (+ feedback x residual) -> encode;  residual <- what the encoding lost.
Down: decode (/ total share) -> pseudo-gradient of the outer step;  public scale <- the total.

Two ways to merge. Codecs whose encodings add (`adds_up`) are summed as they are and the
*total* comes back down: the aggregator never opens one, and each region has multiplied its
update by its own share of the weight. All others are opened by the aggregator, which combines
them by any weights and encodes the result for the way down.

A rank keeps, for the chunks it owns: the residual (error feedback, arXiv 1901.09847), which is
private and counts only once its round is merged, and the codec's public scale. A residual is what a region
still owes to the sum, so it is kept in the sum's units: multiplied by the share of its round, whatever
later shares are. Nothing here knows of torch, DeepSpeed or Ray.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from xcloud.codecs import Array, Bytes, Codec, Frame, Identity, Ring, ring_of
from xcloud.errors import AggregationError, RegionError
from xcloud.manifest import ChunkLayout
from xcloud.messages import RoundSum
from xcloud.secure.ckks import Encrypted, cipher_of, most_of
from xcloud.secure.masks import Masker
from xcloud.secure.tags import Sealed, sealed, tags_of

__all__ = ["Framing", "UpdatePath", "adds_up", "clip_margin", "exact_norm_squared", "room"]


def adds_up(codec: Codec) -> bool:
    """Whether the aggregator adds encodings instead of opening them.

    Identity could, and is opened all the same: its sum is exact either way, and a mean that the
    aggregator takes saves every region two passes over its update.
    """
    return codec.linear and not isinstance(codec, Identity)


def room(codec: Codec, length: int) -> int:
    """fp32 elements whose bytes hold a chunk of `length` of them, before and after it is encoded."""
    if not isinstance(codec, Encrypted):
        return length
    return max(length, -(-codec.ring(length, Frame()).size // 4))


def exact_norm_squared(values: Array) -> float:
    """Squared norm in fp64: that of fp32 may come out a part in ten thousand too small, and a clip with it too long."""
    total = 0.0
    for start in range(0, values.size, 1 << 16):
        block = values[start : start + (1 << 16)].astype(np.float64)
        total += float(np.dot(block, block))
    return total


def clip_margin(regions: int) -> float:
    """By what share an update is clipped shorter than it may be: what rotations, and fp32 sums over so many, are off."""
    return 1e-5 + regions * regions * 2.0**-23


class Framing:
    """Makes the frames of a run's chunks, alike in all regions and in the aggregator.

    Args:
        job: name of the job; `seed`: of the job.
        members: regions in the job.
        region: whose private seeds these are; the aggregator has its own.
        typical: see `Frame.typical`.
    """

    def __init__(self, job: str, seed: int, members: int, region: str, typical: float = 1e-3) -> None:
        self.job, self.seed, self.members, self.region, self.typical = job, seed, members, region, typical

    def frame(self, round: int, chunk: int, layout: ChunkLayout, scale: Array | None = None) -> Frame:
        """The frame of one chunk in one round; a retry gets the same."""
        at = (self.job, self.seed, round, chunk)
        return Frame(
            shared=_hash("shared", *at),
            private=_hash("private", self.region, *at),
            members=self.members,
            matrices=layout.matrices,
            scale=scale,
            typical=self.typical,
        )


class UpdatePath:
    """Encodes and decodes a rank's own chunks, and keeps what has to survive a round.

    Args:
        codec: the way up.
        downlink: the way down, where the aggregator encodes anew.
        framing: of this region.
        layout: of all chunks.
        owned: chunk ids of this rank.
        divisor: of totals, instead of the regions' shares in them; None: these.
    """

    def __init__(
        self,
        codec: Codec,
        downlink: Codec,
        framing: Framing,
        layout: tuple[ChunkLayout, ...],
        owned: Sequence[int],
        divisor: float | None = None,
    ) -> None:
        self.codec, self.downlink, self.framing = codec, downlink, framing
        self.layout, self.owned, self.divisor = layout, owned, divisor
        self.scales: dict[int, Array] = {}
        self.residual: dict[int, Array] = {}
        self._fresh: dict[int, Array] = {}
        self._spare: dict[int, Array] = {}
        if codec.feedback:
            self.residual = {c: np.zeros(layout[c].length, np.float32) for c in owned}

    def protect(self, round: int, chunk: int, encoded: Bytes, masker: Masker) -> tuple[Bytes, Sealed]:
        """An encoding as it leaves the region, masked in place or encrypted, and what is signed of it.

        Raises:
            RegionError: a value is too large for the sum of all regions to be decrypted.
        """
        if not masker.cipher:
            return encoded, self.mask(round, chunk, encoded, masker)
        values, most = encoded.view(np.float32), most_of(self.framing.members)
        largest = float(np.abs(values).max(initial=0))
        if not largest <= most:
            raise RegionError(
                self.framing.region,
                f"chunk {chunk} of its update holds {largest:.3g}, and secure_aggregation.scheme ckks carries up to "
                f"{most:.3g} for each of {self.framing.members} regions; it was not sent",
            )
        sent = cipher_of(masker.cipher).encrypt(values)
        return sent, sealed(sent, (0, 0))

    def bare(self, round: int, chunk: int, sent: Bytes, masker: Masker) -> Bytes:
        """The encoding that `protect` was given, from what it made of it (used up); rounded, if it was encrypted."""
        if not masker.cipher:
            self.unmask(round, chunk, sent, masker)
            return sent
        return self.opened(chunk, sent, masker.cipher)

    def opened(self, chunk: int, data: Bytes, key: bytes) -> Bytes:
        """An encrypted chunk or sum, decrypted: what `decode` takes.

        Raises:
            SecurityError: it is none.
        """
        return cipher_of(key).decrypt(data, self.layout[chunk].length).view(np.uint8)

    def mask(self, round: int, chunk: int, encoded: Bytes, masker: Masker) -> Sealed:
        """Mask an encoding in place; returns what is signed of it."""
        ring = self._ring(round, chunk)
        tags = tags_of(encoded, chunk, ring, masker.tag) if masker.tag else (0, 0)
        masker.apply(encoded, chunk, ring)
        return sealed(encoded, tags)

    def unmask(self, round: int, chunk: int, encoded: Bytes, masker: Masker) -> None:
        """Take off what `masker` has put on, in place."""
        masker.inverse().apply(encoded, chunk, self._ring(round, chunk))

    def check(self, round: int, chunk: int, total: Bytes, tag: bytes) -> Sealed:
        """What a region confirms of a total.

        Raises:
            ValueError: it cannot be this chunk's.
        """
        ring = self._ring(round, chunk)
        if total.nbytes != ring.size:
            raise ValueError(f"chunk {chunk} of the sum has {total.nbytes} bytes, expected {ring.size}")
        if isinstance(self.codec, Encrypted):
            self.codec.check(total, self.layout[chunk].length)
        return sealed(total, tags_of(total, chunk, ring, tag) if tag else (0, 0))

    def _ring(self, round: int, chunk: int) -> Ring:
        ring = ring_of(self.codec, self.layout[chunk].length, self._frame(round, chunk))
        assert ring is not None, "the job was refused otherwise"
        return ring

    def encode(self, round: int, chunk: int, delta: Array, share: float) -> Bytes:
        """One chunk's bytes for the wire; `delta` (fp32) is used up.

        Args:
            share: of the largest weight, in [0, 1]; only where encodings add up.
        """
        frame = self._frame(round, chunk)
        if adds_up(self.codec) and share != 1:
            delta *= np.float32(share)
        if not self.codec.feedback:
            return self.codec.encode(delta, frame)
        delta += np.float32(self.codec.feedback) * self.residual[chunk]
        encoded = self.codec.encode(delta, frame)
        lost = self._fresh.get(chunk)
        if lost is None:
            lost = self._spare.pop(chunk) if chunk in self._spare else np.empty_like(delta)
        self._fresh[chunk] = np.subtract(delta, self.codec.decode(encoded, delta.size, frame), out=lost)
        return encoded

    def decode(self, chunk: int, data: Bytes, total: RoundSum) -> Array:
        """One chunk of the merged update (fp32, the weighted mean), from what the aggregator sent.

        Raises:
            ValueError: the bytes cannot be this chunk's.
            AggregationError: the sum holds NaN or Inf.
        """
        length = self.layout[chunk].length
        frame = self._frame(total.round, chunk)
        if not total.summed:
            return self.downlink.decode(data, length, frame)
        merged = self.codec.decode(data, length, frame) * np.float32(1 / (self.divisor or total.total_share))
        if not np.isfinite(np.dot(merged, merged)):
            raise AggregationError(f"round {total.round}: the merged update is not finite in chunk {chunk}")
        scale = self.codec.next_scale(merged, data, len(total.regions), frame)
        if scale is not None:
            self.scales[chunk] = scale
        return merged

    def settle(self) -> None:
        """What was encoded last is merged: what its encoding lost counts from now on."""
        for chunk, lost in self._fresh.items():
            self._spare[chunk], self.residual[chunk] = self.residual[chunk], lost
        self._fresh = {}

    def forget(self) -> None:
        """What was encoded last will not be merged."""
        self._spare |= self._fresh
        self._fresh = {}

    def restore(self, residual: dict[int, Array]) -> None:
        """Take up the residual of a checkpoint; what it does not hold is zero."""
        self.forget()
        for chunk, values in self.residual.items():
            values[:] = residual.get(chunk, 0.0)

    def _frame(self, round: int, chunk: int) -> Frame:
        return self.framing.frame(round, chunk, self.layout[chunk], self.scales.get(chunk))


def _hash(*parts: object) -> int:
    """A 64-bit seed from anything with a stable repr."""
    return xxhash.xxh3_64_intdigest(repr(parts).encode())
