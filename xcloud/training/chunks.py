"""The chunks that one rank owns: vectors over them, and their way out of full parameters, back, and to disk.

A vector over the owned chunks is fp32 in host memory, one chunk after the other. Full parameters come and go one at a
time, so no rank ever holds a second model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from xcloud.checkpoint import CheckpointStore, ChunkFile
from xcloud.manifest import Manifest
from xcloud.messages import CheckpointFile
from xcloud.secure.vault import Vault

__all__ = ["OwnedChunks", "to_numpy"]

Array = npt.NDArray[np.float32]


class OwnedChunks:
    """What `rank` of `world` ranks owns of a manifest.

    Attributes:
        ids: of the chunks, in order.
        lengths: elements of each.
    """

    def __init__(self, manifest: Manifest, rank: int, world: int, device: torch.device) -> None:
        self.manifest, self.rank, self.world, self.device = manifest, rank, world, device
        self._runs = manifest.owned(rank, world)
        self.ids = tuple(chunk for run in self._runs for chunk in run)
        self.lengths = [manifest.chunk_length(chunk) for chunk in self.ids]
        starts = np.cumsum([0, *self.lengths]).tolist()
        self._places = {chunk: slice(starts[i], starts[i + 1]) for i, chunk in enumerate(self.ids)}

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._places

    def empty(self) -> Array:
        """A vector of zeros over the owned chunks."""
        return np.zeros(sum(self.lengths), np.float32)

    def of(self, values: Array, chunk: int) -> Array:
        """View of one chunk in a vector over the owned chunks."""
        return values[self._places[chunk]]

    def by_id(self, vectors: Mapping[str, Array]) -> dict[str, dict[int, Array]]:
        """Views of every chunk in every vector."""
        return {
            name: {chunk: self.of(values, chunk) for chunk in self.ids} for name, values in vectors.items()
        }

    def fill(self, values: Array, parts: Mapping[int, Array]) -> None:
        """Set the chunks in `parts`."""
        for chunk, part in parts.items():
            self.of(values, chunk)[:] = part

    def within(self, parameter: int, chunks: range) -> bool:
        """Whether a parameter lies in `chunks`, which are whole fragments."""
        segments = self.manifest.segments[parameter]
        return bool(segments) and segments[0].chunk in chunks

    def gather(self, read: Callable[[str], torch.Tensor], values: Array) -> None:
        """Copy the owned chunks out of full parameters, one parameter at a time; collective as `read` is."""
        for index, spec in enumerate(self.manifest.parameters):
            full = to_numpy(read(spec.name))
            for seg in self.manifest.segments[index]:
                if seg.chunk in self:
                    target = self.of(values, seg.chunk)[seg.chunk_start : seg.chunk_start + seg.length]
                    target[:] = full[seg.parameter_start : seg.parameter_start + seg.length]

    def spread(
        self, values: Array, write: Callable[[str, torch.Tensor], None], chunks: range | None = None
    ) -> None:
        """Hand every full parameter (of a fragment) to `write`, its parts broadcast by the ranks that own them."""
        within = [
            (spec, self.manifest.segments[index])
            for index, spec in enumerate(self.manifest.parameters)
            if chunks is None or self.within(index, chunks)
        ]
        if self.world == 1:
            flat = torch.from_numpy(values)
            for spec, _ in within:
                write(spec.name, flat[spec.offset : spec.offset + spec.size])
            return
        owners = {c: r for r in range(self.world) for run in self.manifest.owned(r, self.world) for c in run}
        for spec, segments in within:
            full = torch.empty(spec.size, dtype=torch.float32, device=self.device)
            for seg in segments:
                if owners[seg.chunk] == self.rank:
                    own = self.of(values, seg.chunk)[seg.chunk_start : seg.chunk_start + seg.length]
                    full[seg.parameter_start : seg.parameter_start + seg.length] = torch.from_numpy(own)
            for rank in sorted({owners[seg.chunk] for seg in segments}):
                parts = [seg for seg in segments if owners[seg.chunk] == rank]
                start, stop = parts[0].parameter_start, parts[-1].parameter_start + parts[-1].length
                dist.broadcast(full[start:stop], src=rank)
            write(spec.name, full)

    def write(
        self,
        store: CheckpointStore,
        round: int,
        prefix: str,
        tensors: Mapping[str, Mapping[int, Array]],
        scalars: dict[str, Any],
        vault: Vault | None = None,
    ) -> list[CheckpointFile]:
        """Write the owned chunks into a checkpoint, a run of consecutive ones at a time."""
        return [
            file
            for run in self._runs
            for file in store.write_tensors(round, prefix, run, tensors, scalars, vault)
        ]

    def read(
        self,
        store: CheckpointStore,
        round: int,
        files: Sequence[ChunkFile],
        vault: Vault | None = None,
        sealed_in: int | None = None,
    ) -> tuple[dict[str, dict[int, Array]], dict[str, Any]]:
        """Tensors of the owned chunks, and scalars, from a checkpoint."""
        tensors: dict[str, dict[int, Array]] = {}
        scalars: dict[str, Any] = {}
        for run in self._runs:
            found, told = store.read_tensors(round, files, run, vault, sealed_in)
            for name, parts in found.items():
                tensors.setdefault(name, {}).update(parts)
            scalars |= told
        return tensors, scalars


def to_numpy(tensor: torch.Tensor) -> Array:
    """fp32 in host memory, flat if it was; a view where it can be."""
    values: Array = tensor.detach().to("cpu", torch.float32).numpy()
    return values
