"""A round that ends early: between two steps, on all ranks at once, and what was trained is offered."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.factory import job_of, raw_job, region
from tests.training.workers import start_worker
from xcloud.messages import RoundPlan

PLAN = RoundPlan(job="t", round=1, attempt=1, model_digest="", manifest_digest="", inner_steps=5)


def ranks(telling: int, at: int) -> list[list[int]]:
    """Steps that each of two ranks takes in two rounds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.training.halting_ranks", str(port)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(telling), str(at)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [[int(word) for word in text.split()] for text in said]


@pytest.mark.parametrize(("telling", "at"), [(0, 7), (1, 20), (1, 49)])
def test_ranks_stop_at_the_same_step_whoever_is_told(telling: int, at: int) -> None:
    one, other = ranks(telling, at)
    assert one == other
    assert one[0] in range(at + 1, min(51, at + 4))  # it takes a step from the word to the stop
    assert one[1] in (1, 2)


def test_a_round_that_ends_early_offers_what_it_has(tmp_path: Path) -> None:
    job = job_of(raw_job(tmp_path, [region(tmp_path, "a", 1, {"market": "spot", "micro_batch": 2})]))
    worker = start_worker(job)
    whole = worker.train(PLAN, 0)
    assert (whole.done, whole.steps, whole.tokens) == (5, 5, 5 * 2 * 32)
    worker.discard()
    worker.halt()
    cut = worker.train(PLAN, 0)
    assert (cut.done, cut.steps, cut.tokens) == (1, 1, 2 * 32)
    assert worker.offer(PLAN, 1.0).norm_squared > 0


def test_a_pool_that_stays_has_nothing_to_halt(tmp_path: Path) -> None:
    worker = start_worker(job_of(raw_job(tmp_path, [region(tmp_path, "a", 1)])))
    assert worker.train(PLAN, 0).done == 5
    with pytest.raises(AssertionError, match="may be taken away"):
        worker.halt()
