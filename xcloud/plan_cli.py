"""`xcloud plan`: what a job will take, what else it could be, and the best under a limit. It only wires and shows."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from xcloud.errors import ConfigError
from xcloud.metrics import to_plain
from xcloud.report.text import human_bytes, human_count, human_seconds, human_usd

if TYPE_CHECKING:  # they load numpy and more, which `xcloud --help` should not wait for
    from xcloud.config import JobConfig
    from xcloud.cost.memory import Memory
    from xcloud.cost.model import Forecast
    from xcloud.cost.planner import Axis, Candidate, Limit
    from xcloud.planning import Plan

__all__ = ["plan"]

TIMES = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
GIB = 2**30


def plan(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="Job file (YAML).")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="PATH=VALUE", help="Override a key of the job: inner.steps=50. Repeatable."
        ),
    ] = None,
    earlier: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="RUN", help="Folder of an earlier run of this model, whose speeds are taken."
        ),
    ] = None,
    under: Annotated[
        str | None,
        typer.Option(
            metavar="LIMIT",
            help="budget (cost.budget_usd), budget=USD: the fastest that costs no more. time=12h (s, m, h, d): "
            "the cheapest that takes no longer. Default: the cheapest.",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="AXIS",
            help="Leave as it is: steps, codec, hierarchy, market, balance, hub; or learning: all that changes what is "
            "learned. Repeatable.",
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(min=0.001, metavar="MBIT", help="Mbit/s between a region and the aggregator."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write JSON on standard output, and nothing else.")
    ] = False,
) -> None:
    """Predict what a job takes: time, bytes, dollars and memory, and what alternatives would. Starts nothing."""
    # Here, because they load numpy, torch and transformers, and `xcloud --help` should not wait for that.
    from xcloud.config import load_job  # noqa: PLC0415
    from xcloud.cost.planner import alone, best  # noqa: PLC0415
    from xcloud.planning import axes_of, facts_of, measured_in, plan_of  # noqa: PLC0415

    given = tuple(overrides or ())

    def reload(sets: Sequence[str]) -> JobConfig:
        return load_job(job, (*given, *sets))

    config = reload(())
    limit = _limit(under, config)
    measured = None if earlier is None else measured_in(_run_folder(earlier))
    with _progress(as_json):
        facts = facts_of(config)
        planned = plan_of(config, facts, measured, bandwidth)
        fixed = [axis for axis in keep or () if axis != "learning"]
        axes = axes_of(planned, reload, fixed)
        if "learning" in (keep or ()):
            axes = _neutral(axes)
        price = planned.tariff.egress

        def valid(candidate: Candidate) -> bool:
            try:
                reload(candidate.sets)
            except ConfigError:
                return False
            return True

        rows = alone(planned.scenario, axes, price)
        winner = best(planned.scenario, axes, price, limit, valid)
        forecast = plan_forecast(planned)
    if as_json:
        typer.echo(json.dumps(to_plain(_record(planned, forecast, rows, winner, measured)), allow_nan=False))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    _show(console, planned, forecast, measured)
    _show_alternatives(console, forecast, rows)
    _show_best(console, job, given, forecast, winner, under)


def plan_forecast(planned: Plan) -> Forecast:
    """What the job takes as it is."""
    from xcloud.cost.model import predict  # noqa: PLC0415 - see `plan`

    return predict(planned.scenario, planned.tariff.egress)


def _limit(under: str | None, job: JobConfig) -> Limit:
    from xcloud.cost.planner import Limit  # noqa: PLC0415 - see `plan`

    if under is None:
        return Limit()
    if under == "budget":
        if job.cost is None or job.cost.budget_usd is None:
            raise ConfigError(
                "--under budget: the job has no cost.budget_usd; expected one, or --under budget=USD"
            )
        return Limit(usd=job.cost.budget_usd)
    if found := re.fullmatch(r"budget=\$?(\d+(?:\.\d+)?)", under):
        return Limit(usd=float(found[1]))
    if found := re.fullmatch(r"time=(\d+(?:\.\d+)?)\s*([smhd])", under):
        return Limit(seconds=float(found[1]) * TIMES[found[2]])
    raise ConfigError(f"--under {under!r}: expected budget, budget=USD (budget=250) or time=LIMIT (time=12h)")


def _run_folder(given: Path) -> Path:
    """The folder of an earlier run, from its path or its name under `runs/`."""
    for folder in (given, Path("runs") / given):
        if (folder / "job.yaml").exists():
            return folder
    raise ConfigError(f"--from {given}: no run there, nor under runs/; expected a folder with job.yaml")


def _neutral(axes: Sequence[Axis]) -> list[Axis]:
    kept = [replace(axis, choices=tuple(c for c in axis.choices if not c.learning)) for axis in axes]
    return [axis for axis in kept if axis.choices]


def _progress(quiet: bool) -> Any:
    console = Console(stderr=True)
    return console.status("laying the model out, asking the codecs") if not quiet else _Silence()


class _Silence:
    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


# ------------------------------------------------------------------------------- for people


def _show(console: Console, planned: Plan, forecast: Forecast, measured: Any) -> None:
    job = planned.job
    source = (
        f"speeds as in {measured.folder} ({measured.rounds} rounds)"
        if measured is not None
        else "an estimate: nothing is measured (--from RUN)"
    )
    _say(console, f"{job.name}: {human_count(planned.facts.parameters)} parameters; {source}")
    _say(
        console,
        f"{job.rounds} rounds x {job.inner.steps} inner steps, {human_count(forecast.tokens)} tokens: "
        f"{human_seconds(forecast.seconds)}, {human_bytes(sum(forecast.egress.values()))} between places, {_cost(forecast)}",
    )
    _say(console, f"a round takes {human_seconds(forecast.round_s)}; updates meet in {planned.scenario.hub}")
    console.print()
    table = _table(
        "region", "pool", "tok/s", "steps", "trains", "waits", "memory a device", "machines", "egress"
    )
    for region in job.regions:
        part, load = forecast.regions[region.name], planned.scenario.regions[region.name]
        for index, (pool, one) in enumerate(zip(region.pools, load.pools, strict=True)):
            first = index == 0
            table.add_row(
                region.name if first else "",
                f"{pool.workers} x {pool.accelerator}, ZeRO {pool.zero_stage}, {pool.precision}",
                human_count(one.speed),
                f"{part.steps:.0f}" if first else "",
                f"{human_seconds(part.train_s)}/round" if first else "",
                f"{part.idle_share:.0%}" if first else "",
                _memory(planned, region.name, index),
                human_usd(part.machines_usd) if first else "",
                human_usd(part.egress_usd) if first else "",
            )
    console.print(table)
    if forecast.egress:
        console.print()
        ways = _table("way", "bytes", "$/GB", "cost")
        prices = {f"{a} -> {b}": planned.tariff.egress(a, b) for a, b in _pairs(planned)}
        for way, size in forecast.egress.items():
            each = prices.get(way)
            ways.add_row(
                way,
                human_bytes(size),
                "unknown" if each is None else f"{each:.3g}",
                human_usd(None if each is None else size / 1e9 * each),
            )
        console.print(ways)
    for note in (*planned.notes, *_dates(planned)):
        console.print(f"- {note}", style="dim", soft_wrap=True, markup=False)


def _pairs(planned: Plan) -> Any:
    return ((route.source, route.destination) for route in planned.scenario.routes)


def _dates(planned: Plan) -> list[str]:
    """How old the prices are that were used."""
    found = {}
    book = planned.tariff.book
    for region in planned.job.regions:
        place = planned.scenario.places[region.name]
        for pool in region.pools:
            if pool.instance is not None:
                price = book.per_hour(place.cloud, place.location, pool.instance, pool.market)
                if price is not None:
                    found[price.source] = price.as_of
    return [f"prices of {day}, from {source}; not fetched: check them" for source, day in found.items()]


def _memory(planned: Plan, name: str, index: int) -> str:
    from xcloud.cost.fit import FREE  # noqa: PLC0415 - see `plan`

    memory: Memory = planned.memory[name][index]
    pool = planned.job.region(name).pools[index]
    text = human_bytes(memory.total_bytes)
    room = _device_bytes(planned, name, index)
    if room is None:
        return f"{text} + {human_bytes(memory.host_bytes)} host" if not pool.on_gpu else text
    fits = "" if memory.total_bytes <= (1 - FREE) * room else "  does not fit"
    return f"{text} of {human_bytes(room)}{fits}"


def _device_bytes(planned: Plan, name: str, index: int) -> float | None:
    """Memory of the pool's device; None where it is not known."""
    region = planned.job.region(name)
    pool = region.pools[index]
    if pool.instance is None or not pool.on_gpu:
        return None
    return planned.tariff.book.instance(region.cloud, pool.instance).accelerator_memory_gb * GIB


def _show_alternatives(console: Console, forecast: Forecast, rows: Sequence[tuple[Axis, Candidate]]) -> None:
    if not rows:
        return
    console.print()
    table = _table("instead", "", "time", "between places", "cost", "changes what is learned")
    table.add_row(
        "as it is",
        "",
        human_seconds(forecast.seconds),
        human_bytes(sum(forecast.egress.values())),
        _usd(forecast),
        "",
    )
    before = ""
    for axis, candidate in rows:
        other = candidate.forecast
        table.add_row(
            axis.name if axis.name != before else "",
            candidate.label,
            human_seconds(other.seconds),
            human_bytes(sum(other.egress.values())),
            f"{_usd(other)}{_less(forecast, other)}",
            "yes" if candidate.learning else "no",
        )
        before = axis.name
    console.print(table)


def _show_best(
    console: Console,
    job: Path,
    given: Sequence[str],
    forecast: Forecast,
    winner: Candidate | None,
    under: str | None,
) -> None:
    console.print()
    usual = "fastest (not everything has a price)" if forecast.unpriced else "cheapest"
    what = usual if under is None else f"best under {under}"
    if winner is None:
        _say(console, f"{what}: none of the alternatives stays within the limit")
        return
    found = winner.forecast
    console.print(
        f"* {what}: {winner.label}: {human_seconds(found.seconds)}, {_cost(found)}{_less(forecast, found)}",
        style="bold",
        soft_wrap=True,
        markup=False,
    )
    if winner.learning:
        _say(
            console,
            "  it changes what is learned, which a plan cannot judge (--keep learning leaves that as it is)",
        )
    words = ["xcloud", "train", str(job)]
    words += [word for one in (*given, *winner.sets) for word in ("--set", one)]
    _say(console, f"  {shlex.join(words)}")
    for line in winner.by_hand:
        _say(console, f"  {line}")


def _cost(forecast: Forecast) -> str:
    unknown = bool(forecast.unpriced) and not forecast.machines_usd
    parts = [
        f"machines {human_usd(None if unknown else forecast.machines_usd)}",
        f"egress {human_usd(forecast.egress_usd)}",
    ]
    if forecast.storage_usd is not None:
        parts.append(f"storage {human_usd(forecast.storage_usd)}")
    lacking = f"; no price: {', '.join(forecast.unpriced)}" if forecast.unpriced else ""
    return f"{_usd(forecast)} ({', '.join(parts)}{lacking})"


def _usd(forecast: Forecast) -> str:
    return human_usd(forecast.usd, whole=not forecast.unpriced)


def _less(before: Forecast, after: Forecast) -> str:
    """By how much dollars change, where all are known."""
    if before.unpriced or after.unpriced or not before.usd:
        return ""
    change = round(100 * (after.usd / before.usd - 1))
    return f" ({change:+d}%)" if change else ""


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    words = ("region", "pool", "way", "instead", "", "changes what is learned")
    for name in columns:
        table.add_column(name, justify="left" if name in words else "right", no_wrap=name != "pool")
    return table


def _say(console: Console, line: str) -> None:
    """One line that is never folded, so that commands in it can be copied."""
    console.print(line, soft_wrap=True, markup=False)


# ------------------------------------------------------------------------------- for programs


def _record(
    planned: Plan,
    forecast: Forecast,
    rows: Sequence[tuple[Axis, Candidate]],
    winner: Candidate | None,
    measured: Any,
) -> dict[str, Any]:
    """The same as plain JSON types. Seconds, bytes, USD; totals of the job."""
    regions = {}
    for region in planned.job.regions:
        part, load = forecast.regions[region.name], planned.scenario.regions[region.name]
        regions[region.name] = {
            "place": str(planned.scenario.places[region.name]),
            "instances": load.holding.instances,
            "steps": part.steps,
            "train_s": part.train_s,
            "idle_share": part.idle_share,
            "machines_usd": part.machines_usd,
            "egress_bytes": part.egress_bytes,
            "egress_usd": part.egress_usd,
            "pools": [
                {
                    "tokens_per_s": one.speed,
                    "device_bytes": planned.memory[region.name][index].total_bytes,
                    "device_has_bytes": _device_bytes(planned, region.name, index),
                    "host_bytes": planned.memory[region.name][index].host_bytes,
                }
                for index, one in enumerate(load.pools)
            ],
        }
    return {
        "job": planned.job.name,
        "measured": None if measured is None else str(measured.folder),
        "parameters": planned.facts.parameters,
        "rounds": planned.job.rounds,
        "inner_steps": planned.job.inner.steps,
        "hub": str(planned.scenario.hub),
        **_totals(forecast),
        "regions": regions,
        "alternatives": [{"axis": axis.name, **_choice(candidate, forecast)} for axis, candidate in rows],
        "best": None if winner is None else _choice(winner, forecast),
        "notes": list(planned.notes),
    }


def _totals(forecast: Forecast) -> dict[str, Any]:
    return {
        "seconds": forecast.seconds,
        "round_s": forecast.round_s,
        "tokens": forecast.tokens,
        "usd": forecast.usd,
        "machines_usd": forecast.machines_usd,
        "egress_usd": forecast.egress_usd,
        "storage_usd": forecast.storage_usd,
        "unpriced": list(forecast.unpriced),
        "egress": dict(forecast.egress),
    }


def _choice(candidate: Candidate, forecast: Forecast) -> dict[str, Any]:
    known = not (candidate.forecast.unpriced or forecast.unpriced) and forecast.usd
    return {
        "label": candidate.label,
        "set": list(candidate.sets),
        "by_hand": list(candidate.by_hand),
        "changes_learning": candidate.learning,
        "saving_ratio": 1 - candidate.forecast.usd / forecast.usd if known else None,
        **_totals(candidate.forecast),
    }
