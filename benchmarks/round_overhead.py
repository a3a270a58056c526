"""One round of three regions, 25M fp32 parameters, no training: beside plain Ray actors and Flower.

Ours is the whole system: driver, region actors, rank actors with live DeepSpeed engines, chunked
upload, aggregation actor, outer step in every region and agreement on digests; only the
inner steps, evaluation and checkpoints are switched off. The floor is plain Ray actors that average numpy
arrays through the object store. Both live in one Ray and their rounds alternate, so that the
machine's moods hit both. Flower's simulation runs in an environment of its own (`python -m benchmarks.peers
install`); without it its figure is null.

The aggregator's memory over one model is what merging adds to the idle process's private memory at
the peak, plus what it owns in the object store (the merged update, once), less one model; measured
on the real actor, fed by 3 and by 12 senders.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from benchmarks.harness import Options, Result
from benchmarks.memory import MemorySampler
from benchmarks.peers import PeerOptions, flower_python, run_peer
from benchmarks.peers.plain_ray import Aggregator, Region, initial_model
from xcloud.aggregation import ClusterAggregation
from xcloud.checkpoint import CheckpointStore
from xcloud.cluster_region import ClusterRegion
from xcloud.config import JobConfig, parse_job
from xcloud.driver import Run
from xcloud.fleet import Fleet
from xcloud.manifest import ChunkLayout
from xcloud.messages import RegionReport, RoundPlan
from xcloud.metrics import RunLog
from xcloud.parts import Bundle, PartWriter
from xcloud.quiet import apply_quiet
from xcloud.transport.blobs import RayBlobs

__all__ = ["run"]

MB = 1e6
TURN, WARM_UP = 5, 3
Array = npt.NDArray[np.float32]

JOB = """
name: round_overhead
seed: {seed}
rounds: 1000000
sequence_length: 32
model:
  config: {{model_type: llama, hidden_size: 512, intermediate_size: 1376, num_hidden_layers: {layers},
           num_attention_heads: 8, num_key_value_heads: 8, max_position_embeddings: 32,
           tie_word_embeddings: true, vocab_size: 257}}
regions:
  - {{name: a, cloud: aws, data: {{type: stdlib, kind: reference}}, pools: [{{zero_stage: 0, micro_batch: 1}}]}}
  - {{name: b, cloud: gcp, data: {{type: stdlib, kind: reference}}, pools: [{{zero_stage: 0, micro_batch: 1}}]}}
  - {{name: c, cloud: azure, data: {{type: stdlib, kind: reference}}, pools: [{{zero_stage: 0, micro_batch: 1}}]}}
inner: {{steps: 0}}
outer: {{type: sgd, lr: 1.0}}
evaluation: {{sequences: 0}}
checkpoint: {{every: 0}}
envelope: null  # plain Ray and Flower seal nothing; what sealing costs is in `secure_round`
"""


def run(options: Options) -> Result:
    """Alternate rounds of ours and of the floor, then Flower, then the aggregator alone."""
    apply_quiet()
    rounds = 10 if options.quick else 40
    job = parse_job(JOB.format(seed=options.seed, layers=8))
    flower = flower_python()
    ray.init(
        address="local",
        num_cpus=8,
        object_store_memory=3 << 30,  # small enough that every process soon has touched all of it
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    try:
        (ours, plain, tuned), parameters = alternate(job, rounds)
        over = {n: aggregator_over_model_mb(job, n, parameters, 3 if options.quick else 8) for n in (3, 12)}
    finally:
        ray.shutdown()
    flower_s = None
    if flower is not None:
        peer = PeerOptions(parameters / 1e6, 3, 4 if options.quick else 8)
        flower_s = run_peer("flower_sim", flower, peer).steady_median_s
    ours_s, plain_s, tuned_s = (statistics.median(seconds) for seconds in (ours, plain, tuned))
    return Result(
        metrics={
            "ours_s": ours_s,
            "plain_ray_s": plain_s,
            "flower_s": flower_s,
            "ratio_to_plain_ray": ours_s / plain_s,
            "tuned_ray_s": tuned_s,
            "ratio_to_tuned_ray": ours_s / tuned_s,
            "aggregator_over_model_n3_mb": over[3],
            "aggregator_over_model_n12_mb": over[12],
        },
        targets={
            "ratio_to_plain_ray": "<= 1.2",
            "flower_s": "> ours_s if measured",
            "aggregator_over_model_n3_mb": "<= 64",
            "aggregator_over_model_n12_mb": "<= 64",
        },
        rows=[
            row("xcloud, whole system", ours),
            row("plain Ray actors", plain),
            row("tuned Ray actors (a limit)", tuned),
            {"tree": "Flower simulation", "median_s": flower_s},
        ],
        notes=[
            f"{parameters:,} fp32 parameters ({4 * parameters / MB:.0f} MB), 3 regions, {rounds} rounds of each, in turns of {TURN}",
            "ours also checks every update for NaN, takes norms and digests, and applies an outer step in every region",
        ],
    )


def row(tree: str, seconds: list[float]) -> dict[str, Any]:
    """Spread of one tree's rounds."""
    low, high = np.percentile(seconds, [10, 90])
    return {"tree": tree, "median_s": statistics.median(seconds), "p10_s": float(low), "p90_s": float(high)}


def alternate(job: JobConfig, rounds: int) -> tuple[list[list[float]], int]:
    """Seconds of each round of ours, the plain and the tuned tree, and the model's size."""
    with tempfile.TemporaryDirectory() as folder, RunLog(Path(folder)) as log:
        names = [region.name for region in job.regions]
        fleet = Fleet(names, lambda name: ClusterRegion(job, name, False, folder), job.failure, log)
        try:
            aggregator = ClusterAggregation(job)
            ours = Run(job, fleet, aggregator, CheckpointStore(folder), log, threading.Event())
            ready = fleet.start(evaluate=False)
            ours.ledger.begin(ready)
            parameters = next(iter(ready.values())).parameters
            peer = PeerOptions(parameters / 1e6, len(names), rounds)
            plain, tuned = Floor(peer, PlainRegion, PlainAggregator), Floor(peer, Region, Aggregator)
            numbers = itertools.count(1)
            plays: list[Callable[[], object]] = [
                lambda: ours.round(next(numbers), final=False),
                plain.round,
                tuned.round,
            ]
            found: list[list[float]] = [[], [], []]
            for turn in range(-WARM_UP, rounds // TURN):
                for play, seconds in zip(plays, found, strict=True):
                    taken = [timed(play) for _ in range(TURN + 1)][
                        1:
                    ]  # the first one finds the others' memory
                    seconds += taken if turn >= 0 else []
            return found, parameters
        finally:
            fleet.close()


def timed(play: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    play()
    return time.perf_counter() - began


@ray.remote(num_cpus=0)
class PlainRegion:
    """A region that returns a fresh copy of the parameters, as a trainer would."""

    def round(self, arrays: list[Array]) -> list[Array]:
        """Take the global parameters, return its own."""
        return [array + 0 for array in arrays]


@ray.remote(num_cpus=0)
class PlainAggregator:
    """Fetches one region after the other and adds in place."""

    def mean(self, refs: list[Any]) -> list[Array]:
        """Mean over the regions, whose parameters come as references."""
        total = [array.copy() for array in ray.get(refs[0])]
        for ref in refs[1:]:
            for mine, array in zip(total, ray.get(ref), strict=True):
                np.add(mine, array, out=mine)
        for mine in total:
            mine /= np.float32(len(refs))
        return total


class Floor:
    """A tree of plain Ray actors, in the Ray that is running."""

    def __init__(self, options: PeerOptions, region: Any, aggregator: Any) -> None:
        self.regions = [region.remote() for _ in range(options.clients)]
        self.aggregator = aggregator.remote()
        self.current = ray.put(initial_model(options))

    def round(self) -> None:
        """One round."""
        self.current = self.aggregator.mean.remote(
            [region.round.remote(self.current) for region in self.regions]
        )
        ray.wait([self.current])


@ray.remote(num_cpus=0)
class Sender:
    """A region's upload without a region: packs chunks of ones."""

    def offer(self, lengths: list[int]) -> Bundle:
        """All chunks."""
        writer = PartWriter(RayBlobs().put, lengths)
        for chunk, length in enumerate(lengths):
            values = writer.slot(length)
            values[:] = 1.0
            writer.add(chunk, values.view(np.uint8))
        return writer.finish()


def aggregator_over_model_mb(job: JobConfig, regions: int, parameters: int, rounds: int) -> float:
    """Peak memory of the real aggregation actor above one model, fed by `regions` senders."""
    lengths = [min(1 << 20, parameters - start) for start in range(0, parameters, 1 << 20)]
    aggregator = ClusterAggregation(job)
    sender_class: Any = Sender
    senders = [sender_class.remote() for _ in range(regions)]
    plan = RoundPlan(job="m", round=1, attempt=1, model_digest="", manifest_digest="", inner_steps=0)
    owned = 0
    with MemorySampler(ray.get(aggregator.actors[0].pid.remote())) as memory:
        for _ in range(rounds):
            bundles = ray.get([sender.offer.remote(lengths) for sender in senders])
            reports = [report(f"r{index}", bundle) for index, bundle in enumerate(bundles)]
            updates = [bundle.handles for bundle in bundles]
            total, _handles = aggregator.merge(
                plan, [ChunkLayout(length) for length in lengths], reports, updates
            ).result()
            owned = total.bytes_down
    ray.kill(aggregator.actors[0])
    for sender in senders:
        ray.kill(sender)
    return (memory.peak.anonymous - memory.start.anonymous + owned - 4 * parameters) / MB


def report(region: str, bundle: Bundle) -> RegionReport:
    """The header of a sender's upload."""
    return RegionReport(
        region=region,
        round=1,
        attempt=1,
        tokens=1,
        train_loss=0.0,
        update_norm=0.0,
        cursor=0,
        chunk_bytes=bundle.sizes,
        parts=bundle.parts,
        compute_s=0.0,
        encode_s=0.0,
        pools=(),
    )


if __name__ == "__main__":
    sys.exit("run it with: python -m benchmarks round_overhead")
