"""What a region keeps on its machine, at work: its policy file and its journal stand between a signed plan and its update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xcloud.errors import KeyFileError, PolicyError, ReplayError, SecurityError
from xcloud.secure.guard import Guard
from xcloud.secure.local import make_keys, open_driver, open_guard
from xcloud.secure.messages import PLAN, SignedPlan, SyncPlan
from xcloud.secure.settings import SecureConfig

HELD = "a" * 32
"""The model that the region holds."""


def held(plan: SyncPlan) -> None:
    if plan.model != HELD:
        raise SecurityError("another model")


@pytest.fixture
def config(tmp_path: Path) -> SecureConfig:
    make_keys(tmp_path / "keys", ["asia", "eu", "us"])
    return SecureConfig(keys=str(tmp_path / "keys"))


def guard(config: SecureConfig, policy: str | None = None, reached: bool = False) -> Guard:
    if policy is not None:
        (Path(str(config.keys)) / "us.policy.yaml").write_text(policy)
    return open_guard(config, "us", {"us": 1.0}, 16, held, reached=lambda: reached)


def plan(config: SecureConfig, **changes: Any) -> bytes:
    identity, roster = open_driver(config)
    asked = dict(
        job="clouds",
        round=1,
        attempt=1,
        roster=roster.hash.hex(),
        cohort=("asia", "eu", "us"),
        threshold=2,
        minimum=3,
        model=HELD,
        manifest="b" * 32,
        update="c" * 32,
        chunks=(0, 4),
    )
    text = SyncPlan.model_validate({**asked, **changes}).to_wire()
    return SignedPlan(plan=text, signature=identity.sign(PLAN, text)).to_wire()


ANY = "version: 1\njobs: any\nmodels: any\n"


def opened(door: Guard, config: SecureConfig, **changes: Any) -> bytes:
    return door.answer("open", changes.get("round", 1), plan(config, **changes))


def test_without_a_policy_the_job_decides(config: SecureConfig) -> None:
    assert opened(guard(config), config)


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        (ANY.replace("jobs: any", "jobs: [other]"), "jobs: the plan asks for job 'clouds'"),
        (ANY.replace("models: any", f"models: [{'d' * 32}]"), "models: the plan asks for model a"),
        (ANY + "minimum_cohort: 4\n", r"minimum_cohort: the plan asks for a cohort of 3 \(asia, eu, us\)"),
        (ANY + "colluders: 1\n", "colluders: the plan asks for a threshold of 2 among 3"),
        (ANY + "smallest_ring: 32\n", "smallest_ring: the plan asks for a ring of 16 bits"),
        (ANY + "privacy: {unit: example, epsilon: 8, delta: 1e-5}\n", "privacy: the plan asks for no"),
    ],
)
def test_a_regions_policy_speaks_whatever_the_job_says(
    config: SecureConfig, policy: str, problem: str
) -> None:
    with pytest.raises(PolicyError, match=rf"us\.policy\.yaml: {problem}"):
        opened(guard(config, policy), config)


def test_a_list_of_models_is_for_the_first_model_whatever_its_round_is_called(config: SecureConfig) -> None:
    rules = ANY.replace("models: any", f"models: [{'d' * 32}]")
    door = guard(config, rules)
    for number in (1, 2):
        with pytest.raises(PolicyError, match="models"):
            opened(door, config, round=number)
    door._member.memory.close()  # type: ignore[attr-defined]
    later = guard(config, rules, reached=True)  # by a sum that was signed, or an endorsement
    assert opened(later, config, round=2)
    with pytest.raises(SecurityError, match="another model"):
        opened(later, config, round=3, model="d" * 32)


def test_a_wrong_policy_keeps_the_region_from_starting(config: SecureConfig) -> None:
    with pytest.raises(
        PolicyError, match=r"us\.policy\.yaml: colluder: no such key; did you mean 'colluders'"
    ):
        guard(config, ANY + "colluder: 1\n")


def test_what_was_refused_is_not_remembered_and_what_was_accepted_is(config: SecureConfig) -> None:
    door = guard(config, ANY + "last_round: 5\n")
    with pytest.raises(PolicyError, match="last_round"):
        opened(door, config, round=6)
    assert opened(door, config, round=5)
    door._member.memory.close()  # type: ignore[attr-defined]
    with pytest.raises(ReplayError, match="a plan is not replayed"):
        opened(guard(config), config, round=5)


def test_another_roster_is_refused(config: SecureConfig) -> None:
    with pytest.raises(KeyFileError, match=r"roster\.json: its hash is .*, the plan is for roster 00"):
        opened(guard(config), config, roster="00" * 32)
