"""What a region keeps on its own machine for secure aggregation: its key, the roster, its policy, its journal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from xcloud.errors import KeyFileError, PolicyError
from xcloud.secure.guard import Guard
from xcloud.secure.identity import Identity, Roster
from xcloud.secure.identity import Member as Entry
from xcloud.secure.journal import Journal
from xcloud.secure.keyring import Keyring, default_folder
from xcloud.secure.member import Member
from xcloud.secure.messages import SyncPlan
from xcloud.secure.policy import PlanFacts, Policy, PrivacyFacts
from xcloud.secure.post import EnvelopeConfig
from xcloud.secure.settings import SecureConfig
from xcloud.secure.vault import Vault

__all__ = ["DRIVER", "make_keys", "open_driver", "open_guard", "open_policy", "open_vault"]

DRIVER = "driver"
ROSTER = "roster.json"
WAIT_S = 20.0
"""For the process of this region that was here before: it is killed, and takes a moment to die."""


def make_keys(folder: Path, regions: Sequence[str]) -> None:
    """Keys and a roster for one run on one machine, unless they are there already.

    Who starts the run holds all of them: this shows how it works, and protects nobody from that person.
    """
    if (folder / ROSTER).exists():
        return
    keys = Keyring(folder).make([DRIVER, *regions])
    entries = [
        Entry(name=key.name, role="driver" if key.name == DRIVER else "region", key=key.key) for key in keys
    ]
    Roster.of(entries).save(folder / ROSTER)


def open_driver(config: SecureConfig) -> tuple[Identity, Roster]:
    """The driver's identity, and everybody's public keys.

    Raises:
        SecurityError: names the file that is missing or wrong.
    """
    folder = _folder(config)
    return Keyring(folder).load(DRIVER), _roster(folder)


def open_guard(
    config: SecureConfig,
    name: str,
    shares: Mapping[str, float],
    ring_bits: int,
    check: Callable[[SyncPlan], None],
    privacy: Callable[[int], PrivacyFacts | None] = lambda _: None,
    reached: Callable[[], bool] = lambda: False,
) -> Guard:
    """A region's door; what it must not forget is in `NAME.journal`, and `NAME.policy.yaml`, if it is there, says what it allows
    whatever the job says.

    Args:
        config: of the job.
        name: of the region.
        shares: of the weight, of every region of the job.
        ring_bits: of the integers that are added.
        check: raises for a plan that is not for what the region holds.
        privacy: what differential privacy will have cost after a round.
        reached: whether the region came to its model by a sum that was signed, or an endorsement; else it is a first model.

    Raises:
        SecurityError: names the file that is missing or wrong.
    """
    folder = _folder(config)
    identity, roster = Keyring(folder).load(name), _roster(folder)
    policy = open_policy(name, config, None)

    def allowed(plan: SyncPlan) -> None:
        if plan.roster != roster.hash.hex():
            raise KeyFileError(
                f"{folder / ROSTER}: its hash is {roster.hash.hex()[:12]}, the plan is for roster {plan.roster[:12]}"
            )
        roster.member(DRIVER, "driver")
        for region in plan.cohort:  # the driver's own key, or an aggregator's, would be one more colluder
            roster.member(region, "region")
        _check(config, plan)
        check(plan)
        if policy is not None:
            # After the first round `check` has compared the model with the one that the region holds.
            facts = _facts(plan, ring_bits, privacy(plan.round))
            policy.check(facts, own_model=plan.model if reached() else None)

    journal = Journal(folder / f"{name}.journal", name, WAIT_S)
    return Guard(Member(identity, roster, journal, allowed), shares, config.survivors)


def open_vault(
    job: str, name: str, masked: SecureConfig | None, sealed: EnvelopeConfig | None
) -> Vault | None:
    """What seals a region's checkpoints: its identity does, where it has one that outlives the process.

    Raises:
        SecurityError: names the file that is missing or wrong.
    """
    if masked is not None:
        return Vault.of(Keyring(_folder(masked)).load_all(name), job, strict=True)
    if sealed is not None and sealed.keys is not None:
        return Vault.of(Keyring(Path(sealed.keys).expanduser()).load_all(name), job, strict=True)
    return None


def _check(config: SecureConfig, plan: SyncPlan) -> None:
    """Refuse a plan that asks for less than the job promises."""
    needed = config.threshold(len(plan.cohort))
    if plan.threshold < needed:
        raise PolicyError(
            f"plan of round {plan.round}: threshold {plan.threshold} of {len(plan.cohort)} regions, expected at least "
            f"{needed} with {config.colluders} that may collude"
        )
    if plan.scheme != config.scheme:
        raise PolicyError(
            f"plan of round {plan.round}: its scheme is {plan.scheme}, the job says {config.scheme}"
        )
    if config.verify and not plan.tagged:
        raise PolicyError(
            f"plan of round {plan.round}: it leaves out the tags that the job promises (verify)"
        )
    if plan.minimum < config.survivors or len(plan.cohort) < config.survivors:
        raise PolicyError(
            f"plan of round {plan.round}: a sum of {min(plan.minimum, len(plan.cohort))} of {len(plan.cohort)} regions "
            f"could be opened, expected at least {config.survivors}"
        )


def open_policy(name: str, masked: SecureConfig | None, sealed: EnvelopeConfig | None) -> Policy | None:
    """What a region allows whatever a job says: `NAME.policy.yaml` beside its keys, or in the folder where keys are by default.

    Raises:
        PolicyError: names the file and what is wrong with it.
    """
    folder = default_folder()
    if masked is not None:
        folder = _folder(masked)
    elif sealed is not None and sealed.keys is not None:
        folder = Path(sealed.keys).expanduser()
    path = folder / f"{name}.policy.yaml"
    return Policy.load(path) if path.exists() else None


def _facts(plan: SyncPlan, ring_bits: int, privacy: PrivacyFacts | None) -> PlanFacts:
    return PlanFacts(
        job=plan.job,
        round=plan.round,
        protection="secure_aggregation",
        cohort=plan.cohort,
        model=plan.model,
        threshold=plan.threshold,
        minimum_survivors=plan.minimum,
        ring_bits=ring_bits,
        privacy=privacy,
        one_opens_all=plan.scheme == "ckks",
    )


def _folder(config: SecureConfig) -> Path:
    return Path(config.keys).expanduser() if config.keys else default_folder()


def _roster(folder: Path) -> Roster:
    return Roster.load(folder / ROSTER)
