"""A region's own policy holds for every job, masked or not, and knows what its data has given away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.merging import job_of
from xcloud.errors import PolicyError
from xcloud.messages import PrivacyTerms
from xcloud.privacy.accounting import Mechanism, epsilon_of
from xcloud.region import Region
from xcloud.secure.keyring import Keyring
from xcloud.secure.local import open_policy

RULES = "version: 1\njobs: any\nmodels: any\nminimum_cohort: 3\n"
TERMS = PrivacyTerms(unit="example", sampling_probability=0.01, noise_multiplier=1.0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a region's policy lies when no job says otherwise."""
    monkeypatch.setenv("XCLOUD_KEYS", str(tmp_path / "keys"))
    Keyring(tmp_path / "keys").make(["r0"])
    return tmp_path / "keys"


def region_of(folder: Path, rules: str, **changes: Any) -> Region:
    path = folder / "r0.policy.yaml"
    path.write_text(rules)
    path.chmod(0o600)
    region = Region(job_of(**changes), "r0", "tag", enforce_labels=False)
    region.policy = open_policy("r0", None, region.job.envelope)
    region.model_digest = "d" * 32
    return region


def test_a_region_that_asks_for_masks_takes_no_part_without(folder: Path) -> None:
    with pytest.raises(PolicyError, match=r"r0.policy.yaml: protection"):
        region_of(folder, RULES)._allow(1, "d" * 32)


def test_a_region_that_asks_for_envelopes_takes_no_part_in_the_clear(folder: Path) -> None:
    rules = RULES + "protection: envelope\n"
    region_of(folder, rules)._allow(1, "d" * 32)
    with pytest.raises(PolicyError, match=r"r0.policy.yaml: protection"):
        region_of(folder, rules, envelope=None)._allow(1, "d" * 32)


def test_without_a_policy_all_is_allowed(folder: Path) -> None:
    region = region_of(folder, RULES)
    (folder / "r0.policy.yaml").unlink()
    region.policy = open_policy("r0", None, region.job.envelope)
    region._allow(1, "d" * 32)


def test_the_budget_of_a_regions_data_ends_its_part(folder: Path) -> None:
    dp = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-5}
    steps = 10
    after = [epsilon_of([Mechanism(0.01, 1.0, steps * rounds)], 1e-5) for rounds in range(1, 9)]
    allowed = (after[4] + after[5]) / 2  # five rounds and not six
    rules = f"{RULES}protection: envelope\nprivacy:\n  unit: example\n  epsilon: {allowed}\n  delta: 1.0e-5\n"
    region = region_of(folder, rules, dp=dp, inner={"steps": steps, "clip_norm": None})
    region.terms = TERMS
    region._allow(5, "d" * 32)
    with pytest.raises(PolicyError, match=r"privacy.epsilon: the plan asks for epsilon"):
        region._allow(6, "d" * 32)
    region._repeated = 1  # a round was trained twice: what it released counts twice
    with pytest.raises(PolicyError, match=r"privacy.epsilon"):
        region._allow(5, "d" * 32)


def test_a_job_without_noise_does_not_pass_a_budget(folder: Path) -> None:
    rules = f"{RULES}protection: envelope\nprivacy:\n  unit: example\n  epsilon: 8.0\n  delta: 1.0e-5\n"
    with pytest.raises(PolicyError, match="privacy: the plan asks for no differential privacy"):
        region_of(folder, rules)._allow(1, "d" * 32)


def test_a_model_that_the_region_does_not_hold_is_refused(folder: Path) -> None:
    region = region_of(folder, RULES + "protection: envelope\n")
    region._reached = True
    with pytest.raises(PolicyError, match="models"):
        region._allow(2, "e" * 32)


def test_a_first_model_is_looked_up_whatever_the_round_is_called(folder: Path) -> None:
    """A driver that begins with round 2 has no more choice than one that begins with round 1."""
    rules = RULES.replace("models: any", f"models: [{'a' * 32}]") + "protection: envelope\n"
    region = region_of(folder, rules)
    for number in (1, 2):
        with pytest.raises(PolicyError, match="models"):
            region._allow(number, "d" * 32)
    region._reached = True
    region._allow(2, "d" * 32)


def test_a_round_that_is_asked_for_again_and_again_spends_the_budget(folder: Path) -> None:
    dp = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-5}
    region = region_of(folder, RULES, dp=dp, inner={"steps": 10, "clip_norm": None})
    region.terms = TERMS
    region._latest, region._repeated = 5, 3  # rounds 1 to 5, and three of them once more
    spent = region._privacy_after(1)
    assert spent is not None
    assert spent.epsilon == epsilon_of([Mechanism(0.01, 1.0, 10 * 9)], 1e-5)
