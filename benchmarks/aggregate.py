"""How fast the aggregation actor folds updates, and what that costs in memory, with 3 and with 64 regions.

The real actor is fed by senders that pack encoded chunks into the object store, as regions do. `fold_mb_per_s`
is the fp32-equivalent of what it folds (4 bytes a value and region) over its own CPU seconds, so per core. Memory
is what merging adds to the idle process's private memory at the peak, plus what it owns in the object store,
less one model in fp32.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import psutil
import ray

from benchmarks.harness import Options, Result
from benchmarks.memory import MemorySampler
from benchmarks.round_overhead import report
from xcloud.aggregation import ClusterAggregation
from xcloud.config import JobConfig, parse_job
from xcloud.manifest import ChunkLayout
from xcloud.messages import RoundPlan
from xcloud.parts import Bundle, PartWriter
from xcloud.quiet import apply_quiet
from xcloud.transport.blobs import RayBlobs
from xcloud.update import Framing, UpdatePath

__all__ = ["run"]

MB = 1e6
CHUNK = 1 << 20
WARM_UP = 4
"""Merges that load code and touch the object store's pages for the first time; a run has thousands after them."""

JOB = """
name: aggregate
rounds: 1
model: {{config: {{model_type: llama}}}}
codec: {codec}
envelope: null  # the fold alone; what sealing costs is in `secure_round`
regions: [{regions}]
"""
CODECS = {
    "identity": "identity",
    "fixed 8": "{type: fixed, bits: 8}",
    "fixed 4": "{type: fixed, bits: 4}",
    "topk": "topk",
}


def run(options: Options) -> Result:
    """Fold with every codec from 3 regions, then with one that adds up from 64."""
    apply_quiet()
    values = (4 if options.quick else 24) << 20
    rounds = WARM_UP + (2 if options.quick else 12)
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=4 << 30,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    try:
        rows = [measure(name, 3, values, rounds) for name in CODECS]
        rows += [measure(name, 64, values, rounds) for name in ("identity", "fixed 4", "topk")]
    finally:
        ray.shutdown()
    found = {(row["codec"], row["regions"]): row for row in rows}
    return Result(
        metrics={
            "fold_mb_per_s": found["identity", 3]["fold_mb_per_s"],
            "fold_fixed4_mb_per_s": found["fixed 4", 3]["fold_mb_per_s"],
            "fold_topk_mb_per_s": found["topk", 3]["fold_mb_per_s"],
            "peak_over_model_n3_mb": found["identity", 3]["peak_over_model_mb"],
            "peak_over_model_n64_mb": found["identity", 64]["peak_over_model_mb"],
            "peak_over_model_topk_n3_mb": found["topk", 3]["peak_over_model_mb"],
            "peak_over_model_topk_n64_mb": found["topk", 64]["peak_over_model_mb"],
        },
        targets={
            "fold_mb_per_s": ">= 2000",
            "fold_fixed4_mb_per_s": ">= 2000",
            "fold_topk_mb_per_s": ">= 2000",
            "peak_over_model_n3_mb": "<= 64",
            "peak_over_model_n64_mb": "<= 64",
            "peak_over_model_topk_n3_mb": "<= 64",
            "peak_over_model_topk_n64_mb": "<= 64",
        },
        rows=rows,
        notes=[
            f"{values:,} fp32 values ({4 * values / MB:.0f} MB), {rounds - WARM_UP} merges each, after {WARM_UP}",
            "every region's update stands in the object store of the same machine; 64 regions share 3 buffers",
        ],
    )


def job_of(codec: str, regions: int) -> JobConfig:
    """A job that is never trained."""
    pool = "{zero_stage: 0}"
    names = ", ".join(
        f"{{name: r{i}, cloud: c, data: {{type: stdlib, kind: reference}}, pools: [{pool}]}}"
        for i in range(regions)
    )
    return parse_job(JOB.format(codec=CODECS[codec], regions=names))


@ray.remote(num_cpus=0)
class Sender:
    """A region's upload without a region."""

    def offer(self, name: str, codec: str, regions: int, lengths: list[int]) -> Bundle:
        """Encoded chunks of noise."""
        job, layout = job_of(codec, regions), tuple(ChunkLayout(length) for length in lengths)
        framing = Framing(job.name, job.seed, regions, name)
        path = UpdatePath(job.codec.build(), job.downlink.build(), framing, layout, range(len(lengths)))
        writer = PartWriter(RayBlobs().put, lengths)
        numbers = np.random.default_rng([*name.encode()])
        noise = 1e-3 * numbers.standard_normal(max(lengths), dtype=np.float32)
        for chunk, length in enumerate(lengths):
            delta = writer.slot(length)
            delta[:] = noise[:length]
            writer.add(chunk, path.encode(1, chunk, delta, 1.0))
        return writer.finish()


def measure(codec: str, regions: int, values: int, rounds: int) -> dict[str, Any]:
    """One codec and cohort."""
    job = job_of(codec, regions)
    lengths = [min(CHUNK, values - start) for start in range(0, values, CHUNK)]
    aggregator = ClusterAggregation(job)
    sender_class: Any = Sender
    senders = [sender_class.remote() for _ in range(3)]
    plan = RoundPlan(job="m", round=1, attempt=1, model_digest="", manifest_digest="", inner_steps=0)
    bundles: list[Bundle] = ray.get(
        [sender.offer.remote(f"r{i}", codec, regions, lengths) for i, sender in enumerate(senders)]
    )
    sent = [bundles[i % len(bundles)] for i in range(regions)]
    reports = [report(f"r{i}", bundle) for i, bundle in enumerate(sent)]
    process = psutil.Process(ray.get(aggregator.actors[0].pid.remote()))
    layout = [ChunkLayout(length) for length in lengths]
    folded, busy_s, owned = 0, 0.0, 0
    with MemorySampler(process.pid) as memory:
        for number in range(rounds):
            before = process.cpu_times()
            total, _handles = aggregator.merge(plan, layout, reports, [b.handles for b in sent]).result()
            after = process.cpu_times()
            owned = total.bytes_down
            if number >= WARM_UP:
                busy_s += after.user + after.system - before.user - before.system
                folded += 4 * values * regions
    peak = memory.peak.anonymous - memory.start.anonymous + owned - 4 * values
    ray.kill(aggregator.actors[0])
    for sender in senders:
        ray.kill(sender)
    return {
        "codec": codec,
        "regions": regions,
        "fold_mb_per_s": folded / busy_s / MB,
        "peak_over_model_mb": peak / MB,
    }
