"""FedProx and SCAFFOLD through real engines: the steps of the papers, at every ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.test_equivalence import play_round
from tests.factory import job_of, raw_job, region
from tests.training.workers import MemoryBlobs, start_worker
from xcloud.config import JobConfig
from xcloud.messages import RestoreOrder, RoundPlan
from xcloud.training.correction import COMMON, OWN
from xcloud.training.models import build_model
from xcloud.training.worker import RankWorker

ROUNDS, STEPS, MICRO, LR = 3, 3, 4, 0.3
Model = dict[str, torch.Tensor]


def regions_job(folder: Path, stage: int, correction: Any, **inner: Any) -> JobConfig:
    """Two regions of unlike text, several steps a round, and an outer step that is no average."""
    pool = {"workers": 1, "zero_stage": stage, "micro_batch": MICRO}
    regions = [region(folder, name, seed, pool) for seed, name in enumerate("ab", 1)]
    settings: dict[str, Any] = {
        "steps": STEPS,
        "optimizer": {"type": "sgd", "lr": LR},
        "schedule": "cosine",
        "clip_norm": None,
        "correction": correction,
    }
    outer = {"type": "nesterov", "lr": 0.9, "momentum": 0.3}
    return job_of(raw_job(folder, regions, rounds=ROUNDS, inner=settings | inner, outer=outer))


def play(workers: list[RankWorker], rounds: range) -> None:
    for number in rounds:
        play_round(workers, number, STEPS)


def reference(job: JobConfig, workers: list[RankWorker], mu: float, scaffold: bool) -> Model:
    """Both algorithms as the papers write them; SCAFFOLD with option II and a running server control."""
    model = build_model(job.model, 257, job.seed)
    named = dict(model.named_parameters())

    def zeros() -> Model:
        return {n: torch.zeros_like(p) for n, p in named.items()}

    anchor, momentum = {n: p.detach().clone() for n, p in named.items()}, zeros()
    c, own = zeros(), [zeros() for _ in workers]
    for number in range(ROUNDS):
        rates = [LR * job.inner.schedule.factor(number * STEPS + k, ROUNDS * STEPS) for k in range(STEPS)]
        deltas, changes = [], []
        for worker, c_i in zip(workers, own, strict=True):
            with torch.no_grad():
                for n, p in named.items():
                    p.copy_(anchor[n])
            for k, rate in enumerate(rates):
                at = (number * STEPS + k) * MICRO
                batch = worker._batch(worker.store.train, worker.order.indices(at, MICRO))
                gradients = torch.autograd.grad(
                    model(input_ids=batch, labels=batch).loss, list(named.values())
                )
                with torch.no_grad():
                    for (n, p), g in zip(named.items(), gradients, strict=True):
                        p.sub_(rate * (g + mu * (p - anchor[n]) + (c[n] - c_i[n])))
            deltas.append({n: anchor[n] - p.detach() for n, p in named.items()})
            new = {n: c_i[n] - c[n] + deltas[-1][n] / sum(rates) for n in named}
            changes.append({n: new[n] - c_i[n] for n in named})
            if scaffold:
                c_i.update(new)
        for n in named:
            mean = sum(d[n] for d in deltas) / len(workers)
            momentum[n] = 0.3 * momentum[n] + mean
            anchor[n] = anchor[n] - 0.9 * (mean + 0.3 * momentum[n])
            if scaffold:
                c[n] = c[n] + sum(change[n] for change in changes) / len(workers)
    return anchor


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("correction", [{"type": "fedprox", "mu": 0.5}, {"type": "scaffold"}], ids=str)
def test_rounds_as_the_paper_says(tmp_path: Path, stage: int, correction: dict[str, Any]) -> None:
    job = regions_job(tmp_path, stage, correction)
    shared = MemoryBlobs()
    workers = [start_worker(job, r.name, shared) for r in job.regions]
    play(workers, range(1, ROUNDS + 1))
    scaffold = correction["type"] == "scaffold"
    expected = reference(job, workers, correction.get("mu", 0.0), scaffold)
    plain = reference(job, workers, 0.0, False)
    moved = 0.0
    for name, value in expected.items():
        for worker in workers:
            assert torch.allclose(worker.parameters.read(name), value.reshape(-1), rtol=0, atol=1e-5), name
        moved = max(moved, float((value - plain[name]).abs().max()))
    assert moved > 3e-4, "the correction makes a difference that the comparison can see"


def test_the_drift_corrections_of_all_regions_cancel(tmp_path: Path) -> None:
    """c is the mean of the c_i, although it was never sent."""
    job = regions_job(tmp_path, 1, "scaffold")
    shared = MemoryBlobs()
    workers = [start_worker(job, r.name, shared) for r in job.regions]
    play(workers, range(1, 3))
    for spec in workers[0].manifest.parameters:
        common = [w.parameters.read(spec.name, COMMON) for w in workers]
        own = [w.parameters.read(spec.name, OWN) for w in workers]
        assert torch.equal(common[0], common[1])
        assert not torch.equal(own[0], own[1])
        assert torch.allclose((own[0] + own[1]) / 2, common[0], rtol=0, atol=1e-5), spec.name


def test_a_region_that_was_absent_keeps_its_own_control(tmp_path: Path) -> None:
    job = regions_job(tmp_path, 0, "scaffold")
    shared = MemoryBlobs()
    here, away = (start_worker(job, r.name, shared) for r in job.regions)
    play([here, away], range(1, 2))
    name = here.manifest.parameters[0].name
    before = [w.parameters.read(name, OWN).clone() for w in (here, away)]
    total, merged = play_round([here], 2, STEPS)
    away.apply(total, merged)
    assert not torch.equal(here.parameters.read(name, OWN), before[0])
    assert torch.equal(away.parameters.read(name, OWN), before[1])
    assert torch.equal(here.parameters.read(name, COMMON), away.parameters.read(name, COMMON))


@pytest.mark.parametrize("stages", [(0, 0), (2, 2), (2, 3)], ids=str)
def test_controls_resume(tmp_path: Path, stages: tuple[int, int]) -> None:
    """Two rounds, a checkpoint and one more by other workers equal three, bit for bit under the same stage."""
    jobs = [regions_job(tmp_path, stage, "scaffold") for stage in stages]
    url = str(tmp_path / "checkpoints")
    shared = MemoryBlobs()
    first, second = ([start_worker(job, r.name, shared) for r in job.regions] for job in jobs)
    play(first, range(1, 3))
    files = [f for number, w in enumerate(first) for f in w.save(url, 2, donor=number == 0)]
    order = RestoreOrder(round=2, inner_round=2, cursor=0, model_digest="", files=tuple(files))
    for worker in second:
        worker.restore(url, order)
    for workers in (first, second):
        play(workers, range(3, 4))
    for one, other in zip(first, second, strict=True):
        for spec in one.manifest.parameters:
            for key in (None, COMMON, OWN):
                a, b = one.parameters.read(spec.name, key), other.parameters.read(spec.name, key)
                assert torch.equal(a, b) or stages[0] != stages[1]
                assert torch.allclose(a, b, rtol=0, atol=1e-5), (spec.name, key)


@pytest.mark.parametrize("optimizer", [{"type": "adamw", "lr": 1e-2}, {"type": "muon", "lr": 1e-2}], ids=str)
def test_fedprox_is_a_decay_towards_the_anchor_under_other_optimizers(
    tmp_path: Path, optimizer: dict[str, Any]
) -> None:
    """At mu = 1 / lr every step starts from the anchor again, so that only the last one is seen."""
    bound, free = (
        start_worker(regions_job(tmp_path, 1, correction, optimizer=optimizer, schedule="constant"))
        for correction in ({"type": "fedprox", "mu": 100.0}, None)
    )
    plan = RoundPlan(job="t", round=1, attempt=1, model_digest="", manifest_digest="", inner_steps=STEPS)
    anchor = {s.name: free.parameters.read(s.name).clone() for s in free.manifest.parameters}
    for worker in (bound, free):
        worker.train(plan, 0)
    away = [torch.cat([w.parameters.read(n) - a for n, a in anchor.items()]).norm() for w in (bound, free)]
    assert 0 < away[0] < 0.6 * away[1]
