"""The pareto benchmark's arithmetic, its choice for the targets, its recipes and its plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from benchmarks import pareto
from benchmarks.pareto import GOALS, RECIPES, Played, Recipe, best_gap, gaps_of, job_of, kept, plot, row
from benchmarks.scatter import Goal, Point, scatter
from xcloud.config import JobConfig

MODEL = {"config": {"model_type": "llama"}}
FIXED = Recipe(
    "four bits", "inner: {steps: 5}\nouter: {type: sgd, lr: 1.0}\ncodec: {type: fixed, bits: 4}", 2
)


def played(loss: float, up: int = 0, down: int = 0) -> Played:
    return Played(loss, up, down, 1.0)


def test_a_gap_is_relative_and_against_the_same_seed() -> None:
    assert gaps_of([played(2.02), played(3.0)], [played(2.0), played(4.0), played(9.0)]) == pytest.approx(
        [0.01, -0.25]
    )


def test_a_row_counts_what_went_up_and_down() -> None:
    baselines = {"adamw": [played(2.0), played(4.0)]}
    made = row(FIXED, [played(2.02, 30, 10), played(4.2, 30, 10)], baselines, exchanged=4000)
    assert made["bytes_ratio"] == 100
    assert (made["bytes_up"], made["bytes_down"]) == (30, 10)
    assert made["loss_gap"] == pytest.approx(0.03)
    assert made["spread"] == pytest.approx(0.04)
    assert (made["linear"], made["steps"], made["inner"], made["seeds"]) == (True, 5, "adamw", 2)


def test_muon_is_held_against_both_data_parallel_runs() -> None:
    recipe = Recipe("m", "inner: {steps: 5, optimizer: {type: muon}}")
    baselines = {"adamw": [played(2.0)], "muon": [played(1.6)]}
    made = row(recipe, [played(1.8, 1, 1)], baselines, exchanged=10)
    assert made["loss_gap"] == pytest.approx(-0.1)
    assert made["gap_same_inner"] == pytest.approx(0.125)
    assert made["spread"] is None


def line(gap: float, ratio: float, linear: bool = False, seeds: int = 3) -> dict[str, Any]:
    return {"loss_gap": gap, "bytes_ratio": ratio, "linear": linear, "seeds": seeds}


def test_a_target_takes_the_best_recipe_that_saves_enough() -> None:
    rows = [
        line(-0.5, 99),
        line(0.02, 100),
        line(0.01, 400, linear=True),
        line(0.0, 500),
        line(-1, 900, seeds=1),
    ]
    assert best_gap(rows, 100, linear=False, seeds=3) == 0.0
    assert best_gap(rows, 100, linear=True, seeds=3) == 0.01
    assert best_gap(rows, 401, linear=True, seeds=3) is None


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_is_a_job_of_the_same_steps_as_all_others(recipe: Recipe) -> None:
    job = job_of(recipe.text, 3, pareto.STEPS, MODEL, 192)
    assert job.rounds * job.inner.steps == pareto.STEPS
    assert (job.seed, len(job.regions)) == (3, 3)
    assert len({region.evaluate_on for region in job.regions}) == 1
    assert job.evaluation.every == job.rounds


def test_steps_that_are_no_whole_number_of_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="7 steps are no whole number of rounds of 5"):
        job_of(FIXED.text, 0, 7, MODEL, 8)


def test_every_target_has_recipes_to_meet_it_with() -> None:
    for _, _, linear in GOALS.values():
        assert any(recipe.seeds == 3 and (recipe.linear or not linear) for recipe in RECIPES)


def test_a_run_that_is_kept_is_not_played_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pareto, "RUNS", tmp_path)
    folders = []

    def trainer(job: JobConfig, folder: Path) -> Played:
        folders.append(folder)
        return played(float(job.seed), 5, 7)

    first = job_of(FIXED.text, 1, 10, MODEL, 8)
    other = job_of(FIXED.text, 2, 10, MODEL, 8)
    assert [kept("x", job, trainer) for job in (first, other, first)] == [
        played(1.0, 5, 7),
        played(2.0, 5, 7),
        played(1.0, 5, 7),
    ]
    assert len(set(folders)) == len(folders) == 2


def test_the_plot_shows_every_row_and_target() -> None:
    rows = [
        {**line(0.004, 107.0, linear=True), "recipe": "four <bits>", "inner": "adamw", "spread": 0.002},
        {**line(-0.03, 2100.0), "recipe": "sparse", "inner": "muon", "spread": None},
    ]
    root = ET.fromstring(plot(rows))
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"four <bits>", "sparse", "1,000x", "<= 1 % at >= 400x, linear"} <= texts


def test_points_lie_where_their_values_say_and_labels_keep_apart() -> None:
    points = [
        Point(10.0, 0.0, "first", "a", True),
        Point(10.5, 0.0, "second", "a", False),
        Point(1000.0, 5.0, "far", "a", True),
    ]
    text = scatter("t", "x", "y", points, [Goal(100, 1, "goal")], [("a", "#000")], ("filled", "hollow"))
    root = ET.fromstring(text)
    tag = "{http://www.w3.org/2000/svg}"
    marks = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in root.iter(f"{tag}circle")][: len(points)]
    assert marks[0][0] < marks[1][0] < marks[2][0]
    assert marks[0][1] == marks[1][1] > marks[2][1]
    labels = {e.text: e for e in root.iter(f"{tag}text") if e.text in ("first", "second")}
    places = {(e.get("x"), e.get("y"), e.get("text-anchor")) for e in labels.values()}
    assert len(places) == 2
