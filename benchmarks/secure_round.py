"""A whole job with secure aggregation on, beside the same job in the clear: round time, and the loss it ends with.

Three regions with real engines on this machine. Jobs in the clear (no masks, no envelopes), jobs in envelopes, and masked
ones, which travel in envelopes too, alternate, each in a process of its own, with the same seed, data and codec. `time_ratio` is the masked rounds' median wall time over that of the rounds in the clear,
the first round of each job left out (it loads code), `envelope_ratio` that of the rounds in envelopes; `loss_difference` is the largest over rounds of |masked held-out loss -
loss in the clear|.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import BenchmarkError, Options, Result
from xcloud.metrics import RoundRow, read_events, read_rounds

__all__ = ["run"]

JOB = """
name: secure-round
seed: {seed}
rounds: {rounds}
sequence_length: 128
model:
  config: {{model_type: llama, hidden_size: 192, intermediate_size: 512, num_hidden_layers: 6, num_attention_heads: 4,
           num_key_value_heads: 4, max_position_embeddings: 128, tie_word_embeddings: true}}
regions:
  - {{name: east, cloud: aws, data: {{type: stdlib, kind: modules}}, pools: [{{zero_stage: 0, micro_batch: 4}}]}}
  - {{name: west, cloud: gcp, data: {{type: stdlib, kind: tests}}, pools: [{{zero_stage: 0, micro_batch: 4}}]}}
  - {{name: north, cloud: azure, data: {{type: stdlib, kind: reference}}, pools: [{{zero_stage: 0, micro_batch: 4}}]}}
inner: {{steps: {steps}, optimizer: {{type: adamw, lr: 1e-3}}}}
codec: {{type: fixed, ring: 16}}
chunk_size: 262144
evaluation: {{sequences: 12}}
checkpoint: {{every: 0}}
{secure}
"""
KINDS = {"clear": "envelope: null", "envelope": "", "masked": "secure_aggregation: {colluders: 0}"}


def run(options: Options) -> Result:
    """Turns of a job in the clear, of one in envelopes and of a masked one."""
    rounds, steps, turns = (4, 4, 1) if options.quick else (8, 8, 3)
    played: dict[str, list[list[RoundRow]]] = {kind: [] for kind in KINDS}
    for _ in range(turns):
        for name, secure in KINDS.items():
            text = JOB.format(seed=options.seed, rounds=rounds, steps=steps, secure=secure)
            played[name].append(play(text))
    walls = {
        name: [row.compute_s + row.sync_s for rows in runs for row in rows[1:]]
        for name, runs in played.items()
    }
    pairs = zip(played["clear"][0], played["masked"][0], strict=True)
    differences = [abs((a.eval_loss or 0.0) - (b.eval_loss or 0.0)) for a, b in pairs]
    sent = next(iter(played["masked"][0][-1].regions.values()))
    return Result(
        metrics={
            "time_ratio": statistics.median(walls["masked"]) / statistics.median(walls["clear"]),
            "envelope_ratio": statistics.median(walls["envelope"]) / statistics.median(walls["clear"]),
            "loss_difference": max(differences),
            "clear_round_s": statistics.median(walls["clear"]),
            "masked_round_s": statistics.median(walls["masked"]),
            "clear_sync_s": statistics.median(row.sync_s for rows in played["clear"] for row in rows[1:]),
            "envelope_sync_s": statistics.median(
                row.sync_s for rows in played["envelope"] for row in rows[1:]
            ),
            "masked_sync_s": statistics.median(row.sync_s for rows in played["masked"] for row in rows[1:]),
            "bytes_up": sent.bytes_up,
        },
        targets={"time_ratio": "<= 1.25", "loss_difference": "<= 0.001"},
        rows=[summary(name, runs) for name, runs in played.items()],
        notes=[
            f"3 regions, rounds of {steps} steps of 4 x 128 tokens, {turns} x {rounds - 1} rounds of each kind",
            "fixed point in a ring of 16 bits both times; the ring's sum is exact, so equal losses are expected",
        ],
    )


def summary(name: str, runs: list[list[RoundRow]]) -> dict[str, Any]:
    """A row of the table."""
    rows = [row for played in runs for row in played[1:]]
    return {
        "job": name,
        "round_s": statistics.median(row.compute_s + row.sync_s for row in rows),
        "inner_s": statistics.median(row.compute_s for row in rows),
        "sync_s": statistics.median(row.sync_s for row in rows),
        "eval_loss": runs[0][-1].eval_loss,
    }


def play(text: str) -> list[RoundRow]:
    """The rows of one run, from the command in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.yaml").write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "xcloud", "train", str(folder / "job.yaml"), "--json"]
        done = subprocess.run(
            [*command, "--run-dir", str(folder / "run")], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BenchmarkError(f"xcloud train ended with {done.returncode}: {done.stderr[-800:]}")
        kinds = {event.kind for event in read_events(folder / "run")}
        if kinds & {"round_retried", "region_failed", "region_refused"}:
            raise BenchmarkError("a region failed, so the times of this run mean nothing")
        return read_rounds(folder / "run")
