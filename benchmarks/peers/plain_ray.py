"""The floor: plain Ray actors that average numpy arrays through the object store, without training.

One actor for each region holds its parameters as ten arrays, takes the global ones and returns its own; one
aggregator fetches one region after the other, adds in place and returns the mean. Nobody allocates a model after the
first round (fresh pages would cost as much as the copies, and a trainer's parameters stay in place too). Run with `python -m benchmarks.peers.plain_ray`; prints one JSON line (`PeerRun`).
"""

from __future__ import annotations

import os
import time
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import numpy as np
import numpy.typing as npt
import ray

from benchmarks.memory import MemorySampler
from benchmarks.peers import LAYERS, MEMORY_ROUNDS, PeerOptions, PeerRun

Array = npt.NDArray[np.float32]


@ray.remote(num_cpus=0)
class Region:
    """Holds its own parameters, as a trainer does."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []

    def round(self, arrays: list[Array]) -> list[Array]:
        """Take the global parameters, return its own."""
        if not self.arrays:
            self.arrays = [np.empty_like(array) for array in arrays]
        for mine, array in zip(self.arrays, arrays, strict=True):
            np.copyto(mine, array)
        return self.arrays


@ray.remote(num_cpus=0)
class Aggregator:
    """Holds one model and streams: fetch one region, add in place."""

    def __init__(self) -> None:
        self.sums: list[Array] = []

    def pid(self) -> int:
        """Its process, for the memory sampler."""
        return os.getpid()

    def mean(self, refs: list[ray.ObjectRef[Any]]) -> list[Array]:
        """Mean over the regions, whose parameters come as references."""
        for index, ref in enumerate(refs):
            self._fold(ray.get(ref), first=index == 0)
        for total in self.sums:
            np.multiply(total, np.float32(1 / len(refs)), out=total)
        return self.sums

    def _fold(self, arrays: list[Array], first: bool) -> None:
        if not self.sums:
            self.sums = [np.empty_like(array) for array in arrays]
        for total, array in zip(self.sums, arrays, strict=True):
            if first:
                np.copyto(total, array)
            else:
                np.add(total, array, out=total)


def initial_model(options: PeerOptions) -> list[Array]:
    """The parameters that the rounds start from; made again for the check, so that nobody keeps them."""
    generator = np.random.default_rng(0)
    return [generator.standard_normal(options.parameters // LAYERS, dtype=np.float32) for _ in range(LAYERS)]


def play(options: PeerOptions) -> PeerRun:
    """Start a local Ray of its own, play the rounds, check the mean, and stop it."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        return _play(options)
    finally:
        ray.shutdown()


def _play(options: PeerOptions) -> PeerRun:
    regions = [Region.remote() for _ in range(options.clients)]
    aggregator = Aggregator.remote()
    server = ray.get(aggregator.pid.remote())
    current = ray.put(initial_model(options))

    def play_round() -> float:
        nonlocal current
        started = time.perf_counter()
        current = aggregator.mean.remote([region.round.remote(current) for region in regions])
        ray.wait([current])
        return time.perf_counter() - started

    with MemorySampler(server) as light:
        seconds = [play_round() for _ in range(options.rounds)]
    with (
        MemorySampler(server, walk=True) as walked,
        MemorySampler(os.getpid(), tree=True, walk=True) as tree,
    ):
        for _ in range(MEMORY_ROUNDS):
            play_round()
    for before, after in zip(initial_model(options), ray.get(current), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-5)  # the mean of equal parameters is the same again
    return PeerRun(
        peer=f"plain ray {ray.__version__}",
        options=options,
        round_s=seconds,
        server_start=light.start,
        server_peak=light.peak.peak(walked.peak),
        tree_peak=tree.peak,
    )


if __name__ == "__main__":
    print(play(PeerOptions.parse("Plain Ray actors that average numpy arrays.")).to_json())
