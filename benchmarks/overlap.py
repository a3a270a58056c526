"""How much of its time a region spends in inner steps, on a link as slow as training is fast.

Two regions, each with a raylet in a network namespace of its own; the aggregator sits at the hub. First a few rounds
without shaping measure how long the inner steps of a round take. Then the links get the rate at which a plain DiLoCo
sync (fp32, up and down, one after the other) takes just as long, and the same model trains, for the same steps:

* plain: fp32, all of the model at once, regions wait for the merged update;
* streaming, fp32: the same bytes, a fragment at a time, taken up in the next round;
* streaming, 4 bit: Streaming DiLoCo as published (arXiv 2501.18512), E3M0 up and 4-bit blocks down.

The share is the seconds of inner steps over wall time, from the second round on (the first one loads code) to the last
merge, which waits for its transfer; both come from the run's own records.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import BenchmarkError, Options, Result
from benchmarks.wan import ShapedCables, Wan, wan
from xcloud.metrics import RoundRow, read_events, read_rounds

__all__ = ["run"]

SITES = ("east", "west")
FRAGMENTS = 2

JOB = """
name: overlap
seed: {seed}
rounds: {rounds}
sequence_length: 128
model:
  config: {{model_type: llama, hidden_size: 192, intermediate_size: 512, num_hidden_layers: 6, num_attention_heads: 4,
           num_key_value_heads: 4, max_position_embeddings: 128, tie_word_embeddings: true}}
regions:
  - {{name: east, cloud: aws, data: {{type: stdlib, kind: reference}},
     pools: [{{zero_stage: 0, micro_batch: 4, labels: {{site: east}}}}]}}
  - {{name: west, cloud: gcp, data: {{type: stdlib, kind: reference}},
     pools: [{{zero_stage: 0, micro_batch: 4, labels: {{site: west}}}}]}}
inner: {{steps: {steps}, optimizer: {{type: adamw, lr: 1e-3}}}}
chunk_size: 262144
evaluation: {{sequences: 0}}
checkpoint: {{every: 0, url: {url}}}
{more}
"""

PLAIN = ""
STREAMING = f"streaming: {{fragments: {FRAGMENTS}, overlap: %d}}\n"
RECIPES = {
    "plain": PLAIN,
    "streaming, fp32": STREAMING,
    "streaming, 4 bit": STREAMING + "codec: e3m0\ndownlink: {type: block, bits: 4}\n",
}


def run(options: Options) -> Result:
    """Measure the inner steps, shape the links, then play each recipe."""
    steps, syncs = (8, 2) if options.quick else (24, 16)
    with wan(SITES) as network:
        free = play(network, options, PLAIN, rounds=3, steps=steps)
        compute_s = sum(row.compute_s for row in free[1:]) / len(free[1:])
        sent = free[-1].regions[SITES[0]]
        rate = 8 * (sent.bytes_up + sent.bytes_down) / compute_s / 1e6
        network.cables.shape(rate)
        rows = [measured(name, network, options, more, steps, syncs, rate) for name, more in RECIPES.items()]
    share = {row["recipe"]: row["inner_share"] for row in rows}
    return Result(
        metrics={
            "inner_share": share["streaming, 4 bit"],
            "inner_share_fp32": share["streaming, fp32"],
            "inner_share_without": share["plain"],
            "link_mbit_per_s": rate,
        },
        targets={"inner_share": ">= 0.95", "inner_share_without": "<= 0.65"},
        rows=rows,
        notes=[
            f"{sent.bytes_up // 4:,} fp32 parameters, {syncs} syncs of the whole model ({max(2, syncs // 4)} without overlap), {steps} inner steps each",
            "rate limited by the kernel (tc tbf) on both ends of each region's cable; no delay, no loss",
        ],
    )


def measured(
    name: str, network: Wan[ShapedCables], options: Options, more: str, steps: int, syncs: int, rate: float
) -> dict[str, Any]:
    """One recipe on the shaped links."""
    fragments = FRAGMENTS if more else 1
    each = steps // fragments
    overlap = each - 1
    syncs = syncs if more else max(2, syncs // 4)  # plain rounds are slow, and all alike
    rows = play(network, options, more % overlap if more else more, rounds=syncs * fragments, steps=each)
    rows = rows[1:]
    inner_s = sum(row.compute_s for row in rows)
    wall_s = inner_s + sum(row.sync_s for row in rows)
    first = [row.regions[SITES[0]] for row in rows]
    return {
        "recipe": name,
        "inner_share": inner_s / wall_s,
        "wall_s": wall_s,
        "inner_s": inner_s,
        "bytes_up": sum(row.bytes_up for row in first),
        "bytes_down": sum(row.bytes_down for row in first),
        "rate_mbit_per_s": rate,
    }


def play(network: Wan[ShapedCables], options: Options, more: str, rounds: int, steps: int) -> list[RoundRow]:
    """The rows of one run, from the command in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = JOB.format(
            seed=options.seed, rounds=rounds, steps=steps, more=more, url=folder / "checkpoints"
        )
        (folder / "job.yaml").write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "xcloud", "train", str(folder / "job.yaml"), "--json"]
        command += ["--address", network.address, "--run-dir", str(folder / "run")]
        done = subprocess.run(command, env=network.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(f"xcloud train ended with {done.returncode}: {done.stderr[-800:]}")
        kinds = {event.kind for event in read_events(folder / "run")}
        if kinds & {"round_retried", "region_failed"}:
            raise BenchmarkError("a region failed, so the times of this run mean nothing")
        return read_rounds(folder / "run")
