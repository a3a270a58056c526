"""DP-SGD in real engines: the clipped sum of a plain loop, noise of the right size and once, and samples of any size."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch

from tests.factory import job_of, raw_job, region, tiny_model
from tests.training.private_ranks import (
    PICKED,
    STAGES,
    exact_sum,
    private_job,
    sharded,
    start,
    stepped,
    weights,
    write_jobs,
)
from tests.training.workers import start_worker
from xcloud.errors import ConfigError, ModelError, XCloudError
from xcloud.messages import RoundPlan


def plan(round: int, steps: int) -> RoundPlan:
    return RoundPlan(job="t", round=round, attempt=1, model_digest="", manifest_digest="", inner_steps=steps)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    """What two ranks find, under every stage."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[2]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    write_jobs(folder, 2)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.private_ranks", str(folder), str(port), str(rank)],
            env=environment,
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            said, _ = process.communicate(timeout=500)
            assert process.returncode == 0, said[-4000:]
    finally:
        for process in processes:
            process.kill()
    return folder, [torch.load(folder / f"found-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("stage", STAGES)
def test_the_clipped_sum_is_that_of_a_loop(tmp_path: Path, stage: int) -> None:
    """Several micro-batches, the last one not full; then one example, then none."""
    job = private_job(tmp_path, stage, 1, 1e-9)
    worker = start_worker(job)
    for picked in PICKED:
        exact = exact_sum(worker, job, picked)
        found = stepped(worker, picked)
        assert float((found - exact).abs().max()) < 1e-6
        assert float(exact.norm()) >= 0.3 * math.sqrt(len(picked))  # so there was something to get wrong


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_clipped_sum_of_two_ranks(ranks: Any, stage: int) -> None:
    """Rank 1 has one example, or none, where rank 0 goes through three micro-batches."""
    folder, (one, other) = ranks
    job = private_job(folder, stage, 1, 1e-9)
    worker = start_worker(job)
    for number, picked in enumerate(PICKED):
        exact = exact_sum(worker, job, picked + picked[::-1][:1])
        assert float((one[f"{stage}/sum/{number}"] - exact).abs().max()) < 1e-6
        assert torch.equal(one[f"{stage}/sum/{number}"], other[f"{stage}/sum/{number}"])


def test_weights_that_zero_3_takes_away_between_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default small ones stay whole, so that the other tests never gather one in the measuring pass."""
    monkeypatch.setattr(deepspeed, "initialize", sharded(deepspeed.initialize))
    job = private_job(tmp_path, 3, 1, 1e-9)
    worker = start_worker(job)
    assert all(p.numel() == 0 for p in worker.engine.module.parameters())
    for picked in PICKED:
        assert float((stepped(worker, picked) - exact_sum(worker, job, picked)).abs().max()) < 1e-6


def check_noise(first: torch.Tensor, second: torch.Tensor) -> None:
    """Both are N(0, 1) in every coordinate, and have nothing in common; the examples are lost in it."""
    size = first.numel()
    for values in (first, second):
        assert abs(float(values.mean())) < 5 / math.sqrt(size)
        assert float(values.var()) == pytest.approx(1.0, abs=5 * math.sqrt(2 / size))
        kurtosis = float(values.double().pow(4).mean())
        assert kurtosis == pytest.approx(3.0, abs=5 * math.sqrt(96 / size))
        lag = 7
        assert abs(float((values[lag:] * values[:-lag]).mean())) < 5 / math.sqrt(size)
    assert abs(float((first * second).mean())) < 5 / math.sqrt(size)


@pytest.mark.parametrize("stage", STAGES)
def test_noise_of_one_rank(tmp_path: Path, stage: int) -> None:
    """Standard deviation: noise multiplier times clipping norm, here 1, with examples and without. Never the same."""
    job = private_job(tmp_path, stage, 1, 1e3, 1e-3)
    worker, again = start_worker(job), start_worker(job)
    first, second = stepped(worker, PICKED[0]), stepped(worker, [])
    check_noise(first, second)
    check_noise(stepped(again, PICKED[0]), first)  # the same job, resumed: new noise


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_noise_of_two_ranks_is_added_once(ranks: Any, stage: int) -> None:
    """Twice would give variance 2, averaged over the ranks 1/2, only on one rank's share 1 and 0."""
    _, (one, other) = ranks
    assert torch.equal(one[f"{stage}/noise/0"], other[f"{stage}/noise/0"])
    check_noise(one[f"{stage}/noise/0"], one[f"{stage}/noise/1"])
    half = one[f"{stage}/noise/0"].numel() // 2
    check_noise(
        one[f"{stage}/noise/0"][:half], one[f"{stage}/noise/0"][-half:]
    )  # no rank repeats the other's


def test_dropout_is_the_same_in_both_passes(tmp_path: Path) -> None:
    """Or norms would be measured of other gradients than are summed, and the sum of one example be longer than C."""
    config = {"model_type": "gpt2", "n_embd": 24, "n_layer": 1, "n_head": 2, "n_positions": 64}
    config |= {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.0}
    job = private_job(tmp_path, 1, 1, 1e-9).model_copy(
        update={
            "model": job_of(raw_job(tmp_path, [region(tmp_path, "a", 1)], model={"config": config})).model
        }
    )
    worker = start_worker(job)
    for example in range(6):
        assert float(stepped(worker, [example]).norm()) == pytest.approx(0.4, rel=1e-5)


def test_a_small_job_trains(tmp_path: Path) -> None:
    """Through the worker's own rounds: the model gets better, and no training loss leaves it."""
    inner = {"optimizer": {"type": "adamw", "lr": 1e-2}, "steps": 30}
    job = private_job(tmp_path, 1, 1, 0.3, clip=1.0, **inner)
    worker = start_worker(job)
    told: list[float] = []
    worker.progress = lambda _pool, _step, _tokens, loss: told.append(loss)
    before, tokens = worker.evaluate()
    trained = worker.train(plan(1, 30), 0)
    after, _ = worker.evaluate()
    assert after / tokens < before / tokens - 1.0
    assert math.isnan(trained.loss_sum)
    assert all(math.isnan(loss) for loss in told)
    assert trained.tokens == 30 * 4 * 32  # of the expected batches; the real sizes are a secret
    described = worker.describe()
    assert described[4] is not None
    assert described[4].sampling_probability == 4 / described[2]


def test_samples_are_poisson(tmp_path: Path) -> None:
    job = private_job(tmp_path, 0, 1, 1.0)
    private = start_worker(job).private
    assert private is not None
    sizes = np.array([len(private.sample()) for _ in range(2000)])
    assert sizes.mean() == pytest.approx(4.0, abs=5 * 2 / math.sqrt(2000))
    assert sizes.var() == pytest.approx(4.0, rel=0.2)
    assert (sizes == 0).any()
    seen = np.concatenate([private.sample() for _ in range(2000)])
    assert set(private.own) >= set(seen)
    assert len(set(seen)) > 0.8 * len(private.own)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    job = private_job(tmp_path, 0, 1, 1.0)
    assert job.dp is not None
    with pytest.raises(ConfigError, match=r"dp.delta is 0.5, but region 'a' has"):
        start_worker(job.model_copy(update={"dp": job.dp.model_copy(update={"delta": 0.5})}))
    gemma = tiny_model(model_type="gemma3_text", head_dim=10)
    raw = raw_job(tmp_path, [region(tmp_path, "a", 1)], model={"config": gemma})
    with pytest.raises(ModelError, match=r"'model.embed_tokens' \(Gemma3TextScaledWordEmbedding\)"):
        start_worker(job.model_copy(update={"model": job_of(raw).model}))


def test_a_step_without_noise_is_an_error(tmp_path: Path) -> None:
    worker = start_worker(private_job(tmp_path, 1, 1, 1.0))
    worker.engine.basic_optimizer._optimizer_step_pre_hooks.clear()
    with pytest.raises(XCloudError, match="stepped without noise"):
        stepped(worker, [1])


def test_helpers(tmp_path: Path) -> None:
    """The loop that all is measured by does clip, and the ranks' helper starts what a region would."""
    job = private_job(tmp_path, 0, 1, 1e-9)
    worker = start(job, 0, 0)
    assert float(exact_sum(worker, job, [5]).norm()) == pytest.approx(0.4, rel=1e-6)
    assert weights(worker).numel() == worker.manifest.size
