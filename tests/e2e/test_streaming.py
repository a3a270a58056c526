"""Fragments, overlap and buffered merging with real engines; then through actors, on several ranks and pools."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import play
from tests.e2e.test_equivalence import committed_model
from tests.factory import job_of, raw_job, region
from tests.training.workers import MemoryBlobs, start_worker
from xcloud.aggregators import MeanConfig
from xcloud.export import export_run
from xcloud.messages import RoundPlan, RoundSum
from xcloud.metrics import read_rounds
from xcloud.parts import Bundle, PartReader, PartWriter
from xcloud.training.spec import Landed
from xcloud.training.worker import RankWorker

STEPS, OVERLAP, ALPHA, LR = 3, 1, 0.25, 0.3
INNER: dict[str, Any] = {
    "steps": STEPS,
    "optimizer": {"type": "sgd", "lr": LR},
    "schedule": "constant",
    "clip_norm": None,
}


def test_streaming_is_what_the_paper_says(tmp_path: Path) -> None:
    """Two regions, two fragments, merges that land one step into the next round; beside a plain loop."""
    regions = [region(tmp_path, name, seed) for seed, name in enumerate("ab", 1)]
    streaming = {"fragments": 2, "overlap": OVERLAP, "alpha": ALPHA}
    outer = {"type": "sgd", "lr": 0.5}
    raw = raw_job(tmp_path, regions, inner=INNER, streaming=streaming, outer=outer)
    shared = MemoryBlobs()
    workers = [start_worker(job_of(raw), name, shared) for name in "ab"]
    expected = plain_loop([start_worker(job_of(raw), name) for name in "ab"], rounds=4)
    landing: tuple[RoundSum, Bundle] | None = None
    for number in range(1, 5):
        plan = plan_of(workers[0], number, number - 1 if landing else None)
        threads, landed = [], dict[str, Landed]()
        for worker in workers if landing else []:
            threads.append(threading.Thread(target=deliver, args=(worker, landing, landed)))
            threads[-1].start()
        offers = [worker.work(plan, (number - 1) * STEPS * 4, 1.0)[1] for worker in workers]
        for thread in threads:
            thread.join()
        assert not landing or landed["a"].digests == landed["b"].digests
        landing = merged(workers, number, [offer.bundle for offer in offers])
    assert landing is not None
    for worker in workers:
        worker.apply(*landing)
    for worker, model in zip(workers, expected, strict=True):
        for name, value in model.items():
            found = worker.parameters.read(name)
            assert torch.allclose(found, value, rtol=0, atol=2e-6), name


def plan_of(worker: RankWorker, number: int, landing: int | None) -> RoundPlan:
    chunks = worker.manifest.fragments[(number - 1) % 2]
    return RoundPlan(
        job="t",
        round=number,
        attempt=1,
        model_digest="",
        manifest_digest="",
        inner_steps=STEPS,
        chunks=(chunks.start, chunks.stop),
        landing=landing,
    )


def deliver(worker: RankWorker, landing: tuple[RoundSum, Bundle], landed: dict[str, Landed]) -> None:
    landed[worker.spec.region] = worker.deliver(*landing)


def merged(workers: list[RankWorker], number: int, bundles: list[Bundle]) -> tuple[RoundSum, Bundle]:
    """The mean of the offers, as the aggregator sends it."""
    lengths = [size // 4 for size in bundles[0].sizes]
    writer = PartWriter(workers[0].blobs.put, lengths)
    readers = [PartReader(w.blobs.get, bundle) for w, bundle in zip(workers, bundles, strict=True)]
    for chunk, length in enumerate(lengths, start=bundles[0].first):
        out = writer.slot(length)
        MeanConfig().build().combine([r.read(chunk).view(np.float32) for r in readers], [0.5, 0.5], out)
        writer.add(chunk, out.view(np.uint8))
    bundle = writer.finish()
    total = RoundSum(
        round=number,
        attempt=1,
        regions=("a", "b"),
        weights=(0.5, 0.5),
        chunk_bytes=bundle.sizes,
        parts=bundle.parts,
        norm=None,
        fold_s=0.0,
    )
    return total, bundle


def plain_loop(workers: list[RankWorker], rounds: int) -> list[dict[str, torch.Tensor]]:
    """The algorithm in ten lines, on bare models: no chunks, no codec, no messages."""
    models = [{n: p.detach().clone() for n, p in w.parameters.named.items()} for w in workers]
    anchor = {n: p.clone() for n, p in models[0].items()}
    spans = workers[0].manifest.fragments
    fragment = {
        spec.name: next(i for i, span in enumerate(spans) if segments[0].chunk in span)
        for spec, segments in zip(workers[0].manifest.parameters, workers[0].manifest.segments, strict=True)
    }
    waits: dict[str, torch.Tensor] = {}

    def land() -> None:
        for name, gradient in waits.items():
            anchor[name] -= 0.5 * gradient
            for model in models:
                model[name] = ALPHA * model[name] + (1 - ALPHA) * anchor[name]

    for number in range(rounds):
        for step in range(STEPS):
            if step == OVERLAP:
                land()
                waits = {}
            for worker, model in zip(workers, models, strict=True):
                at = (number * STEPS + step) * 4
                batch = worker._batch(worker.store.train, worker.order.indices(at, 4))
                leaves = {n: p.requires_grad_() for n, p in model.items()}
                loss = torch.func.functional_call(
                    worker.engine.module, leaves, (), {"input_ids": batch, "labels": batch}
                ).loss
                for (name, leaf), slope in zip(
                    leaves.items(), torch.autograd.grad(loss, list(leaves.values())), strict=True
                ):
                    model[name] = (leaf - LR * slope).detach()
        waits = {
            name: sum(anchor[name] - model[name] for model in models) / len(models)
            for name in anchor
            if fragment[name] == number % 2
        }
    land()
    return [{n: p.reshape(-1) for n, p in model.items()} for model in models]


def job(folder: Path, **changes: Any) -> dict[str, Any]:
    """A region of two pools with three ranks, and one under ZeRO-3."""
    regions = [
        region(
            folder,
            "two-pools",
            1,
            {"workers": 2, "zero_stage": 2, "micro_batch": 2},
            {"workers": 1, "zero_stage": 1, "micro_batch": 2},
        ),
        region(folder, "sharded", 2, {"workers": 1, "zero_stage": 3, "micro_batch": 4}),
    ]
    return raw_job(folder, regions, **changes)


@pytest.mark.slow
def test_overlap_through_actors_resumes_bit_for_bit(tmp_path: Path) -> None:
    """With a codec that adds: 2 + 2 rounds equal 4, whole commit, local models and residuals included."""
    raw = job(
        tmp_path,
        rounds=4,
        streaming={"fragments": 2, "overlap": 1},
        codec={"type": "fixed", "bits": 4},
        checkpoint={"every": 2},
        evaluation={"sequences": 8, "every": 2},
    )
    whole = play(raw, tmp_path / "whole")
    assert play(raw, tmp_path / "parts", stop_after=2).round == 2
    assert play(raw, tmp_path / "parts", resume=True) == whole
    rows = read_rounds(tmp_path / "whole")
    assert [row.round for row in rows] == [1, 2, 3, 4]
    assert [row.eval_loss is None for row in rows] == [True, False, True, False]
    sizes = {row.regions["sharded"].bytes_up for row in rows}
    assert len(sizes) == 2  # one fragment a round
    landed = [row.regions["sharded"].landing_s for row in rows]
    assert landed[1] > 0  # the first round's merge landed in the second
    exported = export_run(tmp_path / "whole", tmp_path / "exported")  # parameters in the order of fragments
    committed = {
        n: v for n, v in load_file(exported.out / "model.safetensors").items() if n != "lm_head.weight"
    }
    assert sum(v.numel() for v in committed.values()) == exported.parameters
    flat = committed_model(tmp_path / "whole")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        value = committed[name].reshape(-1).numpy()
        at = next(
            i for i in range(flat.size - value.size + 1) if flat[i] == value[0] and flat[i + 1] == value[1]
        )
        assert np.array_equal(flat[at : at + value.size], value)


def test_a_buffered_run_through_actors(tmp_path: Path) -> None:
    """Regions merge one by one, each with updates of older models; both hold the same model in the end."""
    raw = job(tmp_path, rounds=5, buffer={"goal": 1}, codec="e3m0", downlink={"type": "block", "bits": 4})
    record = play(raw, tmp_path / "run")
    rows = read_rounds(tmp_path / "run")
    assert record.round == 5
    assert sum(len(row.regions) for row in rows) >= 5
    for row in rows:
        for part in row.regions.values():
            assert part.bytes_down > 0
    last = rows[-1]
    assert last.eval_loss is not None
