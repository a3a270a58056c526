"""What a finished run leaves behind: records that agree, sharding that shows, a model that speaks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from tests.e2e.conftest import ROUNDS, Finished
from tests.e2e.test_equivalence import committed_model
from xcloud.cli import app
from xcloud.metrics import read_events, read_rounds
from xcloud.secure.primitives import TAG_BYTES


def test_rows_events_and_tensorboard_agree(finished: Finished) -> None:
    rows = read_rounds(finished.run_dir)
    assert [row.round for row in rows] == list(range(1, ROUNDS + 1))
    assert rows[-1].model_digest == finished.record.model_digest
    assert sum(row.tokens for row in rows) == finished.record.tokens == ROUNDS * 2 * (2 * 2 + 3) * 32
    parameters = next(
        e.fields["parameters"] for e in read_events(finished.run_dir) if e.kind == "region_ready"
    )
    sealed = 4 * parameters + TAG_BYTES * -(-parameters // finished.raw["chunk_size"])
    assert all(row.bytes_up == row.bytes_down == 2 * sealed for row in rows)
    losses = [row.eval_loss for row in rows]
    assert losses[-1] is not None
    assert finished.record.eval_loss_start is not None
    assert losses[-1] < finished.record.eval_loss_start
    board = EventAccumulator(str(finished.run_dir / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss/eval")] == list(range(1, ROUNDS + 1))


def test_two_ranks_really_share_the_optimizer(finished: Finished) -> None:
    """Each rank of the pair holds about half of what a rank alone holds."""
    sharding = {
        e.fields["region"]: [rank["optimizer_state_bytes"] for rank in e.fields["pools"][0]]
        for e in read_events(finished.run_dir)
        if e.kind == "region_sharding"
    }
    (alone,) = sharding["single"]
    assert len(sharding["pair"]) == 2
    for held in sharding["pair"]:
        assert 0.45 * alone < held < 0.55 * alone


def test_checkpoints_are_kept_as_told(finished: Finished) -> None:
    kept = sorted(path.name for path in (finished.run_dir / "checkpoints").iterdir())
    assert kept == [f"round-{ROUNDS - 1:06d}", f"round-{ROUNDS:06d}"]


def test_export_generates_text(finished: Finished, tmp_path: Path) -> None:
    """`xcloud export`, then plain transformers."""
    done = CliRunner().invoke(app, ["export", str(finished.run_dir), str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output.splitlines()[-1])["round"] == ROUNDS
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    flat, start = torch.from_numpy(committed_model(finished.run_dir)), 0
    for name, parameter in sorted(model.named_parameters()):
        expected = flat[start : start + parameter.numel()].view(parameter.shape)
        assert torch.equal(parameter.detach(), expected), name
        start += parameter.numel()
    prompt = words("the cloud", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert words.decode(out[0]).startswith("the cloud")
    assert out.shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_status(finished: Finished, options: list[str]) -> None:
    done = CliRunner().invoke(app, ["status", str(finished.run_dir), *options])
    assert done.exit_code == 0, done.output
    assert "finished" in done.output
