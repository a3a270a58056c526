"""A region's own policy: what it takes part in, whatever a plan asks for.

A plan is signed by the driver, and the driver may be wrong, or not honest. So a region checks every plan against a
file of its own before it does anything. The file is strict YAML; `docs/security.md` explains each key.

Thresholds follow Bonawitz et al. 2017 (eprint 2017/281) against a malicious server (`secure.member.threshold`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from xcloud.errors import PolicyError
from xcloud.registry import nearest
from xcloud.secure.files import explain, read_file
from xcloud.secure.member import minimum_survivors, threshold
from xcloud.strict_yaml import PlainLoader

__all__ = ["PlanFacts", "Policy", "PrivacyFacts", "Protection", "minimum_survivors"]

Protection = Literal["none", "envelope", "secure_aggregation"]
"""Who can read a single region's update: anybody on the way, the aggregator, nobody. Each includes the one before."""

Unit = Literal["example", "region"]

MOST_BYTES = 1 << 16
"""Of a policy file: YAML is read slowly."""
MOST_REGIONS = 4096

_RANK: dict[Protection, int] = {"none": 0, "envelope": 1, "secure_aggregation": 2}

Hash = Annotated[str, Field(pattern=r"^([0-9a-f]{32}){1,2}$")]


@dataclass(frozen=True)
class PrivacyFacts:
    """What differential privacy will have cost the region after the round, all rounds together."""

    unit: Unit
    epsilon: float
    delta: float


@dataclass(frozen=True)
class PlanFacts:
    """What a plan asks for.

    Attributes:
        cohort: names of the regions that take part.
        model: digest of the model that the round starts from, in hexadecimal digits.
        threshold, minimum_survivors, ring_bits: of secure aggregation; None without it.
        one_opens_all: every region has the key that opens every update (`secure.ckks`).
        privacy: None where nothing is private.
    """

    job: str
    round: int
    protection: Protection
    cohort: tuple[str, ...]
    model: str
    threshold: int | None = None
    minimum_survivors: int | None = None
    ring_bits: int | None = None
    one_opens_all: bool = False
    privacy: PrivacyFacts | None = None


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _ModelFile(_Section):
    file: Annotated[str, Field(min_length=1)]


class _Budget(_Section):
    unit: Unit
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    delta: Annotated[float, Field(ge=0, lt=1)]


Jobs = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False, min_length=1)]
Models = Annotated[tuple[Hash, ...], Field(strict=False, min_length=1)]


class _Rules(_Section):
    """The file."""

    version: Literal[1]
    jobs: Literal["any"] | Jobs
    models: Literal["any"] | _ModelFile | Models
    protection: Literal["envelope", "secure_aggregation"] = "secure_aggregation"
    minimum_cohort: Annotated[int, Field(ge=2, le=MOST_REGIONS)] = 3
    colluders: Annotated[int, Field(ge=0, lt=MOST_REGIONS)] = 0
    two_regions: bool = False
    smallest_ring: Annotated[int, Field(ge=2, le=64)] = 2
    last_round: Annotated[int, Field(ge=1, lt=1 << 63)] | None = None
    privacy: _Budget | None = None

    @model_validator(mode="after")
    def _consistent(self) -> _Rules:
        if self.two_regions and self.colluders:
            raise ValueError(
                "two_regions: with two regions and a colluder nothing is hidden; set colluders: 0"
            )
        least = minimum_survivors(self.colluders, self.two_regions)
        if self.minimum_cohort < least:
            raise ValueError(
                f"minimum_cohort: {self.minimum_cohort} is too few with colluders: {self.colluders}; "
                f"expected at least {least}"
                + (
                    ""
                    if self.colluders
                    else ", or two_regions: true, which lets each of two see the other's update"
                )
            )
        return self


class Policy:
    """The rules of one region. Made by `load` or `parse`."""

    def __init__(self, rules: _Rules, models: frozenset[str] | None, origin: str) -> None:
        self.origin = origin
        self._rules = rules
        self._models = models

    @classmethod
    def load(cls, path: Path) -> Policy:
        """Read a policy file, and the file of models that it names (relative to its own folder).

        Raises:
            PolicyError: names the file, the key, and what was expected.
        """
        return cls.parse(read_file(path, PolicyError, pinned=True), str(path), path.parent)

    @classmethod
    def parse(cls, data: bytes, origin: str, folder: Path) -> Policy:
        """Like `load`, from YAML; `origin` names it in errors."""
        if len(data) > MOST_BYTES:
            raise PolicyError(
                f"{origin}: longer than {MOST_BYTES} bytes; put models into a file of their own"
            )
        try:
            raw = yaml.load(data, Loader=PlainLoader)  # noqa: S506 - a SafeLoader subclass  # nosec B506
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as problem:
            raise PolicyError(f"{origin}: not valid YAML: {' '.join(str(problem).split())}") from None
        if not isinstance(raw, dict):
            raise PolicyError(f"{origin}: expected a mapping of policy keys, got {type(raw).__name__}")
        _check_keys(raw, origin)
        try:
            rules = _Rules.model_validate(raw)
        except ValidationError as problem:
            raise PolicyError(f"{origin}: {explain(problem)}") from None
        return cls(rules, _models(rules, folder), origin)

    def check(self, facts: PlanFacts, own_model: str | None = None) -> None:
        """Refuse a plan that the policy forbids.

        Args:
            facts: what the plan asks for.
            own_model: the model that this region holds from the round before. The plan must start from it.
                None in the first round of a job: then `models` decides.

        Raises:
            PolicyError: names the file, the key, what was asked for and what is allowed.
        """
        rules = self._rules
        if rules.jobs != "any" and facts.job not in rules.jobs:
            self._refuse("jobs", f"job {facts.job!r}", ", ".join(rules.jobs))
        if rules.last_round is not None and facts.round > rules.last_round:
            self._refuse("last_round", f"round {facts.round}", f"rounds up to {rules.last_round}")
        if _RANK[facts.protection] < _RANK[rules.protection]:
            self._refuse("protection", facts.protection, f"{rules.protection} or stronger")
        self._check_cohort(facts.cohort)
        if facts.protection == "secure_aggregation":
            self._check_aggregation(facts)
        self._check_model(facts.model, own_model)
        self._check_privacy(facts.privacy)

    def _check_cohort(self, cohort: tuple[str, ...]) -> None:
        rules, names = self._rules, ", ".join(cohort)
        if len(set(cohort)) < len(cohort):
            self._refuse(
                "minimum_cohort", f"a cohort that names a region twice ({names})", "each region once"
            )
        if len(cohort) < rules.minimum_cohort:
            self._refuse(
                "minimum_cohort", f"a cohort of {len(cohort)} ({names})", f"{rules.minimum_cohort} or more"
            )

    def _check_aggregation(self, facts: PlanFacts) -> None:
        rules, regions = self._rules, len(facts.cohort)
        if facts.one_opens_all and rules.colluders:
            self._refuse(
                "colluders", "scheme ckks, with which one colluder opens every update", "scheme masks"
            )
        least = threshold(regions, rules.colluders)
        if facts.threshold is None or not least <= facts.threshold <= regions:
            self._refuse(
                "colluders",
                f"a threshold of {facts.threshold} among {regions}",
                f"{least} to {regions} with {rules.colluders} colluders",
            )
        least = minimum_survivors(rules.colluders, rules.two_regions and regions == 2)
        if facts.minimum_survivors is None or facts.minimum_survivors < least:
            self._refuse(
                "colluders",
                f"{facts.minimum_survivors} survivors at least",
                f"{least} or more with {rules.colluders} colluders",
            )
        if facts.ring_bits is None or facts.ring_bits < rules.smallest_ring:
            self._refuse(
                "smallest_ring", f"a ring of {facts.ring_bits} bits", f"{rules.smallest_ring} or more"
            )

    def _check_model(self, model: str, own_model: str | None) -> None:
        if own_model is not None:
            if model != own_model:
                self._refuse("models", f"model {model}", f"{own_model}, which this region holds")
        elif self._models is not None and model not in self._models:
            self._refuse("models", f"model {model}", f"the {len(self._models)} that the policy lists")

    def _check_privacy(self, facts: PrivacyFacts | None) -> None:
        budget = self._rules.privacy
        if budget is None:
            return
        if facts is None:
            self._refuse(
                "privacy", "no differential privacy", f"epsilon {budget.epsilon:g} for each {budget.unit}"
            )
        if facts.unit != budget.unit:
            self._refuse("privacy.unit", f"privacy of each {facts.unit}", f"privacy of each {budget.unit}")
        if not facts.epsilon <= budget.epsilon:
            self._refuse(
                "privacy.epsilon",
                f"epsilon {facts.epsilon:g} for each {facts.unit} in all",
                f"{budget.epsilon:g} or less",
            )
        if not facts.delta <= budget.delta:
            self._refuse("privacy.delta", f"delta {facts.delta:g}", f"{budget.delta:g} or less")

    def _refuse(self, key: str, asked: str, allowed: str) -> NoReturn:
        raise PolicyError(f"{self.origin}: {key}: the plan asks for {asked}; this region allows {allowed}")


def _check_keys(raw: dict[Any, Any], origin: str) -> None:
    """Name the nearest key for one that does not exist, before anything else is said about the file."""
    known = list(_Rules.model_fields)
    for key in raw:
        if not isinstance(key, str):
            raise PolicyError(f"{origin}: a key of type {type(key).__name__}; known keys: {', '.join(known)}")
        if key not in known:
            guess = nearest(key, known)
            hint = f"did you mean {guess!r}?" if guess else f"known keys: {', '.join(known)}"
            raise PolicyError(f"{origin}: {key}: no such key; {hint}")


def _models(rules: _Rules, folder: Path) -> frozenset[str] | None:
    """The hashes that a first round may start from; None: any."""
    if isinstance(rules.models, str):
        return None
    if isinstance(rules.models, tuple):
        return frozenset(rules.models)
    try:
        path = folder / rules.models.file
        lines = read_file(path, PolicyError, pinned=True).decode().splitlines()
    except UnicodeDecodeError:
        raise PolicyError(f"{path}: not text") from None
    found = set()
    for number, line in enumerate(lines, start=1):
        digits = line.partition("#")[0].strip()
        if digits and not re.fullmatch("([0-9a-f]{32}){1,2}", digits):
            raise PolicyError(
                f"{path}: line {number}: expected a model's digest, 32 or 64 hexadecimal digits in lower case"
            )
        if digits:
            found.add(digits)
    if not found:
        raise PolicyError(f"{path}: names no model; expected a digest a line")
    return frozenset(found)
