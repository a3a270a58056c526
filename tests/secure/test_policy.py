"""A region's policy: the rule for thresholds, each refusal by file, key, asked and allowed, and files that are wrong."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import damaged, quick
from xcloud.errors import PolicyError
from xcloud.secure.files import LIMIT
from xcloud.secure.member import minimum_survivors, threshold
from xcloud.secure.policy import PlanFacts, Policy, PrivacyFacts

A, B, C = "a" * 64, "b" * 32, "c" * 64

TEXT = f"""
version: 1
jobs: [clouds, other]
models: [{A}, {B}]
minimum_cohort: 4
colluders: 1
smallest_ring: 16
last_round: 100
privacy: {{unit: example, epsilon: 8, delta: 1e-5}}
"""

FACTS = PlanFacts(
    job="clouds",
    round=7,
    protection="secure_aggregation",
    cohort=("asia", "eu", "sa", "us"),
    model=A,
    threshold=3,
    minimum_survivors=3,
    ring_bits=16,
    privacy=PrivacyFacts("example", 8.0, 1e-5),
)


def policy(text: str = TEXT, folder: Path = Path("/nowhere")) -> Policy:
    return Policy.parse(text.encode(), "policy.yaml", folder)


@pytest.mark.parametrize(("n", "c", "t"), [(3, 0, 2), (4, 1, 3), (8, 2, 6), (16, 5, 11), (64, 21, 43)])
def test_thresholds_of_the_specification(n: int, c: int, t: int) -> None:
    assert threshold(n, c) == t


@given(n=st.integers(2, 200), c=st.integers(0, 199))
@quick
def test_two_sets_of_survivors_share_an_honest_region(n: int, c: int) -> None:
    """Two sets of t among n share at least 2t - n regions, more than c; with one less they need not."""
    t = threshold(n, c)
    assert 2 * t - n > c
    assert 2 * (t - 1) - n <= c
    if c <= n - 2:
        assert t <= n


def test_survivors_hide_one_another() -> None:
    assert [minimum_survivors(c) for c in range(4)] == [3, 3, 4, 5]
    assert minimum_survivors(0, two_regions=True) == 2


def test_what_is_allowed_is_let_through() -> None:
    policy().check(FACTS)
    policy().check(replace(FACTS, job="other", round=100, model=B, threshold=4, ring_bits=32))
    policy().check(replace(FACTS, minimum_survivors=4, privacy=PrivacyFacts("example", 0.1, 0.0)))


@pytest.mark.parametrize(
    ("changes", "key", "asked", "allowed"),
    [
        (dict(job="third"), "jobs", "job 'third'", "clouds, other"),
        (dict(round=101), "last_round", "round 101", "rounds up to 100"),
        (dict(protection="envelope"), "protection", "envelope", "secure_aggregation or stronger"),
        (dict(protection="none"), "protection", "none", "secure_aggregation or stronger"),
        (dict(cohort=("eu", "us")), "minimum_cohort", r"a cohort of 2 \(eu, us\)", "4 or more"),
        (dict(cohort=("eu", "us", "us", "us")), "minimum_cohort", "names a region twice", "each region once"),
        (dict(threshold=2), "colluders", "a threshold of 2 among 4", "3 to 4 with 1 colluders"),
        (dict(threshold=5), "colluders", "a threshold of 5 among 4", "3 to 4"),
        (dict(threshold=None), "colluders", "a threshold of None", "3 to 4"),
        (dict(minimum_survivors=2), "colluders", "2 survivors at least", "3 or more"),
        (dict(minimum_survivors=None), "colluders", "None survivors", "3 or more"),
        (dict(ring_bits=8), "smallest_ring", "a ring of 8 bits", "16 or more"),
        (dict(ring_bits=None), "smallest_ring", "a ring of None bits", "16 or more"),
        (dict(model=C), "models", f"model {C}", "the 2 that the policy lists"),
        (dict(privacy=None), "privacy", "no differential privacy", "epsilon 8 for each example"),
        (
            dict(privacy=PrivacyFacts("region", 1.0, 0.0)),
            "privacy.unit",
            "privacy of each region",
            "privacy of each example",
        ),
        (
            dict(privacy=PrivacyFacts("example", 8.01, 1e-5)),
            "privacy.epsilon",
            "epsilon 8.01 for each example",
            "8 or less",
        ),
        (
            dict(privacy=PrivacyFacts("example", float("nan"), 1e-5)),
            "privacy.epsilon",
            "epsilon nan",
            "8 or less",
        ),
        (
            dict(privacy=PrivacyFacts("example", float("inf"), 1e-5)),
            "privacy.epsilon",
            "epsilon inf",
            "8 or less",
        ),
        (dict(privacy=PrivacyFacts("example", 1.0, 1e-4)), "privacy.delta", "delta 0.0001", "1e-05 or less"),
        (
            dict(privacy=PrivacyFacts("example", 1.0, float("nan"))),
            "privacy.delta",
            "delta nan",
            "1e-05 or less",
        ),
    ],
)
def test_a_refusal_names_file_key_asked_and_allowed(
    changes: dict[str, Any], key: str, asked: str, allowed: str
) -> None:
    with pytest.raises(
        PolicyError,
        match=rf"^policy\.yaml: {key}: the plan asks for .*{asked}.*; this region allows .*{allowed}",
    ):
        policy().check(replace(FACTS, **changes))


def test_after_its_first_round_a_region_goes_on_from_its_own_model_only() -> None:
    """Listed or not: an older model, or one made for this region, would show what its data does to it."""
    policy().check(replace(FACTS, model=C), own_model=C)
    with pytest.raises(PolicyError, match=f"models: .*{A}; .*{C}, which this region holds"):
        policy().check(replace(FACTS, model=A), own_model=C)


def test_any_is_said_and_privacy_may_be_left_out() -> None:
    open_ = policy("version: 1\njobs: any\nmodels: any\n")
    open_.check(replace(FACTS, job="x", model=C, privacy=None, round=10**6))
    with pytest.raises(PolicyError, match="a cohort of 2"):
        open_.check(replace(FACTS, cohort=("eu", "us")))


def test_two_regions_only_where_it_is_said() -> None:
    text = "version: 1\njobs: any\nmodels: any\nminimum_cohort: 2\n"
    with pytest.raises(PolicyError, match=r"minimum_cohort: 2 is too few .* or two_regions: true"):
        policy(text)
    two = policy(text + "two_regions: true\n")
    facts = replace(FACTS, cohort=("eu", "us"), threshold=2, minimum_survivors=2)
    two.check(facts)
    with pytest.raises(PolicyError, match="1 survivors at least"):
        two.check(replace(facts, minimum_survivors=1))
    with pytest.raises(PolicyError, match="2 survivors at least; this region allows 3 or more"):
        two.check(replace(facts, cohort=("asia", "eu", "us")))
    with pytest.raises(PolicyError, match="a threshold of 1 among 2"):
        two.check(replace(facts, threshold=1))


def test_envelopes_need_no_threshold_where_they_are_enough() -> None:
    text = "version: 1\njobs: any\nmodels: any\nprotection: envelope\n"
    facts = replace(FACTS, protection="envelope", threshold=None, minimum_survivors=None, ring_bits=None)
    policy(text).check(facts)
    with pytest.raises(PolicyError, match="asks for none; this region allows envelope or stronger"):
        policy(text).check(replace(facts, protection="none"))
    with pytest.raises(PolicyError, match="a threshold of 1"):
        policy(text).check(replace(FACTS, threshold=1))


def test_models_may_stand_in_a_file_beside_the_policy(tmp_path: Path) -> None:
    (tmp_path / "models.txt").write_text(f"# start models\n\n{A}  # llama\n{B}\n")
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\njobs: any\nmodels: {file: models.txt}\n")
    Policy.load(path).check(FACTS)
    with pytest.raises(PolicyError, match=r"policy\.yaml: models: .*the 2 that the policy lists"):
        Policy.load(path).check(replace(FACTS, model=C))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (A.upper().encode(), "line 1: expected a model's digest"),
        (f"{A}\nabc".encode(), "line 2: expected a model's digest"),
        (b"# nothing\n", "names no model"),
        (b"\xff\xfe", "not text"),
        (b"\n" * (LIMIT + 1), "longer than"),
        (None, "no such file"),
    ],
)
def test_a_wrong_file_of_models_is_named(tmp_path: Path, content: bytes | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "models.txt").write_bytes(content)
    with pytest.raises(PolicyError, match=rf"models\.txt: {problem}"):
        policy("version: 1\njobs: any\nmodels: {file: models.txt}\n", tmp_path)


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_policy_that_others_can_change_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(TEXT)
    path.chmod(mode)
    with pytest.raises(
        PolicyError, match=rf"policy\.yaml: .*change it \(mode {mode:04o}\); run: chmod go-w "
    ):
        Policy.load(path)


def test_a_policy_that_is_missing_is_an_error_and_not_an_open_door(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"policy\.yaml: no such file"):
        Policy.load(tmp_path / "policy.yaml")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "expected a mapping of policy keys, got NoneType"),
        ("[]", "expected a mapping"),
        ("a: [", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("version: 1\njobs: any\n", "models: Field required"),
        ("version: 1\nmodels: any\n", "jobs: Field required"),
        ("jobs: any\nmodels: any\n", "version: Field required"),
        (TEXT + "version: 1\n", "not valid YAML: the key 'version' is given twice"),
        (TEXT + "colluder: 2\n", "colluder: no such key; did you mean 'colluders'"),
        (TEXT + "7: 2\n", "a key of type int; known keys: version, jobs"),
        (TEXT + "tokyo: 2\n", "tokyo: no such key; known keys: version, jobs"),
        (TEXT + "? 0x" + "f" * 9000 + "\n: 2\n", "a key of type int"),
        (TEXT.replace("colluders: 1", "colluders: 0x" + "f" * 9000), "colluders: "),
        (TEXT.replace("last_round: 100", "last_round: 0x" + "f" * 9000), "last_round: "),
        ("#" * (1 << 16) + "\n", "longer than 65536 bytes"),
        (TEXT.replace("version: 1", "version: 2"), "version: "),
        (TEXT.replace("colluders: 1", "colluders: -1"), "colluders: "),
        (TEXT.replace("colluders: 1", "colluders: '1'"), "colluders: "),
        (TEXT.replace("colluders: 1", "colluders: 3"), "minimum_cohort: 4 is too few .* at least 5"),
        (TEXT.replace("minimum_cohort: 4", "minimum_cohort: 1"), "minimum_cohort: "),
        (TEXT + "two_regions: true\n", "two_regions: with two regions and a colluder"),
        (TEXT + "two_regions: 1\n", "two_regions: "),
        (TEXT + "protection: none\n", "protection: "),
        (TEXT.replace("jobs: [clouds, other]", "jobs: []"), "jobs"),
        (TEXT.replace("jobs: [clouds, other]", "jobs: some"), "jobs"),
        (TEXT.replace(f"[{A}, {B}]", "[abc]"), "models"),
        (TEXT.replace(f"[{A}, {B}]", "{path: x}"), "models"),
        (TEXT.replace("epsilon: 8", "epsilon: .inf"), r"privacy\.epsilon: "),
        (TEXT.replace("epsilon: 8", "epsilon: .nan"), r"privacy\.epsilon: "),
        (TEXT.replace("epsilon: 8", "epsilon: 0"), r"privacy\.epsilon: "),
        (TEXT.replace("unit: example, ", ""), r"privacy\.unit: Field required"),
        (TEXT.replace("unit: example", "unit: token"), r"privacy\.unit: "),
        ("jobs: &x [a]\nother: *x", "not valid YAML: no aliases and tags here"),
        ("version: !!int ''", "not valid YAML: no aliases and tags here"),
        ("version: !!python/object/apply:os.system [ls]", "not valid YAML: no aliases and tags here"),
        ("version: 2001-99-99", "not valid YAML"),
    ],
)
def test_a_wrong_policy_is_named_by_file_and_key(text: str, problem: str) -> None:
    with pytest.raises(PolicyError, match=rf"^policy\.yaml: {problem}"):
        policy(text)


def test_a_bomb_of_aliases_goes_off_nowhere() -> None:
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]
    with pytest.raises(PolicyError, match="no aliases"):
        policy("\n".join(lines))


_scraps = st.sampled_from(
    [
        "0_",
        "0b_",
        "0x_",
        "._",
        "=",
        "<<",
        "? ",
        "- ",
        "!!int",
        "2001-99-99",
        "1:99",
        "~",
        "\x00",
        "&a",
        "*a",
        "{",
        "]",
        "\n",
        ": ",
    ]
)


@given(
    data=st.binary(max_size=200)
    | damaged(TEXT.encode())
    | st.lists(_scraps | st.text(max_size=3), max_size=8).map(
        lambda parts: "".join(parts).encode("utf-8", "replace")
    )
)
@quick
def test_no_bytes_raise_anything_but_the_error(data: bytes) -> None:
    with contextlib.suppress(PolicyError):
        Policy.parse(data, "policy.yaml", Path("/nowhere"))
