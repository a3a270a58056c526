"""From a job to what it will take: its scenario, from an earlier run or from assumptions, and what else it could be.

`facts_of` lays the model out on torch's meta device (no weights), `measured_in` reads speeds out of a run folder,
`scenario_of` puts them together for `cost.model`, and `axes_of` lists the alternatives for `cost.planner`. Bytes are those of
the codecs themselves: each is asked to encode a chunk of noise.
"""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from xcloud.billing import Tariff, place_of, price_file, tariff
from xcloud.cloud.node_types import MARKET
from xcloud.cloud.settings import MARKET_LABELS
from xcloud.codecs import CODECS, Codec, CodecConfig, Frame, ring_of
from xcloud.config import JobConfig, PoolConfig, load_job
from xcloud.cost.bill import Holding
from xcloud.cost.memory import Memory, ModelShape, device_memory
from xcloud.cost.model import Change, Kind, Pace, PoolLoad, RegionLoad, Scenario, Wire
from xcloud.cost.planner import Axis, Choice
from xcloud.errors import ConfigError
from xcloud.fitting import fit_pools
from xcloud.manifest import ChunkLayout, Manifest
from xcloud.metrics import Event, RoundRow, read_events, read_rounds
from xcloud.prices import Place
from xcloud.secure.primitives import TAG_BYTES
from xcloud.strict_yaml import PlainLoader
from xcloud.update import adds_up

__all__ = [
    "Facts",
    "Measured",
    "Plan",
    "axes_of",
    "facts_of",
    "measured_in",
    "memory_of",
    "plan_of",
    "scenario_of",
    "wire_of",
]

SAMPLES = 16
"""Chunks of different layout that a codec is asked to encode, to know the size of all."""

MBIT = 125_000.0
STORES = {
    "s3": "aws",
    "s3a": "aws",
    "gs": "gcp",
    "gcs": "gcp",
    "abfs": "azure",
    "abfss": "azure",
    "az": "azure",
}


@dataclass(frozen=True)
class Facts:
    """A model, laid out."""

    parameters: int
    layout: tuple[ChunkLayout, ...]
    fragments: int
    shape: ModelShape


@dataclass(frozen=True)
class Measured:
    """What an earlier run took.

    Attributes:
        folder: of the run.
        job: that it ran.
        speeds: tokens/s of each pool of each region.
        pace: seconds beside training.
        rounds: that it was measured over.
    """

    folder: Path
    job: JobConfig
    speeds: Mapping[str, tuple[float, ...]]
    pace: Pace
    rounds: int


@dataclass(frozen=True)
class Plan:
    """A job ready to be compared.

    Attributes:
        notes: what in it is not measured, for people.
    """

    job: JobConfig
    facts: Facts
    tariff: Tariff
    scenario: Scenario
    memory: Mapping[str, tuple[Memory, ...]]
    notes: tuple[str, ...] = field(default=())


def plan_of(
    job: JobConfig, facts: Facts, measured: Measured | None, bandwidth_mbit: float | None = None
) -> Plan:
    """All that is known of a job before it runs.

    Args:
        job: the job.
        facts: its model.
        measured: an earlier run of it; None: assumptions.
        bandwidth_mbit: Mbit/s between a region and the aggregator; None: assumed.

    Raises:
        ConfigError: the job cannot be predicted, a price or an instance is wrong, or the run was of another model.
    """
    prices = tariff(job, always=True)
    assert prices is not None
    job, fitted = fit_pools(job, price_file(job))
    notes = [f"regions.{name}.pools[{pool}]: {found.why}" for (name, pool), found in fitted.items()]
    scenario = scenario_of(job, facts, measured, prices, notes, bandwidth_mbit)
    return Plan(job, facts, prices, scenario, memory_of(job, facts), tuple(notes))


# ------------------------------------------------------------------------------- the model


def facts_of(job: JobConfig) -> Facts:
    """Lay the job's model out, without its weights.

    Raises:
        ModelError: unknown architecture or setting, or a model that cannot be found.
    """
    models = importlib.import_module("xcloud.training.models")  # it loads torch, which takes seconds
    shapes, shape = models.lay_out(job.model, job.tokenizer.build().vocab_size)
    try:
        manifest = Manifest.of(shapes, job.chunk_size, job.streaming.fragments)
    except ValueError as error:
        raise ConfigError(f"streaming.fragments: {error}") from None
    return Facts(manifest.size, manifest.layout, max(1, len(manifest.fragments)), shape)


def flops_per_token(facts: Facts, sequence_length: int) -> float:
    """Of forward and backward pass: 6 for each parameter, and those of attention (arXiv 2204.02311, appendix B)."""
    return 6.0 * facts.parameters + 12.0 * facts.shape.layers * facts.shape.hidden * sequence_length


def memory_of(job: JobConfig, facts: Facts) -> dict[str, tuple[Memory, ...]]:
    """What a rank of each pool must hold."""
    feedback = job.codec.build().feedback > 0
    return {
        region.name: tuple(
            device_memory(
                facts.parameters,
                pool,
                pool.workers,
                facts.shape,
                job.sequence_length,
                offload=pool.offload,
                optimizer_slots=_optimizer_slots(job),
                outer_slots=len(job.outer.build().slots),
                feedback=feedback,
            )
            for pool in region.pools
        )
        for region in job.regions
    }


def _optimizer_slots(job: JobConfig) -> int:
    optimizer = job.inner.optimizer
    if optimizer.type == "sgd":
        return 1 if getattr(optimizer, "momentum", 0.0) else 0
    return 2


# ------------------------------------------------------------------------------- bytes


def wire_of(job: JobConfig, facts: Facts, codec: CodecConfig, downlink: CodecConfig) -> Wire:
    """Bytes of one update under these codecs: of the fragments' mean, where there are several."""
    up = codec.build()
    members = len(job.regions)
    sent = _encoded(up, facts.layout, members)
    if adds_up(up):  # totals go down as they are
        received = relayed = sent
    else:
        received = _encoded(downlink.build(), facts.layout, members)
        relayed = _encoded(job.hierarchy.relay(), facts.layout, members)
    tags = TAG_BYTES * len(facts.layout) if job.envelope is not None else 0
    return Wire(*((size + tags) // facts.fragments for size in (sent, received, relayed)))


def _encoded(codec: Codec, layout: Sequence[ChunkLayout], members: int) -> int:
    """Bytes of all chunks together; of many different ones some are encoded, and the others taken to be alike."""
    kinds: dict[tuple[Any, ...], int] = {}
    for chunk in layout:
        kinds[chunk.length, chunk.matrices] = kinds.get((chunk.length, chunk.matrices), 0) + 1
    picked = list(kinds)
    if len(picked) > SAMPLES:
        picked = [picked[len(picked) * i // SAMPLES] for i in range(SAMPLES)]
    noise = np.random.default_rng(0)
    sent = values = 0
    for length, matrices in picked:
        frame = Frame(members=members, matrices=matrices)
        ring = ring_of(codec, length, frame)
        count = kinds[length, matrices] if len(picked) == len(kinds) else 1
        if ring is not None:
            size = ring.size
        else:
            size = codec.encode((1e-3 * noise.standard_normal(length)).astype(np.float32), frame).nbytes
        sent += count * int(size)
        values += count * length
    return round(sent / values * sum(chunk.length for chunk in layout))


# ------------------------------------------------------------------------------- an earlier run


def measured_in(folder: Path) -> Measured:
    """Speeds and seconds out of a run folder; of its last start, if it was resumed.

    Raises:
        ConfigError: no round was committed there, or the run was one that nobody waits in.
        XCloudError: the folder holds no run, or its records are damaged.
    """
    job = load_job(folder / "job.yaml")
    _predictable(job, f"--from {folder}")
    events = _last_start(read_events(folder))
    began = {
        event.fields["round"]: event.time
        for event in events
        if event.kind == "round_started" and event.fields.get("attempt") == 1
    }
    retried = {event.fields["round"] for event in events if event.kind == "round_retried"}
    rows = [row for row in read_rounds(folder) if row.round in began and row.round not in retried]
    if not rows:
        raise ConfigError(f"--from {folder}: no committed round to measure; expected a run with at least one")
    saved = {event.fields["round"] for event in events if event.kind == "checkpoint_committed"}
    usual = rows[1:] or rows  # the first fills caches
    speeds = {}
    for region in job.regions:
        mine = [row.regions[region.name] for row in usual if region.name in row.regions]
        found = [
            statistics.median(
                row.pools[index].tokens / row.pools[index].compute_s for row in mine if row.pools
            )
            for index in range(len(region.pools))
            if mine
        ]
        if not found or not all(found):
            raise ConfigError(
                f"--from {folder}: region {region.name!r} took part in no round that is measured"
            )
        speeds[region.name] = tuple(found)
    sync_s = statistics.median(row.sync_s for row in usual)
    last, ended = rows[-1], events[-1].time
    rest: dict[Kind, list[float]] = {}
    for row in rows[1 if len(rows) > 2 else 0 :]:  # of the first, `first_s` tells
        if row.round + 1 in began:
            spent = began[row.round + 1] - began[row.round] - row.compute_s - row.sync_s
            rest.setdefault((row.eval_loss is not None, row.round in saved), []).append(max(0.0, spent))
    tail = max(0.0, ended - began[last.round] - last.compute_s - last.sync_s)
    else_s = {kind: statistics.median(found) for kind, found in rest.items()}
    kind = (last.eval_loss is not None, last.round in saved)
    first = rows[0]
    pace = Pace(
        setup_s=max(0.0, min(began.values()) - events[0].time),
        first_s=_first_s(first, rows[1] if len(rows) > 1 else None, began, job, speeds, sync_s, else_s),
        sync_s=sync_s,
        sync_bytes=0,
        bandwidth=math.inf,
        else_s=else_s or {kind: tail},
        end_s=max(0.0, tail - else_s.get(kind, max(else_s.values()))) if else_s else 0.0,
    )
    return Measured(folder, job, speeds, pace, len(usual))


def _first_s(
    first: RoundRow,
    second: RoundRow | None,
    began: Mapping[int, float],
    job: JobConfig,
    speeds: Mapping[str, tuple[float, ...]],
    sync_s: float,
    else_s: Mapping[Kind, float],
) -> float:
    """By how much the first round of a start is longer than its tokens, and the others, explain."""
    if second is None or second.round not in began:
        return 0.0
    usual = max(
        pool.tokens / speed
        for region in job.regions
        if region.name in first.regions
        for pool, speed in zip(first.regions[region.name].pools, speeds[region.name], strict=True)
    )
    least = min(else_s.values(), default=0.0)
    return max(0.0, began[second.round] - began[first.round] - usual - sync_s - least)


def _last_start(events: list[Event]) -> list[Event]:
    """The events since the run was last started; some runs begin with their regions."""
    begins = [i for i, event in enumerate(events) if event.kind == "run_started"]
    return events[begins[-1] :] if begins else events


# ------------------------------------------------------------------------------- the scenario


def scenario_of(
    job: JobConfig,
    facts: Facts,
    measured: Measured | None,
    prices: Tariff,
    notes: list[str],
    bandwidth_mbit: float | None = None,
) -> Scenario:
    """The job as far as its costs go; adds to `notes` what of it is not measured.

    Raises:
        ConfigError: it cannot be predicted, or the run was of another model.
    """
    _predictable(job, "plan")
    assumed = _assumptions()
    if measured is not None:
        _same_model(job, measured)
    regions = {
        region.name: RegionLoad(
            prices.regions[region.name],
            tuple(
                PoolLoad(
                    pool.sequences_per_step * job.sequence_length,
                    _speed(job, facts, measured, assumed, r, p, notes),
                )
                for p, pool in enumerate(region.pools)
            ),
        )
        for r, region in enumerate(job.regions)
    }
    mbit = bandwidth_mbit or float(assumed["bandwidth_mbit"])
    if bandwidth_mbit is None:
        notes.append(f"links: {mbit:g} Mbit/s between a region and the aggregator is assumed (--bandwidth)")
    state = 4 * facts.parameters
    inner = sum(state * (_optimizer_slots(job) + (job.codec.build().feedback > 0)) for _ in job.regions)
    model = state * (1 + len(job.outer.build().slots))
    scenario = Scenario(
        rounds=job.rounds,
        steps=job.inner.steps,
        regions=regions,
        hub=prices.hub,
        paid_hub=prices.paid_hub,
        wire=wire_of(job, facts, job.coding, job.downlink),
        pace=Pace(0.0, 0.0, 0.0, 0, mbit * MBIT, {}, 0.0),
        by_cloud=job.hierarchy.type == "cloud",
        balanced=job.balance.regions != "fixed",
        balanced_pools=job.balance.pools != "fixed",
        overlap=job.streaming.overlap,
        evaluate_every=job.evaluation.every if job.evaluation.sequences else 0,
        save_every=job.checkpoint.every,
        stored_bytes=job.checkpoint.keep * (model + inner),
        storage_usd=_storage(job, prices, notes),
    )
    if measured is None:
        return replace(scenario, pace=_assumed_pace(job, scenario, assumed, model + inner // len(regions)))
    before = measured.job
    wire = wire_of(before, facts, before.coding, before.downlink)
    hub = place_of(before.regions[0])
    if before.cost is not None and before.cost.hub is not None:
        hub = Place(before.cost.hub.cloud, before.cost.hub.location)
    there = replace(scenario, wire=wire, hub=hub, by_cloud=before.hierarchy.type == "cloud")
    pace = replace(measured.pace, sync_bytes=there.longest_way, bandwidth=mbit * MBIT)
    # What an overlapped run tells of a merge is the part that was not hidden.
    shown = before.streaming.overlap > 0
    return replace(scenario, pace=pace, overlap=0 if shown else scenario.overlap)


def _predictable(job: JobConfig, what: str) -> None:
    if job.buffer is not None:
        raise ConfigError(
            f"{what}: with 'buffer' a round lasts as long as whoever answers first, which cannot be predicted; expected a job without"
        )


def _same_model(job: JobConfig, measured: Measured) -> None:
    for key in ("model", "sequence_length", "tokenizer"):
        if getattr(job, key) != getattr(measured.job, key):
            raise ConfigError(
                f"--from {measured.folder}: {key} there is another than in the job, so its speed says nothing; "
                "expected a run of the same model, or no --from"
            )


def _speed(
    job: JobConfig,
    facts: Facts,
    measured: Measured | None,
    assumed: Mapping[str, Any],
    r: int,
    p: int,
    notes: list[str],
) -> float:
    """Tokens/s of a pool."""
    region, pool = job.regions[r], job.regions[r].pools[p]
    at = f"regions.{region.name}.pools[{p}]"
    before = None
    if measured is not None:
        there = next((one for one in measured.job.regions if one.name == region.name), None)
        before = there.pools[p] if there is not None and p < len(there.pools) else None
        if before is not None and (before.accelerator, before.precision) == (
            pool.accelerator,
            pool.precision,
        ):
            speed = measured.speeds[region.name][p]
            if before.workers != pool.workers:
                notes.append(f"{at}: measured with {before.workers} workers, taken to grow with their number")
            elif before.model_dump(exclude=PAID) != pool.model_dump(exclude=PAID):
                notes.append(f"{at}: measured with other settings of the pool")
            return speed * pool.workers / before.workers
    share = float(assumed["flops_share"])
    if not pool.on_gpu:
        each = 1e9 * float(assumed["core_gflops"]) * pool.cpus
        notes.append(f"{at}: {assumed['core_gflops']:g} GFLOP/s a core are assumed; --from RUN measures")
    else:
        peaks = assumed["peak_tflops"]
        if pool.accelerator not in peaks:
            raise ConfigError(
                f"{at}.accelerator {pool.accelerator!r}: its peak is not known; expected one of {', '.join(peaks)}, or --from a run "
                "that used it"
            )
        peak = peaks[pool.accelerator]["fp32" if pool.precision == "fp32" else "low"]
        each = 1e12 * share * float(peak)
        notes.append(
            f"{at}: {share:.0%} of {peak:g} TFLOP/s ({pool.accelerator}, {pool.precision}) are assumed; --from RUN measures"
        )
    return pool.workers * each / flops_per_token(facts, job.sequence_length)


PAID = {"instance", "market", "labels", "placement_timeout_s", "strategy"}
"""Settings of a pool that its speed does not depend on."""


def _assumed_pace(job: JobConfig, scenario: Scenario, assumed: Mapping[str, Any], saved_bytes: int) -> Pace:
    """Seconds beside training where nothing was measured."""
    bandwidth = scenario.pace.bandwidth
    tokens = job.evaluation.sequences * job.sequence_length
    # A forward pass is a third of a training step's work.
    evaluate = max(
        tokens / (3 * math.fsum(pool.speed for pool in region.pools)) for region in scenario.regions.values()
    )
    save = saved_bytes / (1e6 * float(assumed["save_mb_per_s"]))
    kinds = [(e, s) for e in (False, True) for s in (False, True)]
    return Pace(
        setup_s=float(assumed["setup_s"]),
        first_s=float(assumed["first_s"]),
        sync_s=float(assumed["sync_s"]),
        sync_bytes=0,
        bandwidth=bandwidth,
        else_s={(e, s): e * evaluate + s * save for e, s in kinds},
        end_s=float(assumed["end_s"]) + (0.0 if job.checkpoint.every == 1 else save),
    )


def _storage(job: JobConfig, prices: Tariff, notes: list[str]) -> float | None:
    """USD for a GB and month where checkpoints lie; None: in a folder, or in a store without a price."""
    scheme, colon, _ = (job.checkpoint.url or "").partition("://")
    cloud = STORES.get(scheme) if colon else None
    if cloud is None:
        notes.append("checkpoints lie on disks that are taken to be paid for with their machines")
        return None
    at = next((place_of(region) for region in job.regions if region.cloud == cloud), None)
    found = prices.book.storage_per_gb_month(cloud, at.location) if at is not None else None
    if found is None:
        notes.append(f"checkpoints: what {job.checkpoint.url} costs is not known")
        return None
    return found.usd


def _assumptions() -> dict[str, Any]:
    text = (resources.files("xcloud.cost") / "data" / "assumptions.yaml").read_text(encoding="utf-8")
    held: dict[str, Any] = yaml.load(text, Loader=PlainLoader)  # noqa: S506 - a SafeLoader subclass  # nosec B506
    return held


# ------------------------------------------------------------------------------- alternatives


Reload = Callable[[Sequence[str]], JobConfig]
"""The job with more `--set`.

Raises:
    ConfigError: it is not valid with them.
"""


def axes_of(plan: Plan, reload: Reload, keep: Sequence[str] = ()) -> list[Axis]:
    """What else the job could be.

    Args:
        plan: of the job as it is.
        reload: the job with more `--set`; a choice that it refuses is left out.
        keep: axes to leave as they are: `steps`, `codec`, `hierarchy`, `market`, `balance`, `hub`.
    """
    axes = [
        Axis("steps", tuple(_steps(plan))),
        Axis("codec", tuple(_codecs(plan))),
        Axis("hierarchy", tuple(_trees(plan))),
        Axis("market", tuple(_markets(plan, reload))),
        Axis("balance", tuple(_balances(plan))),
        Axis("hub", tuple(_hubs(plan))),
    ]
    unknown = [name for name in keep if name not in {axis.name for axis in axes}]
    if unknown:
        raise ConfigError(f"--keep {unknown[0]}: expected one of {', '.join(axis.name for axis in axes)}")
    kept = [Axis(axis.name, tuple(c for c in axis.choices if _valid(c, reload))) for axis in axes]
    return [axis for axis in kept if axis.choices and axis.name not in keep]


def _valid(choice: Choice, reload: Reload) -> bool:
    try:
        reload(choice.sets)
    except ConfigError:
        return False  # another key of the job rules it out
    return True


def _steps(plan: Plan) -> list[Choice]:
    found = []
    for factor in (0.5, 2.0, 4.0):
        steps = round(plan.job.inner.steps * factor)
        rounds = math.ceil(plan.job.rounds * plan.job.inner.steps / steps) if steps else 0
        if steps < 1 or rounds < 1 or steps * rounds > 1.1 * plan.job.inner.steps * plan.job.rounds:
            continue  # the same tokens, but for a tenth
        found.append(
            Choice(
                f"{steps} steps x {rounds} rounds",
                (f"inner.steps={steps}", f"rounds={rounds}"),
                _with(steps=steps, rounds=rounds),
                learning=True,
            )
        )
    return found


CODEC_CHOICES: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("identity", {"type": "identity"}, {"type": "identity"}),
    ("bf16 both ways", {"type": "bf16"}, {"type": "bf16"}),
    ("block, 8 bits both ways", {"type": "block", "bits": 8}, {"type": "block", "bits": 8}),
    ("fixed, 8 bits", {"type": "fixed", "bits": 8}, {"type": "identity"}),
    ("fixed, 4 bits", {"type": "fixed", "bits": 4}, {"type": "identity"}),
)


def _codecs(plan: Plan) -> list[Choice]:
    found = []
    for label, up, down in CODEC_CHOICES:
        codec, downlink = CODECS.parse(up), CODECS.parse(down)
        if (codec, downlink) == (plan.job.codec, plan.job.downlink):
            continue
        wire = wire_of(plan.job, plan.facts, codec, downlink)
        sets = (f"codec={_flow(up)}", f"downlink={_flow(down)}")
        found.append(Choice(label, sets, _with(wire=wire), learning=True))
    return found


def _trees(plan: Plan) -> list[Choice]:
    several = len({place.cloud for place in plan.scenario.places.values()}) < len(plan.scenario.regions)
    if not several:
        return []
    tree = plan.job.hierarchy.type == "cloud"
    # A cloud's mean is rounded on its way, unless encodings are added as they are.
    lossy = not adds_up(plan.job.coding.build())
    label, kind = ("all at one aggregator", "flat") if tree else ("by cloud first", "cloud")
    return [Choice(label, (f"hierarchy={kind}",), _with(by_cloud=not tree), learning=lossy)]


def _markets(plan: Plan, reload: Reload) -> list[Choice]:
    found = []
    for market, label in (("spot", "all on spot machines"), ("on_demand", "all on demand")):
        sets = tuple(
            f"regions.{r}.pools.{p}.{change}"
            for r, region in enumerate(plan.job.regions)
            for p, pool in enumerate(region.pools)
            if pool.instance is not None and pool.market != market
            for change in _bought(pool, market)
        )
        if not sets:
            continue
        try:
            changed = tariff(reload(sets), always=True)
        except ConfigError:
            continue  # a machine has no price there, and there is a budget
        assert changed is not None
        if any(
            h.usd_per_hour is None and plan.tariff.regions[n].usd_per_hour is not None
            for n, h in changed.regions.items()
        ):
            continue
        found.append(Choice(label, sets, partial(_held, changed.regions)))
    return found


def _bought(pool: PoolConfig, market: str) -> list[str]:
    """What makes a pool's machines those of a market: what it is paid as, and the label, where that pins another one."""
    found = [f"market={market}"]
    if not pool.allows(market):
        labels = dict(pool.labels) | {MARKET: MARKET_LABELS[market]}
        text = yaml.safe_dump(labels, default_flow_style=True, sort_keys=False, width=math.inf).strip()
        found.append(f"labels={text}")
    return found


def _held(holdings: Mapping[str, Holding], scenario: Scenario) -> Scenario:
    regions = {name: replace(load, holding=holdings[name]) for name, load in scenario.regions.items()}
    return replace(scenario, regions=regions)


def _balances(plan: Plan) -> list[Choice]:
    if plan.job.balance.regions != "fixed":
        label, mode, on = "equal steps", "fixed", False
    else:
        label, mode, on = "steps by measured speed", "dynamic", True
    return [
        Choice(
            label,
            (f"balance={mode}",),
            _with(balanced=on, balanced_pools=on),
            learning=True,
        )
    ]


def _hubs(plan: Plan) -> list[Choice]:
    if plan.tariff.paid_hub is not None:
        return []  # its machine is priced where it is
    return [
        Choice(
            f"aggregate in {place}",
            (f"cost.hub={{cloud: {place.cloud}, location: {place.location}}}",),
            _with(hub=place),
            by_hand=f"start it on a machine in {place}: updates meet where the driver runs, and cost.hub moves nothing",
        )
        for place in dict.fromkeys(plan.scenario.places.values())
        if place != plan.scenario.hub
    ]


def _with(**changes: Any) -> Change:
    def change(scenario: Scenario) -> Scenario:
        return replace(scenario, **changes)

    return change


def _flow(value: Mapping[str, Any]) -> str:
    """A mapping as YAML that fits on a command line."""
    if set(value) == {"type"}:
        return str(value["type"])
    return "{" + ", ".join(f"{key}: {item}" for key, item in value.items()) + "}"
