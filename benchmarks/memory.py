"""Peak memory of a process, or of a process tree, sampled in a background thread.

Four figures (Linux). RSS and anonymous memory are counters of the kernel, read from `/proc/PID/statm` in microseconds;
USS and PSS come from `/proc/PID/smaps_rollup`, for which the kernel walks every page table.

* RSS counts every resident page of a process. A Ray actor maps the node's shared object store, so each page of it that
  the actor ever read or wrote stays in its RSS, and the RSS of two actors counts the same page twice.
* PSS divides a shared page by the number of processes that map it: summed over a tree it is the true footprint of the
  tree. For one actor it is not a figure of its own, because it moves when a neighbour touches the page.
* USS is the private memory: what would be freed if the process ended. It is the honest figure for a process that maps a
  shared object store, because the objects in the store belong to the node, not to the actor that maps them. One trap
  remains: an object that an actor just wrote and that nobody has read yet is mapped once, and counts as its own.
* Anonymous memory is USS without that trap: heap and private mappings, no page of any file or store. What an actor is
  charged with is its accumulators and copies, and those are all anonymous. Quote the PSS of the tree beside it, so that
  moving a copy into the store is no way to look small.

A walk takes about 20 ms for each GB resident, so USS and PSS are sampled only on request (`walk=True`), and never in
rounds that are timed. A peak shorter than the interval can be missed. The samples of a tree's processes are taken one
after the other, not at one instant.
"""

from __future__ import annotations

import os
import threading
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType

__all__ = ["Memory", "MemorySampler", "children_of", "read_memory"]

PAGE = os.sysconf("SC_PAGE_SIZE")
PRIVATE = ("Private_Clean", "Private_Dirty", "Private_Hugetlb")


@dataclass(frozen=True)
class Memory:
    """Resident memory in bytes; `uss` and `pss` are zero where no page table was walked."""

    anonymous: int = 0
    rss: int = 0
    uss: int = 0
    pss: int = 0

    def __add__(self, other: Memory) -> Memory:
        return Memory(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def peak(self, other: Memory) -> Memory:
        """The larger of each figure."""
        return Memory(*map(max, astuple(self), astuple(other)))


def read_memory(pid: int, *, walk: bool = True) -> Memory:
    """Memory of one process now; USS and PSS only with `walk`.

    Raises:
        OSError: no such process, or not ours to look at, or no Linux.
    """
    resident, shared = (int(pages) * PAGE for pages in Path(f"/proc/{pid}/statm").read_text().split()[1:3])
    if not walk:
        return Memory(resident - shared, resident)
    sizes: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, value = line.split(":")
        sizes[key] = int(value.split()[0]) * 1024
    uss = sum(sizes.get(key, 0) for key in PRIVATE)
    return Memory(resident - shared, resident, uss, sizes.get("Pss", 0))


def children_of(pid: int) -> list[int]:
    """All descendants of a process now, children before grandchildren."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue  # it ended meanwhile
            parent = int(stat.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found = list(children.get(pid, ()))
    for child in found:
        found += children.get(child, ())
    return found


class MemorySampler:
    """Watches a process, or its whole tree, for as long as the `with` block lasts.

    Args:
        pid: process to watch.
        tree: with its descendants, the figures summed at each sample (the sum of RSS counts shared pages twice).
        walk: sample USS and PSS too; slows the watched process and takes a core for itself.
        interval_s: between two samples.

    Attributes:
        start: memory at the first sample, before the work: the process with its imports.
        peak: the largest of each figure over all samples.
        samples: how many were taken.

    Raises:
        OSError: the process cannot be read when the block starts.
    """

    def __init__(self, pid: int, *, tree: bool = False, walk: bool = False, interval_s: float = 0.02) -> None:
        self.pid = pid
        self.tree = tree
        self.walk = walk
        self.interval_s = interval_s
        self.start = self.peak = Memory()
        self.samples = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"memory of {pid}", daemon=True)

    def __enter__(self) -> MemorySampler:
        read_memory(self.pid, walk=self.walk)  # what cannot be read fails here, in the caller's thread
        self.start = self.peak = self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self.interval_s):
            self.peak = self.peak.peak(self._sample())
        self.peak = self.peak.peak(self._sample())

    def _sample(self) -> Memory:
        total = Memory()
        for pid in (self.pid, *(children_of(self.pid) if self.tree else ())):
            try:
                total += read_memory(pid, walk=self.walk)
            except (OSError, ValueError):
                continue  # it ended, or is a zombie without memory
        self.samples += 1
        return total
